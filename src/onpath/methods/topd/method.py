"""TOPD: find where the near futures of student and teacher really part, and guide the next K tokens there
(arXiv 2606.00305).

    y ~ p_S(·|x),  T = 1;   ℓ_t = KL(p_S ‖ p_T) at t;   C = the 2.25% of positions with the largest ℓ_t
    T = K tokens of the teacher after y_<t,  S = y_t … y_{t+K−1};   D_t = min_γ Σ_ij γ_ij (1 − cos(S_i, T_j))
    R = {t ∈ C : D_t ≥ the upper quartile of D at quiet tokens};   ỹ_{t+i} = Σ_j γ_ij onehot(T_j)
    L = L_OPD + λ·Σ_{t∈R} Σ_i KL(ỹ_{t+i} ‖ p_S(·|x, y_<t+i)) / Σ_t 1       the contexts stay the student's own
    `plan: spliced`, in its place:   L = Σ KL(p_S ‖ p_T) over y and, for each t in R, over T after y_<t, / Σ 1

By the letter of the formula, rows of ỹ of mass 1/K. `mass: row` scales them to 1 and warns. Where windows
overlap the targets are summed: the formula's gradient; the value differs from it by a constant. What predicts
whether targets harm is logged in every run: the share of ỹ on the teacher's likeliest token in the student's
context, on the student's own token, and its entropy.
Deviations that an option makes, none by default: `max_per_rollout` and `max_per_step` cap C (what they cut is
counted as `fork_candidates_dropped`); `overlap: average`.
Ours where the paper is silent: which of its two cuts defines R (that quartile is what it calls a low
divergence; `decide: quantile` drops the lowest 30% of C, as it does for suppression), both as moving
quantiles over steps; one reference window for every 16 candidates (4 to 16 a step); greedy teacher windows;
D exact, γ by Sinkhorn with ε 0.05; λ = 1, or held at a ratio of gradients; a fork needs ℓ > 0 and D > 0;
windows end where a rollout that was cut at max_new_tokens ends; a student's window that the response's end
cuts to n < K tokens has rows of mass 1/n; with `student_window: regenerate` only D sees the fresh sample;
`spliced` is ours altogether.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from onpath.config.methods.topd import TOPDOptions
from onpath.engines.forward import Kept, forward
from onpath.methods.base import Method, Prepared, own_response
from onpath.methods.tools import Tools
from onpath.methods.topd import candidates, decide, futures, guide, pairs
from onpath.methods.topd.candidates import Fork
from onpath.records import Prompt, Rollout, Trajectory

_READ = ("reverse_kl", "student_logp", "teacher_logp", "teacher_top_ids")


class TOPD(Method):
    """Annotates the student's rollouts with guidance; the responses stay as they are."""

    Options = TOPDOptions
    options: TOPDOptions

    def __init__(self, options: TOPDOptions, tools: Tools) -> None:
        super().__init__(options, tools)
        start = 1.0 if options.guidance_weight == "auto" else options.guidance_weight
        self.guidance_weight = torch.tensor(start, dtype=torch.float64)
        self.threshold = torch.tensor(torch.nan, dtype=torch.float64)
        self.seconds: dict[str, float] = {}
        self.capped = 0
        """Candidates of this process's step that a cap cut off."""
        self.likeliest: dict[int, list[int]] = {}
        """Rollout → the teacher's likeliest token at each position of the response."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """See `Method.check`."""
        pairs.check_layer(self.options, self.tools.models.student)

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        options, tools = self.options, self.tools
        trained = [own_response(r, length=options.first_tokens) for r in rollouts]
        kept = Kept()
        found = decide.suppressed(self.forks(rollouts, trained, kept, step), options)
        guided = [f for f in found if f.decision == "fork"] if options.guide else []
        with self.timed("transport"):
            plans = guide.guidance_plans(guided, rollouts, tools, options, step)
        with self.timed("targets"):
            marked = guide.annotated(trained, found, guided, plans, options, tools.text.renderer.tokens)
        counted = guide.counted(found, marked)
        harm = guide.what_targets_say(marked, self.likeliest)
        with self.timed("windows"):
            windows, finishing = guide.whole_windows(guided, rollouts, tools, options, step)
        marked += guide.spliced(guided, windows, rollouts, options)
        return Prepared(
            trajectories=marked,
            kept=kept,
            guidance_weight=float(self.guidance_weight),
            means={**counted["means"], **harm},
            totals={
                **counted["totals"],
                "teacher_tokens_generated": counted["totals"]["teacher_tokens_generated"] + finishing,
                "fork_candidates_dropped": self.capped,
            },
            metrics={
                "guidance_weight": float(self.guidance_weight),
                "fork_threshold": None if self.threshold.isnan() else float(self.threshold),
                "topd_seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            },
        )

    def scored_first(self, rollout: Rollout) -> Trajectory:
        """See `Method.scored_first`."""
        return own_response(rollout, length=self.options.first_tokens)

    def forks(
        self,
        rollouts: Sequence[Rollout],
        trained: Sequence[Trajectory],
        kept: Kept,
        step: int,
        starts: Sequence[int] | None = None,
    ) -> list[Fork]:
        """The candidates with both futures, their distance, and whether they are real.

        Args:
            starts: of each rollout the first token that may be one; None: each may.
        """
        self.seconds = dict.fromkeys(("read", "windows", "transport", "targets"), 0.0)
        found = self.candidates(rollouts, trained, kept, step, starts or [0] * len(rollouts))
        with self.timed("transport"):
            found = pairs.with_distances(found, rollouts, self.tools, self.options)
        self.follow(decide.quantile_of(found, self.options))
        return decide.decided(found, self.options, float(self.threshold))

    def candidates(
        self,
        rollouts: Sequence[Rollout],
        trained: Sequence[Trajectory],
        kept: Kept,
        step: int,
        starts: Sequence[int],
    ) -> list[Fork]:
        """With both futures, one micro-batch after the other: one of the teacher's caches is in memory."""
        options, seed = self.options, self.tools.sampling.seed
        lengths = [max(0, len(t.response) - start) for t, start in zip(trained, starts, strict=True)]
        keys = [f"step {step}/{r.key}" for r in rollouts]
        counts = candidates.candidate_counts(lengths, options, keys=keys, seed=seed)
        self.capped = sum(candidates.uncapped_counts(lengths, options)) - sum(counts)
        references = candidates.reference_counts(counts, keys, options, seed=seed)
        found: list[Fork] = []
        self.likeliest = {}
        begun = time.perf_counter()
        for one in forward(self.tools.models, trained, keep=kept, past=options.reuse_cache, top_k=1):
            here: list[Fork] = []
            for row, values in one.by_place(_READ):
                self.likeliest[row] = [int(ids[0]) for ids in cast(Any, values["teacher_top_ids"])]
                here += candidates.select(
                    values,
                    row=row,
                    count=counts[row],
                    key=keys[row],
                    options=options,
                    seed=seed,
                    references=references[row],
                    start=starts[row],
                )
            with self.timed("windows"):
                found += futures.with_windows(here, rollouts, self.tools, options, step, one)
        self.seconds["read"] = time.perf_counter() - begun - self.seconds["windows"]
        return sorted(found, key=lambda f: (f.row, f.position))

    def follow(self, quantile: float | None) -> None:
        """Moves the threshold towards this step's quantile."""
        decide.follow(self.threshold, quantile, decay=self.options.quantile_decay)

    def after_step(self, measured: Mapping[str, Any]) -> None:
        """λ: auto moves so that the last step's ratio of gradients would have been the wanted one."""
        ratio = measured.get("guidance_grad_ratio", 0.0)
        if self.options.guidance_weight == "auto" and ratio > 0:
            self.guidance_weight *= min(4.0, max(0.25, self.options.auto_ratio / ratio))

    def state(self) -> Mapping[str, Tensor]:
        """See `Method.state`."""
        return {"topd.threshold": self.threshold, "topd.guidance_weight": self.guidance_weight}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begun
