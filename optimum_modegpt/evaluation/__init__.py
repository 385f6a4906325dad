"""Measure a model, and estimate its compression: perplexity, fidelity, tasks, speed, inspection, estimate."""
