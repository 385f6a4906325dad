"""The registration of `optimum-cli modegpt`; installed as optimum/commands/register/register_modegpt.py.

optimum-cli imports this file for every command, so it imports nothing that is slow or may be missing.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class ModeGPTCommand(BaseOptimumCLICommand):
    """A command that passes all of its arguments to the package's own command line."""

    COMMAND = CommandInfo(name="modegpt", help="Compress, evaluate and compare language models with MoDeGPT.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Accept every argument unchanged, options included."""
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Run the package's command line and exit with its code."""
        from optimum_modegpt.cli.main import main

        arguments = getattr(self.args, "arguments", None)
        raise SystemExit(main(arguments, program="optimum-cli modegpt"))


REGISTER_COMMANDS = [ModeGPTCommand]
