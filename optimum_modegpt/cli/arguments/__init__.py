"""The arguments of the commands, one module for each command: `add` declares them.

None of these modules imports torch or transformers, so help and argument errors are printed at once. The modules of
the same names in `optimum_modegpt.cli.commands` run the commands.
"""

from optimum_modegpt.cli.arguments import (
    benchmark,
    compare,
    compress,
    demo,
    estimate,
    evaluate,
    inspect,
    recover,
)

COMMANDS = (compress, evaluate, compare, benchmark, recover, inspect, estimate, demo)
"""The modules of the commands, in the order in which the help lists them."""
