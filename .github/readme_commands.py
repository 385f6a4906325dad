"""Print a command of the README: `demo`, the main job, or `test`, the test suite. CI runs these commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def commands() -> dict[str, str]:
    """Return the shell commands of the README by the name in the comment before them."""
    text = README.read_text(encoding="utf-8")
    return {
        name: body.strip() for name, body in re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)```", text, re.DOTALL)
    }


if __name__ == "__main__":
    print(commands()[sys.argv[1]])
