"""`python -m optimum_modegpt`: the same as `optimum-cli modegpt`."""

import sys

from optimum_modegpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
