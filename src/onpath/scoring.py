"""Per-token statistics of given responses under two models, outside a run."""

from collections.abc import Sequence

import torch
from torch import nn

from onpath.batch import collate, micro_batches
from onpath.losses import TeacherHidden, TokenStats, token_stats
from onpath.models import head_of, hidden_states
from onpath.records import Trajectory


@torch.no_grad()
def score_pairs(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    name: str = "reverse_kl",
    max_tokens: int = 16_384,
) -> list[list[float]]:
    """One statistic per response token of each (context, response), in the order given.

    Args:
        name: a field of `TokenStats`: reverse_kl (nats), teacher_logp, student_entropy, …
    """
    device = next(student.parameters()).device
    trajectories = [
        Trajectory(student_context=tuple(c), teacher_context=tuple(c), response=tuple(r)) for c, r in pairs
    ]
    order = {id(t): i for i, t in enumerate(trajectories)}
    results: list[list[float]] = [[] for _ in trajectories]
    for micro in micro_batches(trajectories, max_tokens=max_tokens):
        batch = collate(micro, device=device)
        hidden_N = hidden_states(student, batch.student_ids_BS, batch.student_mask_BS)
        teacher_N = hidden_states(teacher, batch.teacher_ids_BT, batch.teacher_mask_BT)
        stats: TokenStats = token_stats(
            student_hidden=hidden_N.flatten(0, 1)[batch.student_at_N],
            student_head=head_of(student),
            teacher=TeacherHidden(hidden=teacher_N.flatten(0, 1)[batch.teacher_at_N], head=head_of(teacher)),
            sampled_ids=batch.token_N,
        )
        for trajectory, values in zip(batch.trajectories, batch.by_row(getattr(stats, name)), strict=True):
            results[order[id(trajectory)]] = values
    return results
