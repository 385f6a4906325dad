"""The model card: README.md of a result folder, written only from the files in that folder."""

from optimum_modegpt.hub.card.contents import EVALUATION, REPORT, check_evaluation, weights_digest
from optimum_modegpt.hub.card.write import (
    CARD,
    MARK,
    PICTURE,
    add_evaluation,
    is_ours,
    save_report,
    take_along,
    write_card,
)

__all__ = [
    "CARD",
    "EVALUATION",
    "MARK",
    "PICTURE",
    "REPORT",
    "add_evaluation",
    "check_evaluation",
    "is_ours",
    "save_report",
    "take_along",
    "weights_digest",
    "write_card",
]
