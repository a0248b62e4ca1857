"""A run's files damaged in every way: each command goes on with what is whole, or says one sentence."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onpath.commands.inspect import run_inspect
from onpath.commands.report.command import write_report
from onpath.config.build import Config
from onpath.run.log import holes, read_lines
from onpath.run.trajectories import trajectory_files
from onpath.system.errors import UserError
from onpath.training import train
from tests.commands.report_data import make_run
from tests.mutate import damaged

CONTENTS: dict[str, bytes | None] = {
    "empty": b"",
    "{}": b"{}\n",
    "5": b"5\n",
    "null": b"null\n",
    "list": b"[1, 2]\n",
    "text": b"what is this\n",
    "binary": b"\xff\xfe\x00\x01" * 9,
    "deep": b"[" * 50_000,
    "wrong types": b'{"step": "x", "seconds": 5, "split": [], "ci95": 3, "run": 5, "optim": []}\n',
    "a directory": None,
    "half": b"half",
}
FILES = ("config.yaml", "environment.json", "metrics.jsonl", "eval.jsonl", "prefix_failure.json")
COMMANDS: dict[str, Callable[[Path], object]] = {
    "report": write_report,
    "inspect": lambda run: run_inspect(run),
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
    names = [*FILES, *(str(p.relative_to(whole)) for p in trajectory_files(whole)), "trajectories"]
    for i, name in enumerate(names):
        run = shutil.copytree(whole, tmp_path / str(i))
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
    assert "metrics.jsonl lacks 1 steps before its last one, first 2" in write_report(run).read_text()


@pytest.mark.parametrize("what", ["{}", "5", "null", "binary", "a directory", "half", "deep"])
def test_train_goes_on_or_says_a_sentence(what: str, tiny: Callable[..., Config]) -> None:
    config = tiny(run__save_every=1, optim__steps=1, data__eval={}, run__name=what.replace(" ", "-"))
    done = train(config, quiet=True)
    for name in ("config.yaml", "metrics.jsonl", "environment.json", "checkpoints/step_1/state.json"):
        run = shutil.copytree(done.directory, done.directory.with_name("copy"))
        shutil.rmtree(run / "model")
        spoil(run / name, what)
        again = config.model_copy(update={"run": config.run.model_copy(update={"name": "copy"})})
        said = tried(lambda _, again=again: train(again, quiet=True), run)
        assert "Traceback" not in said
        assert not said or str(run) in said
        shutil.rmtree(run)
