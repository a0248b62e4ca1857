"""Checkpoints are written while the next step runs, and hold the step that asked for them."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from onpath import training
from onpath.config.whole import Config
from onpath.run import checkpoint
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train

Tiny = Callable[..., Config]
OPTIONS = {"optim__steps": 4, "run__save_every": 2, "data__eval": {}}


@pytest.mark.parametrize("lora", [0, 4])
def test_the_next_step_runs_meanwhile_and_changes_nothing(
    lora: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits until the next step has changed all weights."""
    options = OPTIONS | {"student__lora_rank": lora, "optim__lr": 1e-2, "run__keep": 5}
    waited = train(tiny(**options, run__save_in_background=False, run__name="waited"), quiet=True).directory
    real, save_file, done = training.one_step, checkpoint.save_file, threading.Event()

    def one_step(parts: Any, optimizer: Any, step: int) -> Any:
        meter = real(parts, optimizer, step)
        if step == 2:
            done.set()
        return meter

    def late(tensors: Any, path: Path, **options: Any) -> None:
        assert done.wait(60) or "step_4" in str(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(training, "one_step", one_step)
    monkeypatch.setattr(checkpoint, "save_file", late)
    run = train(tiny(**options, run__name="meanwhile"), quiet=True).directory
    for step in ("step_2", "step_4"):
        for name in ("model", "optimizer"):
            one, two = (load_file(r / "checkpoints" / step / f"{name}.safetensors") for r in (waited, run))
            assert one.keys() == two.keys() != set()
            assert all(one[k].equal(two[k]) for k in one)
    changed = [load_file(run / "checkpoints" / s / "model.safetensors") for s in ("step_2", "step_4")]
    assert any(not tensor.equal(changed[1][name]) for name, tensor in changed[0].items())


def test_a_full_disk_is_said_at_the_next_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    config = tiny(**OPTIONS | {"optim__steps": 40, "run__save_every": 20})
    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 20: No space left on device"):
        train(config, quiet=True)
    run = Path(config.run.dir) / config.run.name
    assert len(read_lines(run / "metrics.jsonl")) < 30
    assert not list((run / "checkpoints").iterdir()), "nothing half-written"


def test_no_room_for_its_directory_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may have bytes left and no inodes."""
    real = Path.mkdir

    def full(self: Path, *args: Any, **options: Any) -> None:
        if ".step_2" in self.name:
            raise OSError(28, "No space left on device")
        real(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 2: No space left .* free some"):
        train(tiny(**OPTIONS), quiet=True)


def test_a_run_that_fails_meanwhile_keeps_what_it_was_writing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, save_file = training.one_step, checkpoint.save_file

    def one_step(parts: Any, optimizer: Any, step: int) -> Any:
        if step == 2:
            raise UserError("the server has gone")
        return real(parts, optimizer, step)

    def slow(tensors: Any, path: Path, **options: Any) -> None:
        time.sleep(0.3)
        save_file(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    config = tiny(**OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(training, "one_step", one_step)
        with pytest.raises(UserError, match="the server has gone"):
            train(config, quiet=True)
    run = Path(config.run.dir) / config.run.name
    assert checkpoint.is_sound(run / "checkpoints" / "step_2")
    assert not list((run / "checkpoints").glob(".*"))
    whole = train(tiny(**OPTIONS, run__name="whole"), quiet=True).directory
    one, two = (
        load_file(r / "model" / "model.safetensors") for r in (train(config, quiet=True).directory, whole)
    )
    assert all(one[k].equal(two[k]) for k in one)


@pytest.mark.parametrize("error", [UserError("the grader fails"), RuntimeError("CUDA out of memory")])
def test_a_run_that_fails_saves_its_last_finished_step(
    error: Exception, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the older ones: of a gradient that is not finite they may be the better ones."""
    options = OPTIONS | {"optim__steps": 5, "run__save_every": 2, "run__keep": 1}
    calm = train(tiny(**options, run__name="calm"), quiet=True).directory
    real = training.prepare

    def fails(parts: Any, rollouts: Any, step: int) -> Any:
        if step == 3:
            raise error
        return real(parts, rollouts, step)

    config = tiny(**options)
    with monkeypatch.context() as patch:
        patch.setattr(training, "prepare", fails)
        with pytest.raises(type(error), match=str(error)):
            train(config, quiet=True)
    run = Path(config.run.dir) / config.run.name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_2", "step_3"]
    train(config, quiet=True)
    one, two = (load_file(r / "model" / "model.safetensors") for r in (calm, run))
    assert all(one[name].equal(two[name]) for name in one)
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
