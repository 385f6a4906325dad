"""Decide which README files on the Hub a model card may replace, and merge their front matter into the card."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = "This model card has been automatically generated."
"""A sentence of the placeholder card that transformers writes."""
TO_FILL = "[More Information Needed]"
UNTOUCHED = 35
"""The template has about forty placeholders; if fewer than this remain, a person has filled in the card."""
TRAINER = "This model card has been generated automatically according to the information the Trainer had access to"
"""A sentence of the comment in the card of `Trainer`, which asks its readers to remove the comment."""
PERSONS = ("license", "license_name", "license_link", "language")
"""The fields for which an existing front matter takes precedence over ours."""


def is_template(text: str) -> bool:
    """Return whether no person wrote a README: front matter alone, the template of transformers or of `Trainer`."""
    untouched = TEMPLATE in text and text.count(TO_FILL) >= UNTOUCHED
    return untouched or TRAINER in text or not ModelCard(text, ignore_metadata_errors=True).text.strip()


def merge_header(card: ModelCard, there: str) -> None:
    """Merge the front matter of another README, such as its licence and tags, into that of a card."""
    ours: Any = card.data
    theirs: dict[str, Any] = ModelCard(there, ignore_metadata_errors=True).data.to_dict()
    tags = [*(ours.tags or ()), *(theirs.get("tags") or ())]
    kept = {key: value for key, value in theirs.items() if value and (key in PERSONS or not ours.get(key))}
    merged = {**ours.to_dict(), **kept, "tags": list(dict.fromkeys(map(str, tags)))}
    card.data = ModelCardData(ignore_metadata_errors=True, **merged)
