"""Several processes, of which one fails: the last finished step is saved, and all say the same."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath import training
from onpath.config.whole import Config
from onpath.methods.opd import OPD
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.forks import TIMEOUT, done_by_two, forked
from tests.system.test_sharded_runs import state_of

Tiny = Callable[..., Config]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("shard", "where"), [("none", "prepare"), ("layer", "prepare"), ("layer", "loss"), ("step", "loss")]
)
def test_the_last_step_is_saved_whichever_process_fails(
    rank: int, shard: str, where: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Of shards all rows of it, wherever in a step one fails and the others hear of it. A lack of memory is
    told like any sentence."""
    options = {"data__eval": {}, "parallel__timeout": TIMEOUT, "optim__steps": 4, "teacher__device": "auto"}
    config = tiny(**options, run__save_every=0, parallel__shard=shard)
    whole = tiny(**options, run__save_every=0, parallel__shard=shard, run__name="whole")
    ends = UserError("cannot allocate") if where == "prepare" else RuntimeError("can't allocate memory")

    def fails(here: int) -> None:
        place, name = (OPD, "prepare") if where == "prepare" else (training, "loss_of")
        known, calls = getattr(place, name), itertools.count()

        def failing(*given: Any, **named: Any) -> Any:
            if here == rank and next(calls) == 2:
                raise ends
            return known(*given, **named)

        setattr(place, name, failing)
        train(config, quiet=True)

    begun = time.monotonic()
    for code, _, err in forked(fails, tmp_path):
        assert code == 2
        assert "allocate" in err
    assert time.monotonic() - begun < 2 / 3 * TIMEOUT, "nobody waits for an exchange to time out"
    directory = Path(config.run.dir) / config.run.name
    assert [path.name for path in (directory / "checkpoints").glob("step_*")] == ["step_2"]
    for each in (config, whole):
        done_by_two(lambda _, each=each: train(each, quiet=True), tmp_path)
    assert [row["step"] for row in read_lines(directory / "metrics.jsonl")] == [1, 2, 3, 4]
    went_on, undisturbed = (state_of(Path(c.run.dir) / c.run.name, 4) for c in (config, whole))
    assert all(torch.equal(went_on[name], undisturbed[name]) for name in undisturbed)
