"""The commands, one module for each: `run` takes the parsed arguments and runs the command.

`run` prints the result, raises an exception on an error, and may return an exit code. The arguments are declared in
`optimum_modegpt.cli.arguments`, in modules of the same names.
"""
