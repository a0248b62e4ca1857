"""From trajectories in a batch to the loss: both models' states, guidance, the objective's inputs."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpath.data.batch import Batch
from onpath.engines.forward import Models
from onpath.losses import (
    LossResult,
    Objective,
    SparseGuidance,
    StatsRequest,
    TeacherHidden,
    TeacherScores,
    fused_objective,
)
from onpath.methods.base import Prepared
from onpath.run.importance import Importance
from onpath.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the micro-batches of one optimiser step share."""

    prepared: Prepared
    objective: Objective
    denominator: float
    """Response tokens that count, over all processes."""
    importance: Importance = field(default_factory=Importance)
    guided: bool = False
    """Whether a trajectory of any process carries guidance."""
    top_k: int = 0
    """Likeliest tokens of both models that are looked up and stored."""


def loss_of(models: Models, batch: Batch, teacher: TeacherScores | None, step: Step) -> LossResult:
    """Weighted sum of the objective over the batch's response tokens ÷ the step's global count."""
    hidden_NH = student_states(models, batch, step.prepared)
    weight_N = step.importance.weights(batch, hidden_NH, models)
    return _loss(models, batch, teacher, step, hidden_NH, weight_N)


def guidance_loss(models: Models, batch: Batch, teacher: TeacherScores | None, step: Step) -> Tensor:
    """The guidance's part of `loss_of` alone, by a forward pass of its own; later draws are as without it."""
    devices = [models.device] if models.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        hidden_NH = models.student_states(batch)
    return _loss(models, batch, teacher, step, hidden_NH, torch.zeros_like(batch.weight_N)).loss


def _loss(
    models: Models,
    batch: Batch,
    teacher: TeacherScores | None,
    step: Step,
    hidden_NH: Tensor,
    weight_N: Tensor,
) -> LossResult:
    head = models.head
    with models.autocast():  # on a GPU a float32 head multiplies in half precision then, as its layers do
        return fused_objective(
            student_hidden=hidden_NH,
            student_head=head,
            teacher=teacher,
            objective=step.objective,
            sampled_ids=batch.token_N,
            weights=weight_N,
            denominator=step.denominator,
            **loss_inputs(batch, step),
        )


def teacher_states(models: Models, batch: Batch, prepared: Prepared) -> TeacherScores | None:
    """What the teacher makes of the batch, unless the method has asked already."""
    known_NH, head = prepared.kept.teacher_hidden(batch), models.teacher.of(batch.teacher).head
    if known_NH is not None and head is not None:
        return TeacherHidden(hidden=known_NH, head=head)
    return models.teacher.scores(batch)


def student_states(models: Models, batch: Batch, prepared: Prepared) -> Tensor:
    """The student's hidden states [N, H] with their graph, unless the method has run it with one."""
    known_NH = prepared.kept.student_hidden(batch)
    return models.student_states(batch) if known_NH is None else known_NH


def loss_inputs(batch: Batch, step: Step) -> dict[str, Any]:
    """What is measured beside the loss, and what some objectives need beside states, tokens and weights."""
    inputs: dict[str, Any] = {"stats": StatsRequest(top_k=step.top_k)}
    if step.guided:
        inputs["guidance"] = sparse_guidance(batch, strength=step.prepared.guidance_weight)
    if step.objective.kind == "sampled":
        behaviour = [t.behaviour_logprobs for t in batch.trajectories]
        if step.objective.ppo_clip is not None:
            flat = [p for row in behaviour for p in (row or ())]
            inputs["behaviour_logp"] = torch.tensor(flat, device=batch.token_N.device)
        if step.objective.discount:
            inputs["sequence_ids"] = batch.row_N
        inputs["advantage"] = _advantages(batch)
    return inputs


def _advantages(batch: Batch) -> Tensor | None:
    given = [t.advantages for t in batch.trajectories]
    if not any(row is not None for row in given):
        return None
    if any(row is None for row in given):
        raise UserError(
            "some trajectories of a step have Trajectory.advantages and others have none; a method must give "
            "them to all"
        )
    return torch.tensor([a for row in given for a in row or ()], device=batch.token_N.device)


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
