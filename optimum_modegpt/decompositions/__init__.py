"""Pure torch functions from second moments and weights to smaller weights. They use no module, model or file."""
