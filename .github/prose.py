"""Check the prose of README, guides, templates, code and tests against a short list of words to avoid.

python .github/prose.py
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
AVOID = {
    r"\bwhat(ever)?\b(?![^.!;:]*\?)": 'name the thing; "what" only asks questions',
    r"\bstands?\b(?! for\b)": '"is", or leave it out',
    r"\b(goes|go|going|went) on\b": '"continue" or "resume"',
    r"\bbeside\b": '"next to" or "in addition to"',
    r"\blies\b": '"is"',
    r"\bwhere\s+(there|it|none)\b": '"if"',
}


def main() -> int:
    """Print every finding. Return 1 if there are any."""
    failed = 0
    for path in files():
        for line, word, advice in findings(path):
            print(f"{path.relative_to(ROOT).as_posix()}:{line}: {word!r}: write {advice}")
            failed = 1
    return failed


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


if __name__ == "__main__":
    sys.exit(main())
