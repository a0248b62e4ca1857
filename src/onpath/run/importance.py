"""Rollouts of other weights than those that train: how far both policies are apart, and what corrects for it.

    token      w_t = min(π(y_t | y_<t) / μ(y_t | y_<t), cap)
    sequence   w_t = min(Π_s π(y_s | y_<s) / μ(y_s | y_<s), cap)       for every t of the response

π is the student as it trains, μ what the tokens were drawn from; no gradient goes through w, and the count of
tokens stays (truncated importance sampling; with μ = π nothing changes). Tokens that others wrote weigh 1,
and are in no product; a prefix that branches share is in the product of each; one that a task's world has put
into a rollout (spoil) is taken for a draw. In no product either: what `method.first_tokens` cuts off, and the
student's prefix of TOPD's spliced windows, which is their context; TOPD's guidance weighs as it did. A
divergence over the whole vocabulary needs no ratio for the token itself: what is stale is the prefix that it
stands on. The mean ratio is logged always: of rollouts that are neither stale nor tempered nor truncated it
is the mismatch of sampler and trainer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onpath.data.batch import Batch
from onpath.engines.forward import Models
from onpath.losses import token_stats

_LARGEST = 20.0  # nats: e^20 is far above any cap, and finite


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How a token's weight follows from the log-ratio of both policies."""

    kind: Literal["none", "token", "sequence"] = "none"
    cap: float = 2.0

    def weights(self, batch: Batch, hidden_NH: Tensor, models: Models) -> Tensor:
        """The batch's weights [N] times w.

        Args:
            hidden_NH: the student's hidden states of the pass that trains.
        """
        if self.kind == "none":
            return batch.weight_N
        head = models.head
        with models.autocast():  # as the loss
            stats = token_stats(
                student_hidden=hidden_NH, student_head=head, teacher=None, sampled_ids=batch.token_N
            )
        assert stats.student_logp is not None
        log_N = log_ratios(batch, stats.student_logp)
        ratio_N = _ratio(self._told(batch, log_N)).clamp(max=self.cap)
        return batch.weight_N * ratio_N.masked_fill(log_N.isnan(), 1.0)

    def measured(
        self, batch: Batch, student_logp_N: Tensor, *, ends: Sequence[int] = ()
    ) -> tuple[float, float, float]:
        """Sum of the ratios of counted tokens; of how many the ratio that weighs (with `sequence` that of
        their response) is above the cap; and how many there are.

        Args:
            ends: ids whose log-prob is that of all of them together: what was drawn is one of them, so that
                they are left out; they stand in their response's product.
        """
        log_N = log_ratios(batch, student_logp_N)
        known_N = batch.counted_N & ~log_N.isnan()
        if ends:
            known_N &= ~torch.isin(batch.token_N, torch.tensor(ends, device=batch.token_N.device))
        ratio, weighs = (_ratio(x_N[known_N]).double() for x_N in (log_N, self._told(batch, log_N)))
        return float(ratio.sum()), float((weighs > self.cap).sum()), float(len(ratio))

    def _told(self, batch: Batch, log_N: Tensor) -> Tensor:
        """The log-ratio that each token's weight follows from: its own, or that of its response."""
        if self.kind != "sequence":
            return log_N
        sums = log_N.new_zeros(len(batch.trajectories)).index_add_(0, batch.row_N, log_N.nan_to_num())
        return sums[batch.row_N]


def _ratio(log: Tensor) -> Tensor:
    return log.clamp(max=_LARGEST).exp()


def log_ratios(batch: Batch, student_logp_N: Tensor) -> Tensor:
    """log π − log μ [N], nats; NaN for tokens that the student did not draw, or nobody knows from what."""
    drawn: list[float] = []
    for t in batch.trajectories:
        known = t.behaviour_logprobs is not None and len(t.behaviour_logprobs) == len(t.response)
        logps = t.behaviour_logprobs if known and t.behaviour_logprobs else (math.nan,) * len(t.response)
        pairs = zip(logps, t.written_by, strict=True)
        drawn += [logp if who == "student" else math.nan for logp, who in pairs]
    return student_logp_N.detach() - torch.tensor(drawn, device=student_logp_N.device)
