"""Stopped anywhere, damaged anyhow, out of space: the same command goes on to the same end.

`test_kill.py` kills real processes; here a run is stopped at chosen places, so that each is sure to be hit.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.run import checkpoint, log
from onpath.run.assemble import assemble
from onpath.run.log import JsonLines, read_lines
from onpath.run.optimizer import make_optimizer
from onpath.system.errors import UserError
from onpath.training import train
from tests.families.plain import pair

Tiny = Callable[..., Config]
OPTIONS: dict[str, Any] = {
    "optim__steps": 4,
    "run__save_every": 2,
    "run__trajectories_every": 1,
    "eval__start": True,
    "eval__every": 2,
    "student__lora_rank": 4,
    "student__lora_merge": True,
    "method__cosine_every": 0,
}


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run by what it says; times left out."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if name in ("config.yaml", "environment.jsonl"):
            continue  # the run's name; a line per process
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(path)]
        elif path.suffix == ".safetensors":
            found[name] = {k: v.tolist() for k, v in load_file(path).items()}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def whole(tiny: Tiny, kept: dict[str, Any]) -> dict[str, Any]:
    """What a run that was never stopped leaves: made once."""
    if not kept:
        kept |= contents(train(tiny(run__name="whole", **OPTIONS), quiet=True).directory)
    return kept


class Stopped(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def stop_at(monkeypatch: pytest.MonkeyPatch, where: str, name: str, *, call: int, after: bool) -> None:
    """The `call`-th call of a function does its work or not, and then the run stops."""
    owner: Any = (
        import_module(where) if not where.endswith("Run") else import_module("onpath.run.directory").Run
    )
    real, calls = getattr(owner, name), []

    def stopping(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            if after:
                real(*args, **named)
            raise Stopped
        return real(*args, **named)

    monkeypatch.setattr(owner, name, stopping)


PLACES = {
    "before the first evaluation": ("onpath.training", "evaluate_all", 1, False),
    "after the first evaluation": ("onpath.training", "evaluate_all", 1, True),
    "in the first step": ("onpath.training", "sample", 1, True),
    "before the third step's gradient": ("onpath.training", "loss_of", 3, False),
    "after a step, before its line": ("onpath.training", "one_step", 3, True),
    "after a line": ("onpath.run.directory.Run", "log", 3, True),
    "between parquet and checkpoint": ("onpath.training", "store_step", 2, True),
    "in a checkpoint, after one file": ("onpath.run.checkpoint", "save_file", 2, True),
    "in a checkpoint, before its rename": ("onpath.system.files", "_sync", 1, True),
    "after a checkpoint, before the old ones go": ("onpath.run.checkpoint", "prune", 1, False),
    "before the last checkpoint": ("onpath.run.directory.Run", "checkpoint", 2, False),
    "after the last checkpoint": ("onpath.run.directory.Run", "checkpoint", 2, True),
    "between merged and adapter": ("onpath.run.directory.Run", "_save", 2, False),
    "after the model": ("onpath.run.directory.Run", "_save", 2, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_stopped_anywhere_and_started_again(
    place: str, tiny: Tiny, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, call, after = PLACES[place]
    config = tiny(run__name="stopped", **OPTIONS)
    with monkeypatch.context() as patch:
        stop_at(patch, where, name, call=call, after=after)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    directory = train(config, quiet=True).directory
    found = contents(directory)
    assert sorted(found) == sorted(whole), "files too many or too few"
    for file, content in whole.items():
        assert found[file] == content, file


def test_what_a_killed_writer_left_is_removed(tiny: Tiny, whole: dict[str, Any]) -> None:
    config = tiny(run__name="left", **OPTIONS)
    run = Path(config.run.dir) / "left"
    for name in (
        "trajectories/.step_000001.parquet.tmp-77",
        "evals/.test_step_000000.jsonl.tmp-77",
        "checkpoints/.step_2.tmp-77/model.safetensors",
        ".metrics.jsonl.tmp-77",
        ".model.tmp-77/config.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    train(config, quiet=True)
    assert sorted(contents(run)) == sorted(whole)
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_as_asked_for(keep: int, tiny: Tiny) -> None:
    config = tiny(optim__steps=5, run__save_every=1, run__keep=keep, data__eval={})
    directory = train(config, quiet=True).directory / "checkpoints"
    assert sorted(p.name for p in directory.iterdir()) == [f"step_{i}" for i in range(6 - keep, 6)]


# Damage.


def test_no_flipped_byte_goes_unseen(tiny: Tiny) -> None:
    """Of state.json every byte is tried, of the tensors sixty each."""
    run = train(tiny(data__eval={}), quiet=True).directory
    path, draw = run / "checkpoints" / "step_3", random.Random(0)
    state = checkpoint._verified(path)
    assert state is not None
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        tensors = file.suffix == ".safetensors"
        places = [draw.randrange(len(whole)) for _ in range(60)] if tensors else range(len(whole))
        for place in places:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            found = checkpoint._verified(path)
            assert found is None or (not tensors and found == state), f"{file.name}, byte {place}"
        file.write_bytes(whole)
    assert checkpoint._verified(path) == state


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", "{}", '{"step": 3}', '{"step": 3, "blake2b": {}}', '{"step": 3, "blake2b": []}'],
)
def test_a_state_that_says_nothing_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_3" / "state.json").write_text(text)
    assert checkpoint._verified(tmp_path / "step_3") is None


def test_a_checkpoint_under_another_name_is_not_believed(tiny: Tiny) -> None:
    """A copy of step 2 as step 9 would skip steps and claim they were done."""
    config = tiny(data__eval={}, run__save_every=2, optim__steps=2)
    checkpoints = train(config, quiet=True).directory / "checkpoints"
    shutil.copytree(checkpoints / "step_2", checkpoints / "step_9")
    parts = assemble(config)
    optimizer, _ = make_optimizer(parts.config, parts.models.student)
    loaded = checkpoint.load(checkpoints, model=parts.models.student, optimizer=optimizer, extra={})
    assert loaded is not None
    assert (loaded.step, loaded.broken) == (2, ("step_9",))


def test_another_models_checkpoint_is_refused(tiny: Tiny) -> None:
    config = tiny(data__eval={}, optim__steps=1)
    checkpoints = train(config, quiet=True).directory / "checkpoints"
    parts = assemble(tiny(student__lora_rank=2))
    with pytest.raises(UserError, match="holds other weights than this model trains"):
        checkpoint.load(
            checkpoints,
            model=parts.models.student,
            optimizer=make_optimizer(parts.config, parts.models.student)[0],
            extra={},
        )


def test_optimiser_moments_come_back(tiny: Tiny) -> None:
    config = tiny(data__eval={})
    checkpoints = train(config, quiet=True).directory / "checkpoints"
    parts = assemble(config)
    optimizer, _ = make_optimizer(parts.config, parts.models.student)
    checkpoint.load(checkpoints, model=parts.models.student, optimizer=optimizer, extra={})
    saved = load_file(checkpoints / "step_3" / "optimizer.safetensors")
    named = dict(parts.models.student.named_parameters())
    assert {f"{k}.{n}" for n, p in named.items() for k in optimizer.state[p]} == set(saved)
    for name, p in named.items():
        assert int(optimizer.state[p]["step"]) == 3
        assert torch.equal(optimizer.state[p]["exp_avg"], saved[f"exp_avg.{name}"])
        assert float(saved[f"exp_avg_sq.{name}"].max()) > 0


# No space.


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: 28")])
def test_no_space_for_the_model(
    error: Exception, tiny: Tiny, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(run__name="full", **OPTIONS)
    run = Path(config.run.dir) / "full"
    peft = import_module("peft").PeftModel

    def full(self: Any, target: Path, **_: Any) -> None:
        Path(target).mkdir(parents=True)
        (Path(target) / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(peft, "save_pretrained", full)
        with pytest.raises(
            UserError, match=r"model: cannot write: .*; free some space and start the same command"
        ):
            train(config, quiet=True)
    assert not (run / "model").exists()
    assert not list(run.glob(".*")), "nothing half-written may stay"
    found = contents(train(config, quiet=True).directory)
    assert {k: found.get(k) for k in whole} == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 700 kB; skipped where we may not mount."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(path)]
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("no mount")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # what still holds a file there lets go later


def test_a_disk_that_really_fills_up(
    tiny: Tiny, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(optim__steps=6, run__save_every=1, run__keep=9, run__dir=str(small_disk), data__eval={})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert main(["train", str(file), "--quiet"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("onpath: ")
    assert "\n" not in said
    assert "space" in said
    run = small_disk / config.run.name
    steps = checkpoint.list_steps(run / "checkpoints")
    assert steps, "the disk must hold one checkpoint, or nothing is proved"
    assert all(checkpoint._verified(p) for p in steps)
    assert not (run / "model").exists()
    assert not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=9M", str(small_disk)], check=True)
    assert main(["train", str(file), "--quiet"]) == 0
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    elsewhere = tiny(optim__steps=6, run__save_every=0, run__name="elsewhere", data__eval={})
    expected = load_file(train(elsewhere, quiet=True).model / "model.safetensors")
    found = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_lines_that_cannot_be_written_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        lines.write({"step": step, "text": "a\u2028b\x85c"})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space"):
            lines.rewind(step=1)
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space"):
            lines.write({"step": 3})
    assert [row["step"] for row in read_lines(lines.path)] == [1, 2]
    assert read_lines(lines.path)[0]["text"] == "a\u2028b\x85c", "only a line feed ends a line"
    with lines.path.open("ab") as file:
        file.write('{"step": 3, "text": "ü'.encode()[:-1])  # killed in the middle of a letter
    lines.rewind(step=9)
    assert [row["step"] for row in read_lines(lines.path)] == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# Before the directory is made.


def test_a_refused_run_leaves_no_directory_behind(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the corrected command would meet the directory of another config."""
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    config = tiny(run__trackers=["wandb"], data__eval={})
    with pytest.raises(UserError, match=r"wandb is not installed: pip install wandb"):
        train(config, quiet=True)
    assert not Path(config.run.dir).exists()
    with pytest.raises(UserError, match="only 3 training prompts"):
        train(tiny(data__limit=3), quiet=True)
    assert not Path(config.run.dir).exists()
    train(tiny(data__eval={}), quiet=True)


def test_trackers_are_closed_even_if_the_run_fails(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Fake:
        def __init__(self, directory: Path, name: str, config: Any) -> None:
            seen.append(name)

        def log(self, values: Any, step: int) -> None:
            seen.append(f"{step}: {'loss' in values}")

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(log._TRACKERS, "tensorboard", Fake)
    stop_at(monkeypatch, "onpath.training", "one_step", call=3, after=False)
    with pytest.raises(Stopped):
        train(tiny(run__trackers=["tensorboard"], data__eval={}), quiet=True)
    assert seen == ["tiny", "1: True", "2: True", "closed"]


def test_a_tracker_that_fails_ends_no_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Down:
        def __init__(self, directory: Path, name: str, config: Any) -> None:
            self.asked = 0

        def log(self, values: Any, step: int) -> None:
            raise RuntimeError("no route to host")

        def close(self) -> None:
            raise AssertionError("it is left out")

    monkeypatch.setitem(log._TRACKERS, "tensorboard", Down)
    run = train(tiny(run__trackers=["tensorboard"], data__eval={}), quiet=True)
    assert len(read_lines(run.directory / "metrics.jsonl")) == 3
    said = "run.trackers: Down fails (RuntimeError: no route to host) and is left out"
    assert capfd.readouterr().err.count(said) == 1


def test_a_tracker_that_ends_the_process_ends_no_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def down(*_: Any) -> None:
        raise SystemExit("no key")

    monkeypatch.setitem(log._TRACKERS, "tensorboard", down)
    assert train(tiny(run__trackers=["tensorboard"], data__eval={}), quiet=True).model.is_dir()
    assert "run.trackers: tensorboard fails (SystemExit: no key) and is left out" in capfd.readouterr().err


@pytest.mark.parametrize("when", ["__init__", "close"])
def test_a_tracker_that_cannot_begin_or_end_ends_no_run(
    when: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Down:
        def __init__(self, directory: Path, name: str, config: Any) -> None:
            if when == "__init__":
                raise RuntimeError("no route to host")

        def log(self, values: Any, step: int) -> None:
            assert when == "close"

        def close(self) -> None:
            raise RuntimeError("no route to host")

    monkeypatch.setitem(log._TRACKERS, "tensorboard", Down)
    run = train(tiny(run__trackers=["tensorboard"], data__eval={}), quiet=True)
    assert run.model.is_dir()
    who = "tensorboard" if when == "__init__" else "Down"
    said = f"run.trackers: {who} fails (RuntimeError: no route to host) and is left out"
    assert capfd.readouterr().err.count(said) == 1


def test_nothing_stays_of_steps_that_the_run_does_not_come_to(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 3 with a checkpoint of step 2; from there on it is to store less."""
    stored = {"run__trajectories_every": 1, "eval__every": 1, "eval__start": True}
    config = tiny(**(OPTIONS | stored | {"optim__steps": 5}))
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "store_step", call=3, after=True)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    directory = Path(config.run.dir) / config.run.name

    def steps(pattern: str) -> list[int]:
        return sorted(int(path.stem[-6:]) for path in directory.glob(pattern))

    assert steps("trajectories/*") == [1, 2, 3]
    assert steps("evals/*.jsonl") == steps("evals/*.parquet") == [0, 1, 2, 3]
    (directory / "trajectories" / "notes.txt").write_text("mine")
    sparse = {"run__trajectories_every": 0, "eval__every": 0}
    train(tiny(**(OPTIONS | sparse | {"optim__steps": 5})), quiet=True)
    (directory / "trajectories" / "notes.txt").unlink()
    assert steps("trajectories/*") == [1, 2]
    assert steps("evals/*.jsonl") == steps("evals/*.parquet") == [0, 1, 2, 5]
    assert [row["step"] for row in read_lines(directory / "eval.jsonl")] == [0, 1, 2, 5]


def test_a_tracker_goes_on_with_the_same_run_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two studies have the same names, and so has one that is made anew."""
    begun: dict[str, list[str]] = {"wandb": [], "trackio": []}
    shown = []

    def init(*, project: str, name: str, config: Any, resume: str, **given: Any) -> SimpleNamespace:
        assert resume == "allow"
        shown.append(name)
        begun["wandb" if given else "trackio"].append(given.get("id", name))
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    for name in begun:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="here")
        vars(module).update(init=init, log=lambda *_, **__: None, finish=lambda: None)
        monkeypatch.setitem(sys.modules, name, module)
    config = tiny(run__trackers=[*begun], data__eval={}, run__save_every=1)
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "one_step", call=3, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    first = train(config, quiet=True)
    shutil.rmtree(first.directory)
    train(config, quiet=True)
    for names in begun.values():
        assert len(names) == 3
        assert names[0] == names[1] != names[2]
    assert shown[0] == "tiny"
    assert shown[1].startswith("tiny-")


def test_a_damaged_newer_checkpoint_costs_no_sound_one(tmp_path: Path) -> None:
    for step in (5, 6, 10):
        (tmp_path / f"step_{step}").mkdir()
    checkpoint.prune(tmp_path, keep=1, written=tmp_path / "step_6")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_6"]


def test_tensorboard_has_every_step(tiny: Tiny) -> None:
    pytest.importorskip("tensorboard")
    result = train(tiny(run__trackers=["tensorboard"]), quiet=True)
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(result.directory / "tensorboard"))
    events.Reload()
    rows = read_lines(result.directory / "metrics.jsonl")
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows])
    assert [e.step for e in events.Scalars("eval/test/avg_at_k")] == [3]
    assert json.loads((result.directory / "environment.json").read_text())


def test_dropout_is_a_function_of_seed_and_step(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Two runs of one config are one, and one that was stopped goes on as if it had not been."""
    models = pair(tmp_path, "gpt2")
    options = {**models, "student__dropout": True, "optim__steps": 4, "run__save_every": 2, "data__eval": {}}
    whole = train(tiny(**options, run__name="whole"), quiet=True).directory
    torch.manual_seed(1)
    random.seed(1)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "onpath.training", "one_step", call=4, after=False)
        with pytest.raises(Stopped):
            train(tiny(**options, run__name="parts"), quiet=True)
    torch.manual_seed(2)
    parts = train(tiny(**options, run__name="parts"), quiet=True).directory
    losses = [[row["loss"] for row in read_lines(run / "metrics.jsonl")] for run in (whole, parts)]
    assert losses[0] == losses[1]
    still = train(tiny(**{**options, "student__dropout": False}, run__name="still"), quiet=True).directory
    assert losses[0][0] != read_lines(still / "metrics.jsonl")[0]["loss"], "there is dropout"
