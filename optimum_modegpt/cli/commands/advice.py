"""Format the commands that a command suggests to run next, quoted for a shell."""

from __future__ import annotations

import shlex
from argparse import Namespace
from typing import Any

from optimum_modegpt.hub.commands import flags

YOUR_TEXT = "<your-text.txt>"
YOUR_TOKEN = "<your-token>"
NEW_FOLDER = "<new-folder>"
"""Placeholders. They are quoted in a command, because a shell would read them as redirections."""
HARDWARE = ("device", "dtype")


def advised(options: Namespace, *words: str, **more: Any) -> str:
    """Return a command with the flags for access and hardware of this run.

    The access token is secret, so a placeholder is shown in its place.

    Args:
        options: the options of this run.
        words: the command and its arguments.
        more: flags of the command by name; `None` leaves a flag out.
    """
    given = {name: value for name in HARDWARE if (value := getattr(options, name, "auto")) != "auto"}
    token = YOUR_TOKEN if options.token is not None else None
    trust = ["--trust-remote-code"] if options.trust_remote_code else []
    return f"{options.program} {shlex.join([*words, *flags({**more, **given, 'token': token}), *trust])}"
