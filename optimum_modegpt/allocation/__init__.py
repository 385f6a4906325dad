"""Decide how much to remove from each part of each block. Uses numbers only, no tensors of a model."""
