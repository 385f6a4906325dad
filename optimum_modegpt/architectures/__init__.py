"""The supported model families, and their blocks by role. Other packages do not use names such as q_proj."""

from optimum_modegpt.architectures.block import Block
from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.architectures.families import FAMILIES, family_of
from optimum_modegpt.architectures.resolve import Architecture, check_dense, check_model_type, read_blocks, resolve

__all__ = [
    "FAMILIES",
    "Architecture",
    "Block",
    "FamilyClasses",
    "check_dense",
    "check_model_type",
    "family_of",
    "read_blocks",
    "resolve",
]
