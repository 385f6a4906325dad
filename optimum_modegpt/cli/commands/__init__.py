"""The commands, one module for each: `run` takes the parsed arguments and prints the result."""
