"""Prepare the calibration text, run it through a model, and accumulate moments of the activations."""
