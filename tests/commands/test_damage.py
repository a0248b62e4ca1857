"""A run's files damaged in every way: each command goes on with what is whole, or says one sentence."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onpath.commands.eval import evaluate_model
from onpath.commands.export import export_model
from onpath.commands.inspect import run_inspect
from onpath.commands.report.command import write_report
from onpath.config.build import build, load
from onpath.config.sections import Student
from onpath.engines.models import load_model
from onpath.run.log import holes, read_lines
from onpath.run.trajectories import trajectory_files
from onpath.system.errors import UserError
from onpath.training import train
from tests.commands.report_data import make_run
from tests.faults.runs import CONTENTS, FILES, OF_MODELS, TRAIN_CONTENTS, TRAIN_FILES
from tests.mutate import damaged

COMMANDS: dict[str, Callable[[Path], object]] = {
    "report": write_report,
    "inspect": lambda run: run_inspect(run),
}
MODEL_COMMANDS: dict[str, Callable[[Path], object]] = {
    "eval": lambda run: evaluate_model(run, n=1, k=1, limit=1, max_new_tokens=2, device="cpu"),
    "export": lambda run: export_model(run, run.with_name("exported")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run", steps=4, rows=3, length=12)


def spoil(path: Path, what: str) -> None:
    content, before = CONTENTS[what], path.read_bytes() if path.is_file() else b"{}"
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(before[: len(before) // 2] if content == b"half" else content)


def tried(command: Callable[[Path], object], run: Path) -> str:
    """The sentence; empty: it did what it was asked to."""
    try:
        command(run)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", CONTENTS)
def test_any_file_in_any_state(command: str, what: str, whole: Path, tmp_path: Path) -> None:
    for i, name in enumerate(FILES):
        run = linked(whole, tmp_path / str(i))
        assert (run / name).exists()
        spoil(run / name, what)
        said = tried(COMMANDS[command], run)
        assert "\n" not in said.strip()
        assert not said or str(run) in said, "it names the file, or the run"
        assert len(said) < 500


@pytest.mark.parametrize("command", COMMANDS)
def test_five_hundred_flipped_bytes(command: str, whole: Path, tmp_path: Path) -> None:
    rng, run = random.Random(command), shutil.copytree(whole, tmp_path / "run")
    names = [*FILES[:4], *(str(p.relative_to(whole)) for p in trajectory_files(whole))]
    good = {name: (whole / name).read_bytes() for name in names}
    for _ in range(125 if command == "report" else 500):
        name = rng.choice(names)
        (run / name).write_bytes(damaged(good[name], rng))
        tried(COMMANDS[command], run)
        (run / name).write_bytes(good[name])
    assert tried(COMMANDS[command], run) == ""


def test_holes_are_told(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = "#" * 20 + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    assert holes(read_lines(run / "metrics.jsonl")) == [2]
    assert "metrics.jsonl lacks 1 step before its last one, first 2" in write_report(run).read_text()


@pytest.fixture(scope="module")
def trained(model_dirs: dict[str, Path], data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step, with its checkpoint."""
    root = tmp_path_factory.mktemp("trained")
    config = build(
        {
            "student": {"model": str(model_dirs["student"]), "device": "cpu"},
            "teacher": {"model": str(model_dirs["teacher"]), "device": "cpu"},
            "data": {"train": str(data_file), "eval": {"test": str(data_file)}},
            "rollout": {"prompts": 4, "max_new_tokens": 6},
            "optim": {"steps": 1},
            "eval": {"grader": "exact", "n": 1, "k": 1, "start": False},
            "run": {"name": "run", "dir": str(root), "save_every": 1, "trajectories_every": 0},
        }
    )
    return train(config, quiet=True).directory


def linked(run: Path, to: Path) -> Path:
    """A copy that costs nothing: `spoil` removes a file before it writes another."""
    return Path(shutil.copytree(run, to, copy_function=os.link))


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("weights", OF_MODELS)
def test_models_of_damaged_runs(weights: str, what: str, command: str, trained: Path, tmp_path: Path) -> None:
    for i, name in enumerate(OF_MODELS[weights]):
        run = linked(trained, tmp_path / str(i) / "run")
        if weights != "model":
            shutil.rmtree(run / "model")
        assert (run / name).exists()
        spoil(run / name, what)
        said = tried(MODEL_COMMANDS[command], run)
        assert "\n" not in said
        assert not said or str(run) in said, said
        assert len(said) < 900
        exported = run.with_name("exported")
        assert exported.exists() == (command == "export" and not said)
        if exported.exists():
            load_model(Student(model=str(exported)), "student.model", torch.device("cpu"))


@pytest.mark.parametrize("what", TRAIN_CONTENTS)
def test_train_goes_on_or_says_a_sentence(what: str, trained: Path, tmp_path: Path) -> None:
    config = load(trained / "config.yaml")
    for name in TRAIN_FILES:
        run = linked(trained, tmp_path / "copy")
        shutil.rmtree(run / "model")
        spoil(run / name, what)
        place = config.run.model_copy(update={"dir": str(tmp_path), "name": "copy"})
        again = config.model_copy(update={"run": place})
        said = tried(lambda _, again=again: train(again, quiet=True), run)
        assert not said or str(run) in said
        shutil.rmtree(run)
