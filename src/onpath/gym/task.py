"""The gym as a task (`onpath.data.tasks.Task`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args

from onpath.gym.check import ERROR_KINDS, error_kind, first_error, grade, label_tokens, skills
from onpath.gym.language import TEMPLATES
from onpath.gym.models import Role, model_dir
from onpath.gym.surface import student
from onpath.gym.tasks import SIZES
from onpath.gym.vocab import ONSET_WORDS
from onpath.gym.worlds import Worlds


class Gym:
    """Chains of two-digit arithmetic, with the truth of every token and a bundled pair of models."""

    name = "gym"
    splits: Mapping[str, int] = {split: 2000 if split == "train" else 1000 for split in SIZES}
    checks_steps = True
    labels_tokens = True
    error_kinds: tuple[str, ...] = ERROR_KINDS
    templates: Mapping[str, str] = TEMPLATES
    correction_words: tuple[str, ...] | None = ONSET_WORDS

    def __init__(self, world: Worlds | None = None) -> None:
        self.world = world or Worlds()

    def with_settings(self, settings: Mapping[str, float]) -> "Gym":
        """See `Task.with_settings`."""
        known = [field.name for field in fields(Worlds)]
        for name in settings:
            if name not in known:
                raise ValueError(f"the gym has no {name!r}; it has {', '.join(known)}")
        if settings.get("again") and not settings.get("spoil"):
            raise ValueError("again is of the errors that spoil puts in: set spoil above 0 too")
        return Gym(Worlds(**settings))

    def rows(self, split: str, count: int) -> Iterable[Mapping[str, Any]]:
        """See `Task.rows`."""
        if self.world.surface != 1:
            raise ValueError("surface is the student's: student.model: gym:student?surface=0")
        return self.world.rows(split, count)

    def grade(self, text: str, answer: str) -> bool:
        """See `Task.grade`."""
        return grade(text, answer)

    def first_error(self, problem: str, response: str) -> int | None:
        """See `Task.first_error`."""
        return first_error(problem, response)

    def labels(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.labels`."""
        return [label.kind for label in label_tokens(problem, tokens)]

    def skills(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.skills`."""
        return skills(problem, tokens)

    def error_kind(self, problem: str, tokens: Sequence[str]) -> str | None:
        """See `Task.error_kind`."""
        return error_kind(problem, tokens)

    def model(self, role: str) -> Path:
        """See `Task.model`."""
        if role not in get_args(Role):
            raise ValueError("the bundled models are gym:student, gym:teacher and gym:persona")
        if self.world != Worlds(surface=self.world.surface):
            raise ValueError("late, spoil and lost are of the data: data.train: gym:train?late=1")
        if self.world.surface < 1 and role != "student":
            raise ValueError("surface is the student's: student.model: gym:student?surface=0")
        return student(self.world.surface) if role == "student" else model_dir(cast(Role, role))

    def stated(self, answer: str) -> str:
        """See `Task.stated`."""
        return f"ans {answer}"
