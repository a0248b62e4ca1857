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
from onpath.run import checkpoint
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


@pytest.mark.parametrize("save_every", [0, 1])
def test_nobody_leaves_before_it_has_its_name(save_every: int, tiny: Tiny, tmp_path: Path) -> None:
    """Four processes, of which all but two have no exchange with the one that fails, and a slow disk; a
    launcher ends the rest when one has ended."""
    options = {"data__eval": {}, "parallel__timeout": TIMEOUT, "optim__steps": 4, "teacher__device": "auto"}
    config = tiny(**options, run__save_every=save_every, parallel__shard="layer", rollout__prompts=8)
    last = Path(config.run.dir) / config.run.name / "checkpoints" / "step_2"

    def fails(here: int) -> None:
        prepare, finish, write = OPD.prepare, checkpoint.Saving._finish, checkpoint.Saving._write

        def failing(self: Any, rollouts: Any, *, step: int) -> Any:
            if here == 0 and step == 2:
                raise UserError("this one cannot go on")
            return prepare(self, rollouts, step=step)

        def slowly(real: Any) -> Any:
            return lambda *given: time.sleep(0.5) or real(*given)

        OPD.prepare = failing  # type: ignore[method-assign]
        checkpoint.Saving._finish = slowly(finish)  # type: ignore[method-assign]
        checkpoint.Saving._write = slowly(write)  # type: ignore[method-assign]
        try:
            train(config, quiet=True)
        finally:
            print("named" if last.is_dir() else "without a name", flush=True)

    begun = time.monotonic()
    for code, out, err in forked(fails, tmp_path, world=4):
        assert code == 2
        assert "this one cannot go on" in err
        assert out == "named\n"
    assert time.monotonic() - begun < TIMEOUT
