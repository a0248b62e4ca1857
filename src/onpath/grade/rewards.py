"""Rewards: functions of the user's own that score a rollout. Logged always; a filter or a weight where asked
for.

    def brevity(text, answer):              # any of text, answer, prompt, rollout, by name
        return 1.0 / (1 + len(text))
"""

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onpath.records import Rollout
from onpath.system import code
from onpath.system.errors import UserError

ARGUMENTS = ("text", "answer", "prompt", "rollout")
"""What a reward may ask for: the response's text, the reference answer or None, the two records."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One function and its part in the total.

    Raises:
        UserError: it needs something else than `ARGUMENTS`.
    """

    label: str
    function: Callable[..., float]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UserError(f"rewards.{self.label}: must be a function, not {type(self.function).__name__}")
        unfilled = [p.name for p in _parameters(self.function) if p.default is p.empty]
        if foreign := [name for name in unfilled if name not in ARGUMENTS]:
            raise UserError(
                f"rewards.{self.label}: its parameter {foreign[0]} is none of {', '.join(ARGUMENTS)}"
            )

    def __call__(self, rollout: Rollout, text: str) -> float:
        """The value of one rollout.

        Raises:
            UserError: the function fails, or gives no finite number.
        """
        known: Mapping[str, Any] = {
            "text": text,
            "answer": rollout.prompt.answer,
            "prompt": rollout.prompt,
            "rollout": rollout,
        }
        asked = {p.name: known[p.name] for p in _parameters(self.function) if p.name in known}
        on = f"for prompt {rollout.prompt.id!r}"
        try:
            given = self.function(**asked)
        except code.FAILURES as error:
            modules = code.modules_of(self.function)
            raise code.failure(f"rewards.{self.label}", error, modules, on=on) from error
        try:
            value = float(given)
        except code.FAILURES:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(
                f"rewards.{self.label} gave {reprlib.repr(given)} {on}; it must give a finite number"
            )
        return value


def _parameters(function: Callable[..., float]) -> list[inspect.Parameter]:
    """Those that it is given by name, or has a value for; *args and **kwargs need none."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind not in several]


def values_of(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], texts: Sequence[str]
) -> dict[str, list[float]]:
    """Label → one value per rollout."""
    return {r.label: [r(y, text) for y, text in zip(rollouts, texts, strict=True)] for r in rewards}


def totals(rewards: Sequence[Reward], values: Mapping[str, Sequence[float]], count: int) -> list[float]:
    """Σ weight · value of each rollout."""
    return [sum(r.weight * values[r.label][i] for r in rewards) for i in range(count)]
