"""The command line: `optimum-cli modegpt` and `python -m optimum_modegpt`."""
