"""The layouts of a result: which widths may differ between parts and blocks, and the checkpoint that holds them."""
