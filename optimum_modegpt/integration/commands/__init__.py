"""The commands, a module each: `run` takes the parsed arguments and does it.

`run` prints the result, raises what goes wrong, and may return an exit code. The arguments are declared in
`optimum_modegpt.integration.arguments`, in modules of the same names.
"""
