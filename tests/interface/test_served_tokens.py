"""Test the comparison of a server's tokens with those of transformers, against a local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from checkpoints import save_dense
from transformers import AutoModelForCausalLM

served_tokens = pytest.importorskip("served_tokens")


class Server(HTTPServer):
    """Serves a model by `generate`. `shift` is added to its last token."""

    shift = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (request["model"], request["temperature"]) == ("served", 0)
        prompt = request["prompt"]
        tokens = self.server.model.generate(
            torch.tensor([prompt]), max_new_tokens=request["max_tokens"], do_sample=False
        )[0, len(prompt) :].tolist()
        tokens[-1] = (tokens[-1] + self.server.shift) % self.server.model.config.vocab_size
        self.reply({"choices": [{"token_ids": tokens}]})

    def reply(self, values: dict) -> None:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(save_dense(tmp_path / "model")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("shift", [0, 1])
def test_the_tokens_of_a_server_are_compared(
    shift: int, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.shift = shift
    arguments = ["--model", str(tmp_path / "model"), "--url", f"http://127.0.0.1:{server.server_port}"]
    arguments += ["--tokens", "5", "--prompts", "one two", "three"]
    if shift:
        with pytest.raises(SystemExit):
            served_tokens.main(arguments)
    else:
        served_tokens.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{0 if shift else 2} of 2 × 5 tokens are equal"
    assert sum(line.startswith("DIFFERENT: ") for line in lines) == (2 if shift else 0)
