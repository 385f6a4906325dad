"""Load models strictly, from names, folders or the Hub, and register the classes with transformers."""
