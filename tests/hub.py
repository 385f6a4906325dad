"""Serve an in-memory Hub on this machine, with the parts of its HTTP API that pushing and loading models need.

`with serving() as hub:` listens at `hub.url`; client processes read the address from HF_ENDPOINT. `hub.log` records
the requests. To test failures, add a repository name to `hub.refused` (commits are refused), `hub.dropped` (uploads of
large files are cut off) or `hub.held` (commits are not answered until `hub.released` is set).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

NAME = "(?P<repo>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
LARGE = (".safetensors", ".bin", "tokenizer.json", ".png")


@dataclass(frozen=True)
class Blob:
    """Hold one version of a file."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Return the SHA-256 of a large file, or the git blob hash of a small one."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """Hold branches and pull requests by name, and the files of each commit."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def sha(self, revision: str) -> str | None:
        """Return the commit of a branch, a pull request or a commit."""
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, Blob]:
        """Return the files at a revision."""
        return self.commits[self.refs.get(revision, revision)]

    def commit(self, ref: str, files: Mapping[str, Blob]) -> str:
        """Create a commit with exactly these files and move `ref` to it."""
        state = [len(self.commits), *((path, blob.oid) for path, blob in files.items())]
        sha = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha


@dataclass
class Hub:
    """Hold the repositories, the access tokens and a log of the requests."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"secret": "user"})
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    released: threading.Event = field(default_factory=threading.Event)

    def create(self, name: str, private: bool = False) -> Repo:
        """Create a repository with one commit, like the Hub."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return repo

    def environment(self, home: Path, *, token: str | None = "secret", **more: str) -> dict[str, str]:
        """Return the environment of a client process: this Hub, its own cache, and the token of the user."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        given = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        if token is not None:
            given["HF_TOKEN"] = token
        return kept | given | more

    def asked(self, pattern: str) -> list[str]:
        """Return the logged requests that match."""
        return [line for line in self.log if re.search(pattern, line)]


class Refusal(Exception):
    """Signal an error response."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    """Answer the requests of one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        """Keep stderr quiet."""

    def answer(self) -> None:
        """Call the method of the route; answer a `Refusal` with its status and headers."""
        parts = urlsplit(self.path)
        self.hub.log.append(f"{self.command} {unquote(parts.path)}")
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        try:
            for pattern, name in ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {parts.path}"):
                    given = {key: unquote(value) for key, value in found.groupdict("").items()}
                    return getattr(self, name)(**given)
            raise Refusal(404, f"no route {self.command} {parts.path}")
        except Refusal as refusal:
            self.body()
            self.send(refusal.status, {"error": str(refusal)}, refusal.headers)

    def body(self) -> bytes:
        """Read the rest of the request body."""
        size, self.unread = self.unread, 0
        return self.rfile.read(size)

    def send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send bytes unchanged, and any other content as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------------- rights

    def user(self) -> str | None:
        """Return the user of the request, or None for an anonymous one."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, name: str, *, write: bool = False) -> Repo:
        """Return a repository; a private one that the client may not read is reported as missing."""
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and (user is None or (user != name.split("/")[0] and "create_pr" not in self.query)):
            raise Refusal(403, f"You don't have the rights to write to {name}")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        """Return the commit of a revision."""
        sha = repo.sha(revision)
        if sha is None:
            self.missing(f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def missing(self, message: str, code: str) -> NoReturn:
        """Answer that the requested item does not exist."""
        raise Refusal(404, message, code)

    # ------------------------------------------------------------------------------------------------------ writing

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.send(200, {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        asked, user = json.loads(self.body()), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name.split("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        if name in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo", **url})
        self.hub.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send(200, url)

    def branch(self, repo: str, branch: str) -> None:
        found, start = self.repo(repo, write=True), json.loads(self.body() or b"{}").get("startingPoint", "main")
        if branch in found.refs:
            raise Refusal(409, f"Reference refs/heads/{branch} already exists")
        found.refs[branch] = self.at(found, start)
        self.send(200, {})

    def validate_yaml(self) -> None:
        content = json.loads(self.body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        try:
            data = yaml.safe_load(found.group(1)) if found else {}
        except yaml.YAMLError as error:
            data, problem = None, str(error)
        else:
            problem = "" if isinstance(data, dict) else "expected a mapping"
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        errors = [{"message": problem}] if problem else []
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        known = found.files(self.at(found, revision))
        self.send(200, {"files": [_upload_mode(file, known) for file in json.loads(self.body())["files"]]})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo, write=True)
        objects = json.loads(self.body())["objects"]
        for requested in objects:
            if requested["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{repo}/{requested['oid']}"
                requested["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, repo: str, oid: str) -> None:
        if repo in self.hub.dropped:
            self.rfile.read(self.unread // 2)
            self.close_connection = True
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the content does not have this hash")
        self.hub.objects[oid] = data
        self.send(200, {})

    def lfs_verify(self, repo: str, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body())["size"]:
            raise Refusal(404, "the object was not uploaded")
        self.send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        if repo in self.hub.refused:
            raise Refusal(403, "You have exceeded your storage quota")
        if repo in self.hub.held:
            self.hub.released.wait(timeout=60)
            self.close_connection = True
            return
        files = dict(found.files(self.at(found, revision)))
        for line in map(json.loads, self.body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        sha = found.commit(f"refs/pr/{number}" if "create_pr" in self.query else revision, files)
        page = f"{self.hub.url}/{repo}"
        pull_request = f"{page}/discussions/{number}" if "create_pr" in self.query else None
        self.send(200, {"commitUrl": f"{page}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull_request})

    # ------------------------------------------------------------------------------------------------------ reading

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        sha = self.at(found, revision)
        siblings = [{"rfilename": path} for path in sorted(found.commits[sha])]
        self.send(200, {"id": repo, "sha": sha, "private": found.private, "tags": [], "siblings": siblings})

    def refs(self, repo: str) -> None:
        refs = self.repo(repo).refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs]
        self.send(200, {"branches": branches, "tags": [], "converts": []})

    def tree(self, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        files = found.files(self.at(found, revision))
        below = [name for name in sorted(files) if not path or name.startswith(f"{path}/")]
        if not below:
            self.missing(f"{path} does not exist", "EntryNotFound")
        self.send(200, [_tree_entry(name, files[name]) for name in below])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        sha = self.at(found, revision)
        blob = found.commits[sha].get(path)
        if blob is None:
            self.missing("Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        self.send_part(blob.data, headers)

    def send_part(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Send all of `data`, or the requested range."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


ROUTES = (
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate_yaml"),
    (f"POST /api/models/{NAME}/branch/(?P<branch>[^/]+)", "branch"),
    (f"POST /api/models/{NAME}/preupload/{REVISION}", "preupload"),
    (f"POST /api/models/{NAME}/commit/{REVISION}", "commit"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (f"PUT /lfs/{NAME}/(?P<oid>[0-9a-f]+)", "lfs_put"),
    (f"POST /lfs/{NAME}/(?P<oid>[0-9a-f]+)/verify", "lfs_verify"),
    (f"GET /api/models/{NAME}", "info"),
    (f"GET /api/models/{NAME}/revision/{REVISION}", "info"),
    (f"GET /api/models/{NAME}/refs", "refs"),
    (f"GET /api/models/{NAME}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    (f"(?:GET|HEAD) /{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
)


def _upload_mode(file: dict[str, Any], known: Mapping[str, Blob]) -> dict[str, Any]:
    path = file["path"]
    mode = "lfs" if path.endswith(LARGE) or file["size"] > 10_000_000 else "regular"
    oid = known[path].oid if path in known else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _tree_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a Hub at a free port of the loopback interface."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
