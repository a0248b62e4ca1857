"""A run's directory: whose it is, what a start may do there, and what becomes of a finished run."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onpath.config import Config
from onpath.run.assemble import assemble
from onpath.run.environment import commit_of
from onpath.run.opening import open_run
from onpath.system.errors import UserError
from onpath.system.files import lock
from onpath.training import train

Tiny = Callable[..., Config]
QUICK = {"data__eval": {}, "run__trajectories_every": 0}


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "rollouts/notes.txt",
        "environment.json",
        "refine.json",
        "eval.jsonl",
        "model/config.json",
    ],
)
def test_what_no_run_wrote_is_left_as_it_is(name: str, tiny: Tiny) -> None:
    """Also what a run would have written itself, had it been there before."""
    config = tiny(**QUICK)
    directory = Path(config.run.dir) / config.run.name
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_text("# mine\noptim: {lr: 3.0e-4}\n")
    before = files(directory)
    for with_changes in (False, True):
        with pytest.raises(UserError, match=rf"holds {name.split('/')[0]}, which no run of onpath wrote"):
            train(config, resume_with_changes=with_changes, quiet=True)
        assert files(directory) == before


def test_a_launchers_log_and_what_probes_left_are_not_in_the_way(tiny: Tiny) -> None:
    config = tiny(**QUICK, optim__steps=1)
    directory = Path(config.run.dir) / config.run.name
    for name in ("slurm-17.out", "probes/divergence.jsonl", "cache/process-0.jsonl", ".DS_Store"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}\n")
    before = files(directory)
    assert train(config, quiet=True).steps == 1
    assert {path: path.read_bytes() for path in before} == before


def test_a_start_that_was_killed_at_once_is_no_obstacle(tiny: Tiny) -> None:
    """Its config is there, and its other files are not yet."""
    config = tiny(**QUICK, optim__steps=1)
    directory = Path(config.run.dir) / config.run.name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config.to_yaml())
    assert train(config, quiet=True).steps == 1


def test_what_is_refused_renames_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Neither other data, nor fewer steps than are done; and a model that was set aside before is no
    obstacle."""
    rows = tmp_path / "rows.jsonl"
    text = "".join(f'{{"prompt": "{i}+1=?", "answer": "{i + 1}"}}\n' for i in range(9))
    rows.write_text(text)
    options = {**QUICK, "data__train": str(rows), "optim__schedule": "constant"}
    two, four = (tiny(**options, optim__steps=steps) for steps in (2, 4))
    directory = train(two, quiet=True).directory
    before = files(directory / "model")

    rows.write_text(text.replace("0+1", "9+1"))
    with pytest.raises(UserError, match=r"another content of data\.train"):
        train(four, quiet=True)
    assert files(directory / "model") == before
    rows.write_text(text)
    with pytest.raises(UserError, match="has done 2 steps already"):
        train(tiny(**options, optim__steps=1), resume_with_changes=True, quiet=True)
    assert files(directory / "model") == before
    assert not train(two, quiet=True).trained

    shutil.copytree(directory / "model", directory / "model_step_2")
    assert train(four, quiet=True).steps == 4
    kept = {path.name: data for path, data in files(directory / "model_step_2").items()}
    assert kept == {path.name: data for path, data in before.items()}


@pytest.mark.parametrize("left", [0, -9])
def test_a_final_model_that_was_cut_off_is_written_again(left: int, tiny: Tiny) -> None:
    config = tiny(**QUICK, optim__steps=1)
    weights = train(config, quiet=True).model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:left])
    train(config, quiet=True)
    assert weights.read_bytes() == whole


def test_a_start_that_fails_leaves_the_directory_free(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook whoever mends it tries again in the same process."""

    class Refusing:
        def __init__(self, *_: object, **__: object) -> None:
            raise UserError("run.trackers: not logged in")

    monkeypatch.setattr("onpath.run.opening.open_trackers", Refusing)
    with pytest.raises(UserError, match="not logged in"):
        train(tiny(), quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr("onpath.run.directory.Run.__post_init__", Refusing, raising=False)
    with pytest.raises(UserError, match="not logged in"):
        train(tiny(), quiet=True)
    monkeypatch.undo()
    assert train(tiny(), quiet=True).directory.is_dir()


class Failing:
    """A checkpoint that is not written, and a tracker that hears of the end."""

    closed = False

    def wait(self, *, patience: float | None = None) -> Path:
        raise UserError("step_2: cannot write: No space left on device")

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_a_run_is_closed_whatever_fails_meanwhile(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, failing = tiny(**QUICK), Failing()
    parts = assemble(config)
    run = open_run(config, parts)
    run.saving, run.trackers = failing, [failing]

    def close() -> None:
        raise UserError("the teacher does not let go")

    monkeypatch.setattr(parts.models.teacher, "close", close)
    with pytest.raises(UserError, match="does not let go"):
        run.close()
    assert failing.closed
    assert "is lost: step_2: cannot write: No space left on device\n" in capsys.readouterr().err
    os.close(lock(run.directory))


def test_the_commit_is_that_of_the_checkout_that_runs(tmp_path: Path) -> None:
    """And not of somebody's repository in which onpath is installed."""
    own, installed = tmp_path / "src" / "onpath", tmp_path / ".venv" / "lib" / "onpath"
    for package in (own, installed):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    assert commit_of(own / "__init__.py") is None, "no repository"

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    git("add", "src")
    git("commit", "-qm", "first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    (own / "more.py").touch()
    assert commit_of(own / "__init__.py") == head
    assert commit_of(installed / "__init__.py") is None
    (own / "__init__.py").write_text("changed = True\n")
    assert commit_of(own / "__init__.py") == f"{head}-dirty"
