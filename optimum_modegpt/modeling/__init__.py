"""The smaller modules. The files here import only torch, transformers and each other: they are also the remote code."""

DENSE_TYPES = ("llama", "mistral", "opt", "qwen2")
"""The `model_type` of every dense family that has a compressed one."""
