"""A writer killed before each of its operations on files: nothing finished is lost, nothing half is taken.

The processes are real, and so are their ends (SIGKILL). Python tells of each operation through an audit hook;
what safetensors writes is killed before, half-way and after.
"""

import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.commands.export import export_model
from onpath.commands.report.command import write_report
from onpath.config.build import build, load
from onpath.engines.remote.replay import Replay
from onpath.engines.weights import save_weights
from onpath.records import Completion
from onpath.run import checkpoint
from onpath.run.log import JsonLines, read_lines
from onpath.run.trajectories import write_parquet
from onpath.system.files import remove_leftovers, write_text, written
from onpath.training import train
from tests.commands.report_data import make_run
from tests.conftest import make_model
from tests.faults.kills import KILLS, RUNS

Write = Callable[[Path], object]
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


class Axe:
    """Kills this process at its `at`-th operation on files below `root`."""

    def __init__(self, at: int, root: Path) -> None:
        self.left, self.root = at, str(root)
        sys.addaudithook(self)
        real = checkpoint.save_file

        def save_file(tensors: Any, path: Any, **options: Any) -> None:
            self.swing()
            real(tensors, path, **options)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            self.swing()
            Path(path).write_bytes(whole)

        checkpoint.save_file = save_file  # type: ignore[assignment]

    def __call__(self, event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _EVENTS) and str(details[0]).startswith(self.root):
            self.swing()

    def swing(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(write: Write, root: Path, at: int, *, told: Path | None = None) -> bool:
    """Whether the writer was killed; it had done all its work before otherwise, and how many operations are
    `told` in a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        child = os.fork()
    if child == 0:
        try:
            axe = Axe(at, root)
            write(root)
            if told is not None:
                told.write_text(str(at - axe.left))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def held(root: Path) -> dict[str, bytes]:
    """Every file that a reader would see."""
    found = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
    hidden = {n for n in found if any(part.startswith(".") for part in Path(n).parts)}
    return {name: path.read_bytes() for name, path in found.items() if name not in hidden}


def text(content: str, root: Path) -> None:
    write_text(root / "study.json", content)


def directory(text: str, root: Path) -> None:
    with written(root / "best", sync=True) as temporary:
        temporary.mkdir()
        for name in ("config.json", "model.safetensors"):
            (temporary / name).write_text(text)


def saved(step: int, root: Path) -> None:
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saving = checkpoint.save(
        root, step=step, model=model, optimizer=optimizer, extra={"a": torch.ones(2)}, inputs={}
    )
    saving.wait()
    checkpoint.prune(root, keep=1, written=checkpoint.list_steps(root)[-1])


def lines(root: Path) -> None:
    log = JsonLines(root / "metrics.jsonl")
    log.rewind(step=1)
    for step in (2, 3, 4):
        log.write({"step": step, "loss": 0.5})


def completions(root: Path) -> None:
    for i in range(3):
        c = Completion(ids=(i, 2), logprobs=(-0.5, -0.1), finish_reason="stop")
        Replay(root / "cache").put({str(i): c})


def export(root: Path) -> None:
    shutil.rmtree(root / "out", ignore_errors=True)
    export_model(root / "run", root / "out")


WRITERS: dict[str, tuple[Write, ...]] = {
    "a text file": (partial(text, "old"), partial(text, "new")),
    "a directory in another's place": (partial(directory, "old"), partial(directory, "new")),
    "checkpoints, and the old ones removed": (partial(saved, 1), partial(saved, 2), partial(saved, 3)),
    "lines of metrics, and some of them taken back": (
        lambda root: (root / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st'), lines
    ),
    "stored trajectories": (
        lambda root: write_parquet(root / "a.parquet", [{"a": 1}]),
        lambda root: write_parquet(root / "a.parquet", [{"a": 2}]),
    ),
    "kept completions": (lambda root: None, completions),
    "details of an evaluation": (
        lambda root: write_text(root / "evals" / "test.jsonl", "old\n"),
        lambda root: write_text(root / "evals" / "test.jsonl", "new\n" * 1000),
    ),
    "a server's weights": (
        lambda root: save_weights(make_model(1), root), lambda root: save_weights(make_model(2), root)
    ),
}  # fmt: skip
"""What was there before, and what is written now, in turn."""


def check(name: str, root: Path, before: Write, *stages: Write) -> None:
    """Kills the writer everywhere, and tries again."""
    (first, last) = (root / "first", root / "last")
    first.mkdir()
    before(first)
    shutil.copytree(first, last)
    states = [held(first)]
    for stage in stages:
        stage(last)
        states.append(held(last))

    def write(work: Path) -> None:
        for stage in stages:
            stage(work)

    old, new = states[0], states[-1]
    kills = 0
    while kills < 500:
        work = Path(shutil.copytree(first, root / "work"))
        if not killed(write, work, kills + 1):
            break
        kills += 1
        remove_leftovers(work)
        found = held(work)
        for file, content in found.items():
            known = [state[file] for state in states if file in state]
            grows = file.endswith(".jsonl") and any(k.startswith(content) for k in known)
            assert content in known or grows, f"{file} is half there after kill {kills}"
        for file in old.keys() & new.keys():
            assert file in found, f"{file} is lost after kill {kills}"
        if name == "checkpoints, and the old ones removed":
            assert any(map(checkpoint.is_sound, checkpoint.list_steps(work))), "one of the two is whole"
        write(work)
        assert held(work) == new or name in _TIMED
        shutil.rmtree(work)
    assert kills >= KILLS[name], f"only {kills} operations"


_TIMED = {"kept completions"}
"""What is written again is written beside what is there."""


@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_every_operation(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, *WRITERS[name])


def test_completions_survive(tmp_path: Path) -> None:
    for at in range(1, 50):
        work = tmp_path / str(at)
        work.mkdir()
        if not killed(completions, work, at):
            break
        completions(work)
        assert all(Replay(work / "cache").get(str(i)) is not None for i in range(3))


def test_a_line_cut_at_every_byte(tmp_path: Path) -> None:
    path, whole = tmp_path / "metrics.jsonl", '{"step": 1, "loss": 0.5}\n'
    last = '{"step": 2, "loss": 0.25, "seconds": {"train": 1.5}}\n'
    for cut in range(len(last)):
        path.write_text(whole + last[:cut])
        assert [row["step"] for row in read_lines(path)] == [1]
        log = JsonLines(path)
        log.rewind(step=1)
        log.write({"step": 2, "loss": 0.75})
        assert [row["loss"] for row in read_lines(path)] == [0.5, 0.75]


@pytest.fixture(scope="module")
def run_tree(model_dirs: dict[str, Path], data_file: Path) -> dict[str, Any]:
    return {
        "student": {"model": str(model_dirs["student"]), "device": "cpu"},
        "teacher": {"model": str(model_dirs["teacher"]), "device": "cpu"},
        "data": {"train": str(data_file), "eval": {"test": str(data_file)}, "eval_limit": 3},
        "rollout": {"prompts": 4, "max_new_tokens": 6},
        "optim": {"steps": 2},
        "eval": {"grader": "exact", "n": 1, "k": 1, "every": 1},
        "run": {"name": "run", "save_every": 1, "keep_best": "test", "trajectories_every": 1},
    }


@pytest.fixture(scope="module")
def finished(run_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    return train(build({**run_tree, "run": {**run_tree["run"], "dir": str(root)}}), quiet=True).directory


def test_an_exported_model_is_whole_or_not_there(finished: Path, tmp_path: Path) -> None:
    check("an exported model", tmp_path, lambda root: shutil.copytree(finished, root / "run"), export)


def test_a_report_is_whole_or_the_old_one(tmp_path: Path) -> None:
    made = make_run(tmp_path / "made", steps=2, rows=2, length=6)
    check(
        "a report",
        tmp_path,
        lambda root: shutil.copytree(made, root / "run"),
        lambda root: write_report(root / "run"),
    )


def test_runs_killed_from_beginning_to_end(run_tree: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    """At places spread over all operations of a run; each ends as the run that was not killed."""
    operations = tmp_path / "operations"

    def go(root: Path) -> None:
        train(build({**run_tree, "run": {**run_tree["run"], "dir": str(root)}}), quiet=True)

    (tmp_path / "count").mkdir()
    assert not killed(go, tmp_path / "count", 10**9, told=operations)
    count = int(operations.read_text())
    assert count > 40
    for i in range(RUNS):
        work = tmp_path / str(i)
        work.mkdir()
        assert killed(go, work, 1 + i * (count - 1) // (RUNS - 1))
        go(work)
        compare(finished, work / "run")


def compare(one: Path, two: Path) -> None:
    """Weights, optimiser and all that was measured, bit for bit."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = [
            [{k: v for k, v in r.items() if k != "seconds"} for r in read_lines(d / name)] for d in (one, two)
        ]
        assert rows[0] == rows[1]
    for path in one.rglob("*.safetensors"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    assert not [p for p in two.rglob(".*") if p.name != ".lock"], "nothing half-written stays"
    assert load(two / "config.yaml").run.name == "run"
