"""The divergences that the tests go through: every built-in one, and two as a user may write them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onpath.divergence import DIVERGENCES


def squared_hellinger(*, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """½·Σ (√p_T − √p_S)²."""
    return 0.5 * ((teacher_logp / 2).exp() - (student_logp / 2).exp()).square().sum(-1)


def renyi(t: Tensor, s: Tensor) -> Tensor:
    """Of order 0.3, which is no sum over outcomes: log Σ p_T^0.3·p_S^0.7 / (0.3 − 1)."""
    return torch.logsumexp(0.3 * t + 0.7 * s, -1) / -0.7


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"kind": name} | ({"beta": 0.3} if name == "jensen_shannon" else {}) for name in DIVERGENCES},
    "squared_hellinger": {"kind": squared_hellinger},
    "renyi": {"kind": renyi},
}
"""Of `Objective`."""


def built_in(name: str, entry_clip: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The pure function of the teacher's log-probs and the student's."""
    options = {"entry_clip": entry_clip} | ({"beta": 0.3} if name == "jensen_shannon" else {})
    return lambda t, s: DIVERGENCES[name](teacher_logp=t, student_logp=s, **options)


PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: built_in(name) for name in DIVERGENCES},
    "squared_hellinger": lambda t, s: squared_hellinger(teacher_logp=t, student_logp=s),
    "renyi": renyi,
}
