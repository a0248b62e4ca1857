"""From trajectories in a batch to the loss: both models' states, guidance, the objective's inputs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpath.config.build import Config
from onpath.config.methods.topd import TOPDOptions
from onpath.data.batch import Batch
from onpath.engines.head import hidden_states
from onpath.engines.teacher import ModelTeacher, SelfTeacher
from onpath.losses import (
    LossResult,
    SparseGuidance,
    StatsRequest,
    TeacherHidden,
    TeacherScores,
    fused_objective,
)
from onpath.methods import Prepared
from onpath.run.parts import Parts
from onpath.run.trajectories import TOP_TOKENS, is_stored


def loss_of(
    parts: Parts,
    batch: Batch,
    teacher: TeacherScores | None,
    prepared: Prepared,
    denominator: float,
    top_k: int = 0,
) -> LossResult:
    """Weighted sum of the objective over the batch's response tokens ÷ the step's global count."""
    return fused_objective(
        student_hidden=student_states(parts, batch, prepared),
        student_head=parts.head,
        teacher=teacher,
        objective=parts.objective,
        sampled_ids=batch.token_N,
        weights=batch.weight_N,
        denominator=denominator,
        **loss_inputs(parts, batch, prepared, top_k),
    )


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
