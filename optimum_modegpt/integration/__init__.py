"""Integration with transformers, Optimum and the command line."""
