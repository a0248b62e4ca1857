"""What stands between a method's trajectories and the loss: truncation, token weights, inputs of the
objective."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from onpath import distributed
from onpath.assemble import Parts
from onpath.batch import Batch
from onpath.records import Trajectory


def shaped(parts: Parts, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Trajectories with `method.first_tokens` and `method.reweight` applied."""
    options = parts.config.method
    if options.first_tokens is not None:
        trajectories = [truncated(t, options.first_tokens) for t in trajectories]
    return reweighted(parts, trajectories) if options.reweight != "none" else list(trajectories)


def truncated(trajectory: Trajectory, length: int) -> Trajectory:
    """Only the first `length` response tokens; the rest is neither read nor counted."""
    if len(trajectory.response) <= length:
        return trajectory
    behaviour = trajectory.behaviour_logprobs
    return replace(
        trajectory,
        response=trajectory.response[:length],
        weights=None if trajectory.weights is None else trajectory.weights[:length],
        guidance=tuple(
            replace(g, targets=g.targets[: length - g.start]) for g in trajectory.guidance if g.start < length
        ),
        behaviour_logprobs=None if behaviour is None else behaviour[:length],
    )


def reweighted(parts: Parts, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Weights in proportion to a statistic of each token, with mean 1 over the step's tokens of all
    processes."""
    name = {
        "teacher_entropy": "teacher_entropy",
        "student_entropy": "student_entropy",
        "divergence": "reverse_kl",
    }[parts.config.method.reweight]
    found: list[tuple[Trajectory, list[float]]] = []
    for batch, stats in parts.measure.batches(trajectories):
        found += zip(batch.trajectories, batch.by_row(getattr(stats, name)), strict=True)
    raw = [[w * s for w, s in zip(t.token_weights, values, strict=True)] for t, values in found]
    count = sum(sum(t.token_weights) for t, _ in found)
    weight, tokens = distributed.total([sum(map(sum, raw)), count], parts.device)
    scale = tokens / weight if weight > 0 else 0.0
    return [replace(t, weights=tuple(w * scale for w in row)) for (t, _), row in zip(found, raw, strict=True)]


def loss_inputs(parts: Parts, batch: Batch) -> dict[str, Any]:
    """What some objectives need beside hidden states, tokens and weights."""
    inputs: dict[str, Any] = {}
    if parts.objective.kind == "sampled":
        behaviour = [t.behaviour_logprobs for t in batch.trajectories]
        if parts.objective.ppo_clip is not None:
            flat = [p for row in behaviour for p in (row or ())]
            inputs["behaviour_logp"] = torch.tensor(flat, device=parts.device)
        if parts.objective.discount:
            inputs["sequence_ids"] = batch.row_N
    return inputs
