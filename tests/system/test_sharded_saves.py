"""Checkpoints in shards: whoever wrote one, whoever reads it, and whoever was killed meanwhile."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onpath import export_model, training
from onpath.config.whole import Config
from onpath.engines.sharding import local
from onpath.run import checkpoint, directory
from onpath.run.assemble import assemble
from onpath.run.opening import open_run
from onpath.run.optimizer import make_optimizer
from onpath.system import distributed
from onpath.training import train
from tests.forks import done_by_all, done_by_two, forked, free_ports
from tests.system.test_sharded_runs import OPTIM, SHARDED, state_of

Tiny = Callable[..., Config]
State = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    **OPTIM,
    **SHARDED,
    "data__eval": {},
    "rollout__prompts": 4,
    "rollout__max_new_tokens": 6,
    "optim__schedule": "constant",  # so that a longer run begins as a shorter one
    "optim__warmup": 0.0,
    "run__save_every": 1,
    "run__keep": 5,
}
STATES: dict[str, Any] = {
    **SMALL,
    "method__name": "opsd",
    "method__weights": "ema",
    "method__ema_decay": 0.5,
    "rollout__overlap": True,
}
"""With everything that a checkpoint may hold."""


def same(one: State, two: State) -> bool:
    """Bit by bit."""
    assert one.keys() == two.keys() != set()
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def saved_again(config: Config) -> None:
    """What a run finds when it goes on takes the place of its checkpoint, and moves while that is written."""
    real, moved = checkpoint.save_file, threading.Event()

    def late(*args: Any, **options: Any) -> None:
        assert moved.wait(60)
        real(*args, **options)

    with distributed.one_fate():
        parts = assemble(config)
        with closing(open_run(config, parts)) as run:
            student, extra = parts.models.student, run.state()
            optimizer, _ = make_optimizer(config, student)
            step, root = run.resume(optimizer), run.directory / "checkpoints"
            checkpoint.save_file = late  # type: ignore[assignment]
            saving = checkpoint.save(root, step=step, model=student, optimizer=optimizer, extra=extra)
            moments = [value for state in optimizer.state.values() for value in state.values()]
            with torch.no_grad():
                for tensor in (*student.parameters(), *moments, *extra.values()):
                    local(tensor).add_(1.0)
            moved.set()
            saving.wait()
            distributed.barrier()


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"parallel__shard": "step"}),
    (3, {}),  # one has no rows of an adapter
    (4, {"parallel__hosts": 2}),
    (2, {}),
    (1, {}),
]


@pytest.mark.parametrize("lora", [0, 4])
def test_a_state_stays_as_it_is_whoever_reads_and_writes_it(lora: int, tiny: Tiny, tmp_path: Path) -> None:
    """From one process through every layout, and back. What moves meanwhile does not reach the files."""
    options = {**STATES, "optim__steps": 1, "student__lora_rank": lora}
    run = train(tiny(**options), quiet=True).directory
    shutil.rmtree(run / "model")
    begun = state_of(run, 1)
    assert {name.split(".")[0] for name in begun} == {"model", "optimizer", "method"}
    for world, layout in LAYOUTS:
        config = tiny(**{**options, **layout})
        done_by_all(lambda _, config=config: saved_again(config), tmp_path, world=world)
        assert len(list((run / "checkpoints" / "step_1").glob("model*"))) == world
        assert same(begun, state_of(run, 1)), (world, layout)


CUT = ("model-1-of-2", "method-2-of-2")


def test_a_file_that_is_cut_off_is_passed_over_and_the_older_ones_go_on(tiny: Tiny, tmp_path: Path) -> None:
    """To the same end, in which weights that sample ahead and an average have a part; what was saved is what
    one process exports."""

    def goes_on(port: str, name: str, steps: int) -> None:
        os.environ["MASTER_PORT"] = port
        train(tiny(**{**STATES, "optim__steps": steps}, run__name=name), quiet=True)

    ports, runs = free_ports(2 + len(CUT)), tmp_path / "runs"
    done_by_two(lambda _: [goes_on(ports[0], "whole", 4), goes_on(ports[1], "cut", 3)], tmp_path)
    for name in CUT:
        shutil.copytree(runs / "cut", runs / name)
        shutil.rmtree(runs / name / "model")
        (runs / name / "config.yaml").unlink()  # which has the run's name
        path = runs / name / "checkpoints" / "step_3" / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    done_by_two(lambda _: [goes_on(p, n, 4) for p, n in zip(ports[2:], CUT, strict=True)], tmp_path)
    whole = state_of(runs / "whole", 4)
    for name in CUT:
        assert checkpoint.is_sound(runs / name / "checkpoints" / "step_3"), "written again"
        assert same(whole, state_of(runs / name, 4)), name
    exported = export_model(runs / "whole" / "checkpoints" / "step_4", tmp_path / "exported")
    assert same(*(load_file(d / "model.safetensors") for d in (exported, runs / "whole" / "model")))


PLACES: dict[str, tuple[Any, tuple[str, str], int]] = {
    "in the model's file": (checkpoint, ("save_file", "save_file"), 4),
    "in the optimiser's file": (checkpoint, ("save_file", "save_file"), 5),
    "in a digest": (checkpoint, ("_digest", "_digest"), 5),
    "at the end of a save": (checkpoint.Saving, ("_finish", "_tell"), 2),
    "before a gradient": (training, ("loss_of", "loss_of"), 2),
    "before the hand-over": (training, ("hand_over", "hand_over"), 2),
}
"""Owner, name by rank, and which call of it is the last, in the second step or its checkpoint."""


def is_killed(rank: int, place: str, config: Config) -> None:
    owner, names, last = PLACES[place]
    real, calls = getattr(owner, names[rank]), []
    first = Path(config.run.dir) / config.run.name / "checkpoints" / "step_1"

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            while not first.is_dir():  # it is written in the background
                time.sleep(0.01)
            if names[rank] == "save_file":
                args[1].write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(owner, names[rank], counted)
    train(config, quiet=True)


@pytest.fixture(scope="module")
def kept() -> State:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_is_killed_loses_nothing_finished(
    place: str, tiny: Tiny, kept: State, tmp_path: Path
) -> None:
    """The other one says so, and the same command goes on bit by bit."""
    configs = [tiny(**{**SMALL, "optim__steps": 3}, run__name=name) for name in ("first", "second", "whole")]
    roots = [Path(config.run.dir) / config.run.name for config in configs]

    def run(rank: int, victim: int) -> None:
        distributed._HEARD = distributed._ANSWERED = directory._PARTS_WRITTEN = 1.0
        if rank == victim:
            is_killed(rank, place, configs[victim])
        train(configs[victim], quiet=True)

    for victim, root in enumerate(roots[:2]):
        ended = forked(lambda rank, victim=victim: run(rank, victim), tmp_path)
        survivor, said = ended[1 - victim][0], ended[1 - victim][2]
        assert (ended[victim][0], survivor) == (-signal.SIGKILL, 2)
        assert "onpath: another process of this run has ended before its time" in said
        assert [path.name for path in checkpoint.list_steps(root / "checkpoints")] == ["step_1"]
    left = configs[: 2 if kept else 3]
    ports = free_ports(len(left))

    def again(_: int) -> None:
        for port, config in zip(ports, left, strict=True):
            os.environ["MASTER_PORT"] = port
            train(config, quiet=True)

    done_by_two(again, tmp_path)
    kept |= {} if kept else state_of(roots[2], 3)
    for root in roots[:2]:
        assert same(kept, state_of(root, 3)), root.name
        assert not list((root / "checkpoints").glob(".*"))
