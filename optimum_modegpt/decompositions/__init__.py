"""Pure torch: second moments and weights in, smaller weights out. No module, no model, no file."""
