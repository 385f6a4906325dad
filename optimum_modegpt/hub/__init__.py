"""Result folders and the Hub: reading results, the model card, uploads."""
