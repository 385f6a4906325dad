"""Check the prose of README, guides, templates, code and tests against a short list of words to avoid.

python .github/prose.py [--update]

`prose_allowed.txt` holds the number of findings that each file may still have; `--update` lowers it to the present
numbers. Delete the file once it is empty.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = Path(__file__).with_name("prose_allowed.txt")
AVOID = {
    r"\bwhat(ever)?\b(?![^.!;:]*\?)": 'name the thing; "what" only asks questions',
    r"\bstands?\b(?! for\b)": '"is", or leave it out',
    r"\b(goes|go|going|went) on\b": '"continue" or "resume"',
    r"\bbeside\b": '"next to" or "in addition to"',
    r"\blies\b": '"is"',
    r"\bwhere\s+(there|it|none)\b": '"if"',
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="lower the allowed numbers to the present ones")
    options = parser.parse_args()
    found = {path.relative_to(ROOT).as_posix(): list(findings(path)) for path in files()}
    allowed = read_allowed()
    if options.update:
        rows = [f"{len(lines)} {name}\n" for name, lines in found.items() if lines]
        ALLOWED.write_text("".join(rows), encoding="utf-8")
        return 0
    failed = {name: lines for name, lines in found.items() if len(lines) > allowed[name]}
    for name, lines in failed.items():
        print(f"{name}: {len(lines)} findings, {allowed[name]} allowed")
        print("".join(f"  {name}:{line}: {word!r}: write {advice}\n" for line, word, advice in lines), end="")
    return 1 if failed else 0


def files() -> list[Path]:
    """Return the files with prose that people read, except the test of this script, which has examples of each word."""
    package, tests, github = ROOT / "optimum_modegpt", ROOT / "tests", ROOT / ".github"
    prose = {ROOT / "README.md", *github.rglob("*.md"), *package.rglob("*.jinja")}
    prose |= {*package.rglob("*.py"), *tests.rglob("*.py")}
    return sorted(prose - {tests / "interface" / "test_prose.py"})


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the words and the advice of each finding in a file."""
    text = path.read_text(encoding="utf-8")
    for first, piece in python_prose(text) if path.suffix == ".py" else [(1, text)]:
        for pattern, advice in AVOID.items():
            for match in re.finditer(pattern, piece, re.IGNORECASE):
                yield first + piece.count("\n", 0, match.start()), " ".join(match[0].split()), advice


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of every comment, string and test name of Python code."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def read_allowed() -> Counter[str]:
    """Return the allowed number of findings by file."""
    lines = ALLOWED.read_text(encoding="utf-8").splitlines() if ALLOWED.is_file() else []
    return Counter({name: int(number) for number, _, name in (line.partition(" ") for line in lines)})


if __name__ == "__main__":
    sys.exit(main())
