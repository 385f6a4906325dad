"""The compressed model classes. The files here import only torch, transformers and each other: they are remote code."""

from pkgutil import iter_modules

SHARED_FILES = (
    "modegpt_attention",
    "modegpt_blocks",
    "modegpt_common",
    "modegpt_config",
    "modegpt_contract",
    "modegpt_experts",
    "modegpt_family",
    "modegpt_files",
)
"""The modules that all families use."""

OTHER_FILES = ("modegpt_scores",)
"""The modules that some families use."""

DENSE_TYPES = tuple(
    sorted(
        module.name.removeprefix("modegpt_")
        for module in iter_modules(__path__)
        if module.name.startswith("modegpt_") and module.name not in (*SHARED_FILES, *OTHER_FILES)
    )
)
"""The `model_type` of every dense family that has a compressed one. Each is described by the file of its name."""
