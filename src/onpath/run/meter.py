"""Measures one optimiser step: sums with counts, divided only when a line is written."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from onpath.data.batch import Batch
from onpath.losses import LossResult
from onpath.records import WRITERS, Rollout
from onpath.run.loss import Step
from onpath.run.origins import Judged
from onpath.run.per_teacher import PerTeacher
from onpath.system import distributed

STAGES = ("sample", "correct", "score", "train", "sync")
PER_TOKEN = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp")
"""Statistics of the loss's own pass that are averaged per step and stored per token."""
TOPS = ("student_top_ids", "student_top_logp", "teacher_top_ids", "teacher_top_logp")
"""Likewise, where the pass was asked for the likeliest tokens: a list per token."""
_NATS = {
    "reverse_kl": "reverse_kl_nats",
    "forward_kl": "forward_kl_nats",
    "student_entropy": "student_entropy_nats",
    "teacher_entropy": "teacher_entropy_nats",
}
_TOTAL, _COUNT = "total of ", "count of "
_RATIOS = ("ratio", "ratio above the cap", "tokens of ratio")


class Stopwatch:
    """Seconds by stage; on a GPU each stage waits for its kernels: they are not billed to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = self._now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - begun

    def rounded(self) -> dict[str, float]:
        return {stage: round(seconds, 4) for stage, seconds in self.seconds.items()}

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(kw_only=True)
class Meter:
    """What one optimiser step did, on this process."""

    watch: Stopwatch
    rollouts: Sequence[Rollout]
    step: Step
    judged: Judged
    """Of the rollouts."""
    of_origins: Judged
    """Of the rollouts and of what else trajectories come from."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """`row`, once the step is done."""
    drawn: int | None = None
    """Tokens of rollouts that this process generated in this step; None: those of `rollouts`."""
    scored: Mapping[str, float] = field(default_factory=dict)
    """What the teacher says that it did (`Teacher.measured`)."""
    grad_norm: float = 0.0
    gradient_cosine: float | None = None
    """Of this step's gradient and the last one's, before clipping."""
    guidance_ratio: float | None = None
    """|λ∇L_traj| / |∇L_OPD| of the trained weights, before clipping."""
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    per_teacher: PerTeacher
    per_token: dict[int, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    """A trajectory's place → statistic → one value per response token."""
    top: dict[int, dict[str, list[Any]]] = field(default_factory=lambda: defaultdict(dict))
    """A trajectory's place → one of `TOPS` → a list per response token, likeliest first."""

    def add(self, batch: Batch, result: LossResult) -> None:
        """One micro-batch."""
        counted, places = batch.counted_N, batch.places
        self.per_teacher.add(batch, result.stats)
        self.sums["loss"] += float(result.loss.detach())
        self.sums["objective"] += float(result.objective_sum)
        self.sums["guidance"] += float(result.guidance_sum)
        self.sums["counted"] += float(counted.sum())
        for name in PER_TOKEN:
            value_N = getattr(result.stats, name)
            if value_N is None:
                continue
            self.sums[name] += float(value_N[counted].double().sum())
            self.sums[f"tokens of {name}"] += float(counted.sum())
            for place, values in zip(places, batch.by_row(value_N), strict=True):
                self.per_token[place][name] = values
        if result.stats.student_logp is not None:
            logp_N, ends = result.stats.student_logp, self.step.objective.ends
            found = self.step.importance.measured(batch, logp_N, ends=ends)
            for name, value in zip(_RATIOS, found, strict=True):
                self.sums[name] += value
        if result.stats.overlap is not None:
            self.sums["overlap"] += float(result.stats.overlap[counted].double().sum())
            self.sums["tokens of overlap"] += float(counted.sum())
        for name in TOPS:
            top_Nk = getattr(result.stats, name)
            if top_Nk is not None:
                for place, lists in zip(places, batch.by_row(top_Nk), strict=True):
                    self.top[place][name] = lists

    def _of_guidance(self, device: torch.device) -> dict[str, float]:
        """Over all processes: its part of the loss, and where due |λ∇L_traj| / |∇L_OPD|."""
        if not self.step.guided:
            return {}
        (guidance,) = distributed.total([self.sums["guidance"]], device)
        ratio = {} if self.guidance_ratio is None else {"guidance_grad_ratio": self.guidance_ratio}
        return {"guidance": guidance, **ratio}

    def row(self, device: torch.device) -> dict[str, Any]:
        """The step's metrics over all processes, but for its seconds."""
        verdicts = [v.correct for v in self.judged.verdicts if v is not None]
        lengths = [len(r.ids) for r in self.rollouts]
        own = sum(r.written_by.count("student") for r in self.rollouts)
        totals = {**self.step.prepared.totals, **self.scored}
        # What the method had the student generate beside the rollouts.
        continued = totals.pop("student_tokens_generated", 0)
        written = Counter(
            who
            for t in self.step.prepared.trajectories
            if t.edit.kept
            for who, counts in zip(t.written_by, t.in_count, strict=True)
            if counts
        )
        rewards = {k: (sum(v), float(len(v))) for k, v in self.judged.rewards.items()}
        means = {**self.step.prepared.means, **rewards}
        mine = {
            **{k: self.sums[k] for k in ("loss", "counted", *_NATS, *_RATIOS)},
            **{k: self.sums[k] for k in (f"tokens of {name}" for name in _NATS)},
            **{k: self.sums[k] for k in ("overlap", "tokens of overlap")},
            "rollouts": len(lengths),
            "lengths": sum(lengths),
            "generated": (own if self.drawn is None else self.drawn) + continued,
            "right": sum(verdicts),
            "graded": len(verdicts),
            "finished": sum(r.finish_reason == "stop" for r in self.rollouts),
            "behind": sum(self.judged.behind),
            "looked at": sum(lengths) if self.judged.behind else 0,
            **{f"{_TOTAL}{k}": v for k, v in totals.items()},
            **{f"written by {who}": written[who] for who in WRITERS},
            **{f"sum of {k}": total for k, (total, _) in means.items()},
            **{f"{_COUNT}{k}": count for k, (_, count) in means.items()},
        }
        all_of = distributed.total_by_name(mine, device)
        # Those of all processes: a method may report what it has met.
        totals = {k.removeprefix(_TOTAL): v for k, v in all_of.items() if k.startswith(_TOTAL)}
        counts = {k.removeprefix(_COUNT): v for k, v in all_of.items() if k.startswith(_COUNT)}
        rollouts = max(all_of["rollouts"], 1.0)
        row: dict[str, Any] = {"loss": all_of["loss"], "tokens": int(all_of["counted"])}
        for name, label in _NATS.items():  # None: no token, or a teacher that does not say
            tokens = all_of[f"tokens of {name}"]
            row[label] = all_of[name] / tokens if tokens else None
        if tokens := all_of["tokens of ratio"]:
            row["importance_ratio"] = all_of["ratio"] / tokens
            row["importance_capped"] = all_of["ratio above the cap"] / tokens
        if tokens := all_of["tokens of overlap"]:
            row["top_overlap"] = all_of["overlap"] / tokens
        row |= {
            "accuracy": all_of["right"] / all_of["graded"] if all_of["graded"] else None,
            "mean_length": all_of["lengths"] / rollouts,
            "finished": all_of["finished"] / rollouts,
            **(
                {"tokens_behind_error": all_of["behind"] / all_of["looked at"]} if all_of["looked at"] else {}
            ),
            "student_tokens_generated": int(all_of["generated"]),
            "tokens_written_by": {who: int(all_of[f"written by {who}"]) for who in WRITERS},
            "grad_norm": self.grad_norm,
            **{k: int(v) if v.is_integer() else v for k, v in totals.items()},
        }
        for k, count in counts.items():
            row[k] = all_of[f"sum of {k}"] / count if count else None
        if self.gradient_cosine is not None:
            row["gradient_cosine"] = self.gradient_cosine
        row |= self._of_guidance(device)
        row |= self.per_teacher.row(self.rollouts, self.judged.verdicts, device)
        return row | dict(self.step.prepared.metrics)
