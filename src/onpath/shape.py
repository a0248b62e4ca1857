"""What stands between a method's trajectories and the loss: truncation, token weights, inputs of the
objective."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpath import distributed
from onpath.assemble import Parts
from onpath.batch import Batch
from onpath.config import Config
from onpath.losses import SparseGuidance, StatsRequest, TeacherHidden, TeacherScores
from onpath.methods import Prepared
from onpath.models import hidden_states
from onpath.options import TOPDOptions
from onpath.records import Trajectory
from onpath.store import TOP_TOKENS, is_stored
from onpath.teacher import ModelTeacher, SelfTeacher


def shaped(parts: Parts, prepared: Prepared) -> Prepared:
    """With `method.first_tokens` and `method.reweight` applied to what is trained on."""
    options, kept = parts.config.method, [t for t in prepared.trajectories if t.edit.kept]
    if options.first_tokens is not None:
        kept = [truncated(t, options.first_tokens) for t in kept]
    if options.reweight != "none":
        kept = reweighted(parts, kept)
    trained = iter(kept)
    return replace(
        prepared, trajectories=[next(trained) if t.edit.kept else t for t in prepared.trajectories]
    )


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
    processes; the order stays."""
    name = {
        "teacher_entropy": "teacher_entropy",
        "student_entropy": "student_entropy",
        "divergence": "reverse_kl",
    }[parts.config.method.reweight]
    found: list[tuple[Trajectory, list[float]]] = []
    for batch, stats in parts.tools.measure.batches(trajectories):
        found += zip(batch.trajectories, batch.by_row(getattr(stats, name)), strict=True)
    raw = [[w * s for w, s in zip(t.token_weights, values, strict=True)] for t, values in found]
    count = sum(sum(t.token_weights) for t, _ in found)
    weight, tokens = distributed.total([sum(map(sum, raw)), count], parts.device)
    scale = tokens / weight if weight > 0 else 0.0
    weighted = {
        id(t): replace(t, weights=tuple(w * scale for w in row))
        for (t, _), row in zip(found, raw, strict=True)
    }
    return [weighted.get(id(t), t) for t in trajectories]  # one without a response has nothing to weigh


def teacher_states(parts: Parts, batch: Batch, prepared: Prepared) -> TeacherScores | None:
    """What the teacher makes of the batch, unless the method has asked already."""
    known_NH = prepared.readings.teacher_hidden(batch)
    if known_NH is not None and isinstance(parts.teacher, ModelTeacher | SelfTeacher):
        return TeacherHidden(hidden=known_NH, head=parts.teacher.head)
    return parts.teacher.scores(batch)


def student_states(parts: Parts, batch: Batch, prepared: Prepared) -> Tensor:
    """The student's hidden states [N, H] with their graph, unless the method has read them with it."""
    known_NH = prepared.readings.student_hidden(batch)
    if known_NH is not None:
        return known_NH
    with parts.autocast():
        hidden_BSH = hidden_states(parts.student, batch.student_ids_BS, batch.student_mask_BS)
    return hidden_BSH.flatten(0, 1)[batch.student_at_N]


def top_k(config: Config, step: int) -> int:
    """How many of the likeliest tokens the loss's pass looks up: those that are stored with the step."""
    return TOP_TOKENS if is_stored(config, step) else 0


def loss_inputs(parts: Parts, batch: Batch, prepared: Prepared, top_k: int) -> dict[str, Any]:
    """What is measured beside the loss, and what some objectives need beside states, tokens and weights."""
    inputs: dict[str, Any] = {"stats": StatsRequest(top_k=top_k)}
    if isinstance(parts.config.method, TOPDOptions) and parts.config.method.guide:
        inputs["guidance"] = sparse_guidance(batch, strength=prepared.guidance_weight)
    if parts.objective.kind == "sampled":
        behaviour = [t.behaviour_logprobs for t in batch.trajectories]
        if parts.objective.ppo_clip is not None:
            flat = [p for row in behaviour for p in (row or ())]
            inputs["behaviour_logp"] = torch.tensor(flat, device=parts.device)
        if parts.objective.discount:
            inputs["sequence_ids"] = batch.row_N
    return inputs


def sparse_guidance(batch: Batch, *, strength: float) -> SparseGuidance:
    """The trajectories' guidance as tensors: one row per guided token, padded with mass 0, or no row."""
    starts = np.cumsum([0, *(len(t.response) for t in batch.trajectories)]).tolist()
    rows = [
        (first + g.start + i, target)
        for first, t in zip(starts, batch.trajectories, strict=False)
        for g in t.guidance
        for i, target in enumerate(g.targets)
    ]
    sizes = np.array([len(target) for _, target in rows], dtype=np.int64)
    filled = np.arange(max(sizes, default=1)) < sizes[:, None]
    ids, probs = np.zeros(filled.shape, dtype=np.int64), np.zeros(filled.shape, dtype=np.float32)
    ids[filled] = [token for _, target in rows for token in target]
    probs[filled] = [p for _, target in rows for p in target.values()]
    device = batch.token_N.device
    return SparseGuidance(
        positions=torch.tensor([p for p, _ in rows], dtype=torch.long, device=device),
        ids=torch.from_numpy(ids).to(device),
        probs=torch.from_numpy(probs).to(device),
        weights=torch.ones(len(rows), device=device),
        strength=strength,
    )
