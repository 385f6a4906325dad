"""Other people's README files on the Hub: which of them a card of ours may replace, and what of them stays."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = "This model card has been automatically generated."
"""A sentence of the card that transformers writes for a model about which it knows nothing."""
TO_FILL = "[More Information Needed]"
UNTOUCHED = 35
"""The template has about forty places to be filled; a person who has filled some has written a card."""
TRAINER = "This model card has been generated automatically according to the information the Trainer had access to"
"""In a comment that asks to be removed by whoever has read the card of `Trainer`."""
PERSONS = ("license", "license_name", "license_link", "language")
"""What a header that is there already knows better than we do."""


def is_template(text: str) -> bool:
    """Whether nobody wrote this README: a header alone, the template of transformers, or the card of `Trainer`."""
    untouched = TEMPLATE in text and text.count(TO_FILL) >= UNTOUCHED
    return untouched or TRAINER in text or not ModelCard(text, ignore_metadata_errors=True).text.strip()


def merge_header(card: ModelCard, there: str) -> None:
    """Puts what the header of another README says, licence and tags for some, into that of a card."""
    ours: Any = card.data
    theirs: dict[str, Any] = ModelCard(there, ignore_metadata_errors=True).data.to_dict()
    tags = [*(ours.tags or ()), *(theirs.get("tags") or ())]
    kept = {key: value for key, value in theirs.items() if value and (key in PERSONS or not ours.get(key))}
    merged = {**ours.to_dict(), **kept, "tags": list(dict.fromkeys(map(str, tags)))}
    card.data = ModelCardData(ignore_metadata_errors=True, **merged)
