"""The gym as a task (`onpath.data.tasks.Task`)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onpath.gym.check import first_error, grade, label_tokens
from onpath.gym.mixture import TEMPLATES
from onpath.gym.tasks import rows
from onpath.gym.vocab import ONSET_WORDS

BUNDLED = Path(__file__).parent / "bundled"


class Gym:
    """Chains of two-digit arithmetic, with the truth of every token and a bundled pair of models."""

    name = "gym"
    splits: Mapping[str, int] = {"train": 2000, "validation": 1000, "test": 1000, "hard": 1000}
    checks_steps = True
    labels_tokens = True
    templates: Mapping[str, str] = TEMPLATES
    correction_words: tuple[str, ...] | None = ONSET_WORDS

    def rows(self, split: str, count: int) -> Iterable[Mapping[str, Any]]:
        """See `Task.rows`."""
        return rows(split, count, seed=0)

    def grade(self, text: str, answer: str) -> bool:
        """See `Task.grade`."""
        return grade(text, answer)

    def first_error(self, problem: str, response: str) -> int | None:
        """See `Task.first_error`."""
        return first_error(problem, response)

    def labels(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.labels`."""
        return [label.kind for label in label_tokens(problem, tokens)]

    def model(self, role: str) -> Path:
        """See `Task.model`."""
        if role not in ("student", "teacher"):
            raise ValueError("the bundled models are gym:student and gym:teacher")
        return BUNDLED / role

    def stated(self, answer: str) -> str:
        """See `Task.stated`."""
        return f"ans {answer}"
