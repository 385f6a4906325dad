"""The commands, a module each: `add` declares its arguments, `run` takes the parsed ones and does it.

`run` prints the result, raises what goes wrong, and may return an exit code.
"""

from optimum_modegpt.integration.commands import (
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
"""In the order in which the help lists them."""
