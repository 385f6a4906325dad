"""Serving engines: which of them run a model, and how."""
