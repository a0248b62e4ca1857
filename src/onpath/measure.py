"""Per-token statistics of student and teacher along trajectories, without gradients: what diagnostics, edits
and token weights look at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onpath.batch import Batch, collate, micro_batches
from onpath.losses import StatsRequest, TokenStats, token_stats
from onpath.models import head_of, hidden_states
from onpath.records import Trajectory
from onpath.teacher import Teacher

Values = dict[str, list[float]]
"""Statistic → one value per response token."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Reads trajectories with the student that trains and the teacher that scores."""

    student: nn.Module
    teacher: Teacher
    vocabulary: int
    device: torch.device
    max_tokens: int
    """Padded tokens of one forward pass."""
    bf16: bool = False

    @torch.no_grad()
    def batches(
        self, trajectories: Sequence[Trajectory], *, mass_ids: Sequence[int] = ()
    ) -> list[tuple[Batch, TokenStats]]:
        """One forward pass of each model; trajectories without a response are left out."""
        request = StatsRequest(mass_ids=torch.tensor(mass_ids, device=self.device) if mass_ids else None)
        found = []
        was_training = self.student.training
        self.student.eval()
        for micro in micro_batches(trajectories, max_tokens=self.max_tokens):
            batch = collate(micro, device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                hidden_BSH = hidden_states(self.student, batch.student_ids_BS, batch.student_mask_BS)
            stats = token_stats(
                student_hidden=hidden_BSH.flatten(0, 1)[batch.student_at_N],
                student_head=head_of(self.student, self.vocabulary),
                teacher=self.teacher.scores(batch),
                sampled_ids=batch.token_N,
                stats=request,
            )
            found.append((batch, stats))
        self.student.train(was_training)
        return found

    def __call__(self, trajectories: Sequence[Trajectory], *, mass_ids: Sequence[int] = ()) -> list[Values]:
        """The statistics that this teacher can give, in the trajectories' order; empty where nothing is
        read."""
        by_id: dict[int, Values] = {}
        for batch, stats in self.batches(trajectories, mass_ids=mass_ids):
            for name, value_N in vars(stats).items():
                if isinstance(value_N, Tensor) and value_N.ndim == 1:
                    for trajectory, values in zip(batch.trajectories, batch.by_row(value_N), strict=True):
                        by_id.setdefault(id(trajectory), {})[name] = values
        return [by_id.get(id(t), {}) for t in trajectories]
