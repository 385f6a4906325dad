"""Serving engines: which of them run a model, and the plugins that they import."""
