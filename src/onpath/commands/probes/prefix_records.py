"""What the prefix-failure probe finds along rollouts, and how these are laid over each other. No torch."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from onpath.system.reading import parse_json, read_text, safely

_FEW = 3  # positions that fewer rollouts reach are not shown


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One rollout with what was found along it.

    >>> p = Probed(prompt_id="7", right=False, tokens=("a", "b"), first_error=1, positions=(0, 1), trials=4,
    ...            student=(2, 0), teacher=(4, 0), onset_mass=(0.0, 0.4), token_probability=(0.9, 0.1))
    >>> p.failed(0.1)
    (False, True)
    """

    prompt_id: str
    right: bool
    tokens: tuple[str, ...]
    first_error: int | None
    """Tokens before the first error; None: there is none, or the task has no checker of steps."""
    positions: tuple[int, ...]
    """Lengths of the prefixes that were continued."""
    trials: int
    """Continuations by each at each position."""
    student: tuple[int, ...]
    """How many of the student's continuations are right."""
    teacher: tuple[int, ...]
    onset_mass: tuple[float, ...]
    """Per token: the teacher's probability that a correction opens here."""
    token_probability: tuple[float, ...]
    """Per token: the teacher's probability of the token that the student wrote."""

    def failed(self, epsilon: float) -> tuple[bool, ...]:
        """Whether both succeed with rate below ε, at each position."""
        both = zip(self.student, self.teacher, strict=True)
        return tuple(max(s, t) < epsilon * self.trials for s, t in both)


def read_probed(path: Path) -> list[Probed]:
    """The probe's JSON lines.

    Raises:
        UserError: the file is not what the probe writes.
    """
    names = [field.name for field in fields(Probed)]

    def read() -> list[Probed]:
        rows = map(parse_json, read_text(path, most=2**30).splitlines())
        return [Probed(**{name: row[name] for name in names}) for row in rows]

    return cast(list[Probed], safely(read, where=f"{path}: not lines of the prefix-failure probe, or"))


def clearest(found: Sequence[Probed]) -> tuple[list[Probed], bool]:
    """Rollouts whose first error is known, and True; if there are none, the wrong ones, else all."""
    known = [p for p in found if p.first_error is not None]
    return known or [p for p in found if not p.right] or list(found), bool(known)


def by_offset(
    found: Sequence[Probed], values: Callable[[Probed], list[tuple[int, float]]], *, few: int = _FEW
) -> dict[int, list[float]]:
    """Offset from the first error (or from the start) → one value per rollout that reaches it; offsets that
    fewer than `few` rollouts reach are left out."""
    grouped: dict[int, list[float]] = defaultdict(list)
    for p in found:
        for position, value in values(p):
            grouped[position - (p.first_error or 0)].append(value)
    return {offset: v for offset, v in sorted(grouped.items()) if len(v) >= min(few, len(found))}


def rates(who: str) -> Callable[[Probed], list[tuple[int, float]]]:
    """Of a rollout: (prefix length, share of right continuations by `student` or `teacher`)."""
    return lambda p: [(t, n / p.trials) for t, n in zip(p.positions, getattr(p, who), strict=True)]
