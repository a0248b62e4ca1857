"""`python -m onpath.study.untrained CONFIG`: evaluates a config's student as it is."""

import sys

from onpath import config as configuration
from onpath import distributed
from onpath.assemble import assemble
from onpath.config import Config
from onpath.errors import UserError
from onpath.log import Display
from onpath.runs import evaluate_all, open_run


def evaluate_untrained(config: Config) -> None:
    """Writes the lines and files of an evaluation at step 0, in place of half-written ones."""
    try:
        parts = assemble(config)
        run = open_run(config, parts)
        run.evals.rewind(step=-1)
        parts.engine.sync_weights(0)
        with Display(steps=0, done=0, quiet=True) as display:
            evaluate_all(parts, run, display, step=0)
    finally:
        distributed.stop()


if __name__ == "__main__":
    try:
        evaluate_untrained(configuration.load(sys.argv[1]))
    except UserError as error:
        print(f"onpath: {error}", file=sys.stderr)
        sys.exit(2)
