"""The commands that a command advises to run next, ready for a shell."""

from __future__ import annotations

import shlex
from argparse import Namespace
from typing import Any

from optimum_modegpt.integration.card.commands import flags

YOUR_TEXT = "<your-text.txt>"
YOUR_TOKEN = "<your-token>"
NEW_FOLDER = "<new-folder>"
"""Placeholders. They are quoted in a command: a shell would take them for redirections."""
HARDWARE = ("device", "dtype")


def advised(options: Namespace, *words: str, **more: Any) -> str:
    """Returns a command with what a run like this one needs: the flags for access and hardware that were given.

    The access token is secret, so a placeholder is shown in its place.

    Args:
        options: those of this run.
        words: the command and its arguments.
        more: its own flags by name, those of `None` left out.
    """
    given = {name: value for name in HARDWARE if (value := getattr(options, name, "auto")) != "auto"}
    token = YOUR_TOKEN if options.token is not None else None
    trust = ["--trust-remote-code"] if options.trust_remote_code else []
    return f"{options.program} {shlex.join([*words, *flags({**more, **given, 'token': token}), *trust])}"
