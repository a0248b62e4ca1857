"""The maze as a task (`onpath.data.tasks.Task`)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onpath.gym.language import TEMPLATES
from onpath.gym.maze.check import ERROR_KINDS, error_kind, first_error, grade, label_tokens
from onpath.gym.maze.tasks import moves, rows
from onpath.gym.maze.vocab import ONSET_WORDS

BUNDLED = Path(__file__).parent / "bundled"


class MazeTask:
    """Mazes of one-way doors: after a wrong move nobody gets out. Walks of 160 to 300 tokens."""

    name = "maze"
    splits: Mapping[str, int] = {"train": 2000, "validation": 1000, "test": 1000, "hard": 1000}
    checks_steps = True
    labels_tokens = True
    error_kinds: tuple[str, ...] = ERROR_KINDS
    world: None = None
    templates: Mapping[str, str] = TEMPLATES
    correction_words: tuple[str, ...] | None = ONSET_WORDS

    def rows(self, split: str, count: int) -> Iterable[Mapping[str, Any]]:
        """See `Task.rows`."""
        return rows(split, count)

    def grade(self, text: str, answer: str) -> bool:
        """See `Task.grade`."""
        return grade(text, answer)

    def first_error(self, problem: str, response: str) -> int | None:
        """See `Task.first_error`."""
        return first_error(problem, response)

    def labels(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.labels`."""
        return list(label_tokens(problem, tokens))

    def skills(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.skills`."""
        return []

    def error_kind(self, problem: str, tokens: Sequence[str]) -> str | None:
        """See `Task.error_kind`."""
        return error_kind(problem, tokens)

    def model(self, role: str) -> Path:
        """See `Task.model`."""
        if role not in ("student", "teacher"):
            raise ValueError("the bundled models are maze:student and maze:teacher")
        if not (BUNDLED / role).is_dir():
            raise ValueError("the maze's models are not bundled: onpath gym train --models maze --out DIR")
        return BUNDLED / role

    def stated(self, answer: str) -> str:
        """See `Task.stated`."""
        return moves(answer)

    def with_settings(self, settings: Mapping[str, float]) -> "MazeTask":
        """See `Task.with_settings`."""
        raise ValueError("the maze has no settings")
