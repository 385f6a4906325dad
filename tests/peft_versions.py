"""Which adapter calls the installed transformers and PEFT can make together."""

from __future__ import annotations

from typing import Any

import pytest
import transformers


def own_adapters() -> pytest.MarkDecorator:
    """Return a mark that skips a test of `add_adapter`, `load_adapter` or an adapter's folder.

    transformers 5.24 asks for PEFT 0.22 there, which was not yet released; `get_peft_model` does not ask.
    """
    return pytest.mark.skipif(bool(reason := _refusal()), reason=reason)


def _refusal() -> str:
    try:
        import peft
    except ImportError:
        return "peft is not installed (pip install peft)"
    from transformers.integrations import peft as integration
    from transformers.utils import check_peft_version

    oldest: Any = integration.MIN_PEFT_VERSION
    try:
        check_peft_version(min_version=oldest)
    except ValueError:
        return f"transformers {transformers.__version__} asks for peft >= {oldest}, installed is {peft.__version__}"
    return ""
