"""Command lines: what is wrong with one, in one sentence."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Exit code 2 and one sentence in place of the usage; its subcommands' parsers are the same."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        self.exit(2, f"onpath: {message} (`{self.prog} --help` shows what there is)\n")
