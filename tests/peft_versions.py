"""Skip adapter tests that the installed transformers and PEFT do not support together."""

from __future__ import annotations

from typing import Any

import pytest
import transformers


def own_adapters() -> pytest.MarkDecorator:
    """Return a mark that skips a test of `add_adapter`, `load_adapter` or an adapter's folder.

    These calls require PEFT 0.22 in transformers 5.24, which was not yet released. `get_peft_model` does not.
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
        return f"transformers {transformers.__version__} requires peft >= {oldest}, found {peft.__version__}"
    return ""
