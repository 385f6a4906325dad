"""MoDeGPT for Transformers and Optimum."""
