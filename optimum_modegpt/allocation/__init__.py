"""How much to remove where: pure numbers, no tensors of a model."""
