"""A run killed with SIGKILL and started again ends as if it had never been killed."""

import json
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.run import checkpoint
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.forks import begun, ended


def start(config_file: Path) -> BaseProcess:
    """`onpath train`, writing checkpoints slowly, so that a kill can land in the middle of one."""
    whole = checkpoint.save_file

    def slow(tensors: Any, path: Path, **options: Any) -> None:
        half = Path(f"{path}.part")
        whole(tensors, half, **options)
        data = half.read_bytes()
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(0.15)
            file.write(data[len(data) // 2 :])
        half.unlink()

    def run() -> int:
        checkpoint.save_file = slow  # type: ignore[assignment]
        return main(["train", str(config_file), "--quiet"])

    return begun(run)


def killed_when(moment: Callable[[], bool], config_file: Path) -> None:
    """Starts the run, and kills it at the moment, which must come before its end."""
    process = start(config_file)
    while process.is_alive() and not moment():
        time.sleep(0.005)
    process.kill()
    assert ended(process) == -signal.SIGKILL, "the kill must land before the run ends, or this proves nothing"


def written(config: Config, tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / f"{config.run.name}.yaml"
    path.write_text(config.to_yaml())
    return path, Path(config.run.dir) / config.run.name


def rows(run: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_killed_runs_end_like_the_one_that_was_not(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """With a moving average as teacher, whose state must come back too."""
    options = {
        "optim__steps": 6,
        "run__save_every": 2,
        "run__trajectories_every": 2,
        "eval__every": 3,
        "eval__start": True,
        "run__threads": 1,
        "method__name": "opsd",
        "method__weights": "ema",
        "method__ema_decay": 0.5,
    }
    whole_file, whole = written(tiny(**options, run__name="whole"), tmp_path)
    killed_file, killed = written(tiny(**options, run__name="killed"), tmp_path)
    assert ended(start(whole_file)) == 0
    for moment in (
        lambda: bool(list((killed / "checkpoints").glob(".step_2.tmp*"))),  # while a checkpoint is written
        lambda: len(rows(killed)) >= 3,  # between checkpoints: steps to do again
        lambda: bool(list((killed / "checkpoints").glob(".step_6.tmp*"))),  # the last checkpoint
    ):
        killed_when(moment, killed_file)
    assert ended(start(killed_file)) == 0
    assert rows(killed) == rows(whole)
    assert [r["step"] for r in rows(whole)] == [1, 2, 3, 4, 5, 6]
    assert (killed / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    one, two = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert one.keys() == two.keys()
    assert all(one[k].equal(two[k]) for k in one)
    for name in ("model", "optimizer", "method"):
        states = [
            load_file(run / "checkpoints" / "step_6" / f"{name}.safetensors") for run in (whole, killed)
        ]
        assert all(states[0][k].equal(states[1][k]) for k in states[0])
    assert not list((killed / "checkpoints").glob(".*")), "nothing half-written may stay"


@pytest.fixture
def stopped(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run that stopped after step 4 of 6 with checkpoints of steps 2 and 4."""
    import onpath.training as module

    config = tiny(optim__steps=6, run__save_every=2)
    real = module.one_step

    def until_four(parts: object, optimizer: object, step: int) -> object:
        if step == 4:
            raise KeyboardInterrupt
        return real(parts, optimizer, step)

    monkeypatch.setattr(module, "one_step", until_four)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.setattr(module, "one_step", real)
    return config


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:-9]),
    "one byte": lambda c: (c / "optimizer.safetensors").write_bytes(
        (c / "optimizer.safetensors").read_bytes()[:-1] + b"\x7f"
    ),
    "missing": lambda c: (c / "method.safetensors").unlink(),
    "no state": lambda c: (c / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, stopped: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Path(stopped.run.dir) / stopped.run.name / "checkpoints"
    DAMAGE[damage](checkpoints / "step_4")
    result = train(stopped)
    said = capsys.readouterr().err
    assert "step_4 is damaged" in said
    assert "step 2" in said
    assert [r["step"] for r in read_lines(result.directory / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_no_readable_checkpoint_is_said(stopped: Config) -> None:
    checkpoints = Path(stopped.run.dir) / stopped.run.name / "checkpoints"
    for step in checkpoints.glob("step_*"):
        (step / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"none of its checkpoints is readable \(step_4, step_2\)"):
        train(stopped, quiet=True)


def test_old_checkpoints_are_removed(tiny: Callable[..., Config]) -> None:
    result = train(tiny(optim__steps=5, run__save_every=1, run__keep=2), quiet=True)
    assert sorted(p.name for p in (result.directory / "checkpoints").iterdir()) == ["step_4", "step_5"]


def test_another_config_in_the_directory_is_refused(tiny: Callable[..., Config]) -> None:
    train(tiny(), quiet=True)
    with pytest.raises(UserError, match=r"another config \(optim\.lr: 0\.001 there, 0\.002 here"):
        train(tiny(optim__lr=2e-3), quiet=True)


def test_a_finished_run_is_not_trained_again(tiny: Callable[..., Config]) -> None:
    first = train(tiny(), quiet=True)
    before = (first.directory / "metrics.jsonl").read_bytes()
    again = train(tiny(), quiet=True)
    assert again == first
    assert (first.directory / "metrics.jsonl").read_bytes() == before
    assert json.loads((first.directory / "environment.json").read_text())["seeds"] == {"run": 0, "eval": 1234}
