"""The smaller modules. The files here import only torch, transformers and each other: they are also the remote code."""
