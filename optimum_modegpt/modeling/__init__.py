"""The smaller modules. The files here import only torch, transformers and each other: they are also the remote code."""

DENSE_TYPES = ("llama", "mistral", "opt", "qwen2")
"""The `model_type` of every dense family that has a compressed one."""


def compressed_type(dense: str) -> str:
    """Return the `model_type` of the compressed family, which is also the name of its module."""
    return f"modegpt_{dense}"
