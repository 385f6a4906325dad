"""Result folders and the Hub: atomic output, the model card, uploads."""
