"""What a model is worth and what compressing it would take: perplexity, fidelity, inspection, estimate."""
