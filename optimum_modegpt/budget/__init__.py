"""The cost of a compression: work, memory, placement, and the refusal before the start if something does not fit."""
