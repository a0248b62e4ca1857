"""What a run says: JSON lines on disk always, a progress display for people, trackers if asked for."""

import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import append_lines, write_text
from onpath.system.reading import json_lines
from onpath.system.streams import Steady, say
from onpath.system.text import first_line, named_controls

Metrics = Mapping[str, Any]

TRACKER_ID = "tracker_id"
"""In a run's directory: what Weights & Biases and trackio know it by."""


class JsonLines:
    """An append-only file of JSON objects, each line complete on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Metrics) -> None:
        append_lines(self.path, [json.dumps(row, ensure_ascii=False)])

    def rewind(self, *, step: int) -> None:
        """Drops the lines after `step`, and a half-written last line: a resumed run writes them again."""
        if not self.path.exists():
            return
        write_text(self.path, "".join(line for line, row in _complete(self.path) if row["step"] <= step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's metrics.jsonl or eval.jsonl; none if it does not exist.

    Raises:
        UserError: it cannot be read.
    """
    return [row for _, row in _complete(path)] if path.exists() else []


def holes(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps that are missing before the last one of metrics.jsonl: a disk that spoilt lines, not a run.

    >>> holes([{"step": 1}, {"step": 4}])
    [2, 3]
    """
    seen = {row["step"] for row in rows}
    return [step for step in range(1, max(seen, default=0)) if step not in seen]


def _complete(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines that are whole: a killed writer's last one is not, nor is what a disk spoilt."""
    found = ((f"{line}\n", row) for _, line, row in json_lines(path))
    return [(line, row) for line, row in found if isinstance(row, dict) and _is_sound(row)]


def _is_sound(row: dict[str, Any]) -> bool:
    seconds, step = row.get("seconds", {}), row.get("step")
    return (
        type(step) is int
        and 0 <= step < 2**53
        and isinstance(seconds, dict)
        and all(map(_is_number, seconds.values()))
        and ("split" not in row or _is_evaluation(row))
        and all(_is_number(row[key]) for key in _NUMBERS if row.get(key) is not None)
    )


def _is_evaluation(row: dict[str, Any]) -> bool:
    ends = [row.get(key, [0, 0]) for key in ("ci95", "pass_at_k_ci95")]
    return (
        isinstance(row["split"], str)
        and all(_is_number(row.get(key)) for key in _OF_EVALUATIONS)
        and all(isinstance(e, list) and len(e) == 2 and all(map(_is_number, e)) for e in ends)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) >= 1e300


_OF_EVALUATIONS = ("n", "k", "avg_at_k", "pass_at_k")
_NUMBERS = (
    *("loss", "tokens", "accuracy", "grad_norm", "mean_length", "finished", "student_tokens_generated", "lr"),
    *("reverse_kl_nats", "forward_kl_nats", "student_entropy_nats", "teacher_entropy_nats", "problems"),
)


class Tracker(Protocol):
    """One experiment tracker: a class made of (directory, name, config) of the run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of an optimiser step, nested names joined by a slash."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class _TensorBoard:
    def __init__(self, directory: Path, name: str, config: Metrics) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, directory: Path, name: str, config: Metrics) -> None:
        import trackio

        self.api = trackio
        shown = f"{name}-{tracked_as(directory)}"  # it knows runs by nothing but their names
        trackio.init(project="onpath", name=shown, config=dict(config), resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.api.log(dict(values), step=step)

    def close(self) -> None:
        self.api.finish()


class _Wandb:
    def __init__(self, directory: Path, name: str, config: Metrics) -> None:
        import wandb

        self.run = wandb.init(
            project="onpath",
            name=name,
            id=tracked_as(directory),
            resume="allow",
            config=dict(config),
            dir=str(directory),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def tracked_as(directory: Path) -> str:
    """The id that trackers know a run by: drawn once and kept in its directory, so that a resumed run goes on
    with its own there, and another run of the same name does not.

    Raises:
        UserError: it cannot be written.
    """
    path = directory / TRACKER_ID
    if not path.is_file():
        write_text(path, f"{secrets.token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()


_TRACKERS: dict[str, Callable[[Path, str, Metrics], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def check_trackers(names: Sequence[str]) -> None:
    """Before a run directory is made.

    Raises:
        UserError: one of them is not installed, or is no tracker.
    """
    for name in names:
        if code.is_own(name):
            _own_tracker(name)
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a directory of that name lies here
            raise UserError(f"run.trackers: {name} is not installed: pip install {name}")


def open_trackers(names: Sequence[str], *, directory: Path, name: str, config: Metrics) -> list[Tracker]:
    """The trackers asked for; `check_trackers` has seen that they are there. One that fails is left out, with
    a sentence."""
    found: list[Tracker] = []
    for key in names:
        make = _own_tracker(key) if code.is_own(key) else _TRACKERS[key]
        with _spared(key):
            found.append(make(directory, name, config))
    return found


@contextmanager
def _spared(name: str) -> Iterator[None]:
    """What a tracker raises is said: a run does not end for it, and JSON lines have it all."""
    try:
        yield
    except code.FAILURES as error:
        said = dict.fromkeys([type(error).__name__, first_line(error)])
        say(f"run.trackers: {name} fails ({': '.join(filter(None, said))}) and is left out")


def _own_tracker(name: str) -> Callable[[Path, str, Metrics], Tracker]:
    made = code.load(name, key="run.trackers")
    if not callable(made) or not all(hasattr(made, method) for method in ("log", "close")):
        raise UserError(
            f"run.trackers: {name} must be a class made of (directory, name, config), with log(values, step) "
            "and close()"
        )
    tracker: Callable[[Path, str, Metrics], Tracker] = made
    return tracker


def tell(trackers: list[Tracker], values: dict[str, float], step: int) -> None:
    """Logs to each. One that fails is said once and dropped."""
    for tracker in list(trackers):
        trackers.remove(tracker)
        with _spared(type(tracker).__name__):
            tracker.log(values, step)
            trackers.append(tracker)


def close_trackers(trackers: Sequence[Tracker]) -> None:
    """Lets each write what it holds."""
    for tracker in trackers:
        with _spared(type(tracker).__name__):
            tracker.close()


def flatten(row: Metrics, prefix: str = "") -> dict[str, float]:
    """Numbers only, nested keys joined by a slash: what trackers take."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value)
    return flat


class Display:
    """Progress for people: a live bar on a terminal, a plain line now and then elsewhere, or nothing."""

    def __init__(self, *, steps: int, done: int, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(file=cast(TextIO, Steady(sys.stderr)), quiet=quiet)
        self.steps, self.first, self.quiet = steps, done, quiet
        self.live = self.console.is_terminal and not quiet
        self._started = self._printed = time.monotonic()
        self._said_empty = False
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, row: Metrics, warning: str = "") -> None:
        """One optimiser step done.

        Args:
            warning: shown behind the first one.
        """
        seconds = sum(row["seconds"].values())
        text = f"loss {row['loss']:.4f}  KL {_number(row.get('reverse_kl_nats'))}"
        if row.get("accuracy") is not None:
            text += f"  accuracy {row['accuracy']:.1%}"
        text += f"  {row['tokens'] / max(seconds, 1e-9):,.0f} tok/s"
        self._bar.update(self._task, completed=row["step"], description=text)
        if not self.live and (
            row["step"] in (self.first + 1, self.steps) or time.monotonic() - self._printed > 5
        ):
            self._printed = time.monotonic()
            each = (self._printed - self._started) / (row["step"] - self.first)
            left = (self.steps - row["step"]) * each
            self.say(f"step {row['step']}/{self.steps}  {text}  {left:,.0f} s left")

        if not row["tokens"] and not self._said_empty:
            self._said_empty = True
            self.say(
                f"step {row['step']} has no token to train on: no rollout gave a trajectory with a weight"
            )
        if row["step"] == 1 and row.get("top_overlap") is not None:
            self.say(says_overlap(row["top_overlap"]))
        if row["step"] == 1 and warning:
            self.say(f"warning: step 1: {warning}")

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(named_controls(text), highlight=False, markup=False, soft_wrap=True)


def says_overlap(share: float) -> str:
    """What the likeliest tokens that both models have in common mean for `rollout.refresh`."""
    return (
        f"of the likeliest tokens of student and teacher {share:.0%} are the same at the start (the higher, "
        "the more fresh rollouts are worth: docs/teachers.md)"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
