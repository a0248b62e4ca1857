"""What the processes of a study do. Importing this imports all that a run needs, and does nothing else."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  (slow to import, and always needed)

from onpath import config as configuration
from onpath.commands.study.untrained import adapter_of
from onpath.config.whole import Config
from onpath.engines import adapters
from onpath.run.assemble import assemble
from onpath.run.evaluation import evaluate_all
from onpath.run.log import Display
from onpath.run.opening import open_run
from onpath.system import distributed
from onpath.system.errors import guarded
from onpath.training import train


def trained(config: Path) -> int:
    """A config's run, to its end; the exit code of `onpath train`."""

    def run() -> None:
        train(configuration.load(config), quiet=True)

    return guarded(run)


def untrained(config: Path) -> int:
    """The evaluation of a config's student as it is; the exit code."""
    return guarded(lambda: evaluate_untrained(configuration.load(config)))


def evaluate_untrained(config: Config) -> None:
    """Writes the lines and files of an evaluation at step 0, in place of half-written ones."""
    with distributed.one_fate():
        parts = assemble(config)
        run = open_run(config, parts)
        if distributed.rank() == 0:
            run.evals.rewind(step=-1)
        if (adapter := adapter_of(config)) is not None:
            adapters.load(parts.models.student, adapter)
        parts.generators.student.sync_weights(0)
        with Display(steps=0, done=0, quiet=True) as display:
            evaluate_all(parts, run, display, step=0)
