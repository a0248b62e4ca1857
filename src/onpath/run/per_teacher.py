"""What each of several teachers measures: sums with counts, divided when a line is written."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onpath.data.batch import Batch
from onpath.grade.base import Verdict
from onpath.losses import TokenStats
from onpath.records import Rollout
from onpath.system import distributed

_MEANS = {"reverse_kl": "reverse_kl_nats", "forward_kl": "forward_kl_nats", "overlap": "overlap"}
"""Statistics of the loss's own pass, of which `overlap` (of both models' likeliest tokens) is measured where
trajectories are stored."""


@dataclass(frozen=True, kw_only=True)
class PerTeacher:
    """Of one optimiser step, on this process."""

    names: Sequence[str | None]
    """Nothing is measured where there is one teacher only."""
    sums: dict[tuple[str | None, str], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, batch: Batch, stats: TokenStats) -> None:
        """One micro-batch."""
        if len(self.names) < 2:
            return
        name, counted_N = batch.teacher, batch.counted_N
        self.sums[name, "tokens"] += float(counted_N.sum())
        for of in _MEANS:
            value_N = getattr(stats, of)
            if value_N is not None:
                self.sums[name, of] += float(value_N[counted_N].double().sum())
                self.sums[name, f"tokens of {of}"] += float(counted_N.sum())

    def row(
        self, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict | None], device: torch.device
    ) -> Mapping[str, Any]:
        """`teachers` of the step's metrics, over all processes: name → its numbers; nothing with one teacher.
        None: no token, no answer to grade by, or a teacher that does not say."""
        if len(self.names) < 2:
            return {}
        found = defaultdict(float, self.sums)
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            name = rollout.prompt.teacher
            found[name, "rollouts"] += 1
            if verdict is not None:
                found[name, "graded"] += 1
                found[name, "right"] += verdict.correct
        sums = ("tokens", *_MEANS, *(f"tokens of {of}" for of in _MEANS), "rollouts", "graded", "right")
        keys = [(name, of) for name in self.names for of in sums]
        total = dict(zip(keys, distributed.total([found[key] for key in keys], device), strict=True))

        def mean(name: str | None, of: str, count: str) -> float | None:
            return total[name, of] / total[name, count] if total[name, count] else None

        return {
            "teachers": {
                str(name): {
                    "tokens": int(total[name, "tokens"]),
                    **{label: mean(name, of, f"tokens of {of}") for of, label in _MEANS.items()},
                    "rollouts": int(total[name, "rollouts"]),
                    "accuracy": mean(name, "right", "graded"),
                }
                for name in self.names
            }
        }
