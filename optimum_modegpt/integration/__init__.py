"""Where transformers, Optimum and the shell meet the walk: keyword, quantizer, commands."""
