"""Trajectories → tensors. The one place that shifts, pads, masks and counts.

Position t of a response of length L after a context of length C is predicted at index C − 1 + t of the
sequence. Student and teacher have contexts of different lengths, so each has its own index for the same t;
everything later works on N = all response tokens of the batch, laid end to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onpath.records import Trajectory

# Where a micro-batch ends before it is full. On a CPU: from so many padded tokens on, at a row shorter than
# this share of its longest one. Elsewhere, when so many of its tokens would be padding: a pass takes the time
# of its launches however few tokens it has, and in shards it gathers all weights.
_BUSY_TOKENS, _SIMILAR = 2048, 0.95
_PADDING_TOKENS = 2048
# B rows, S and T padded lengths of student and teacher, N response tokens.


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded ids of both sides, and where in them each response token is predicted."""

    student_ids_BS: Tensor
    teacher_ids_BT: Tensor
    student_at_N: Tensor
    """Index into the flattened [B·S] of the position that predicts the token."""
    teacher_at_N: Tensor
    """Index into the flattened [B·T] of the position that predicts the token."""
    token_N: Tensor
    """The response token itself."""
    weight_N: Tensor
    """Its weight in the loss."""
    counted_N: Tensor
    """Whether it is in the loss's count."""
    row_N: Tensor
    """Which trajectory it belongs to."""
    trajectories: tuple[Trajectory, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Batch(**moved)

    @property
    def teacher(self) -> str | None:
        """The one of several teachers that scores all of it (see `micro_batches`)."""
        names = {t.teacher for t in self.trajectories}
        assert len(names) == 1, f"a batch is read by one teacher, not by {len(names)}"
        return names.pop()

    @property
    def places(self) -> list[int]:
        """Where the trajectories stand in what is read or trained on together."""
        found = [t.place for t in self.trajectories]
        assert None not in found, "a trajectory of this batch was never given its place"
        return [place for place in found if place is not None]

    def at_student(self, hidden_BSH: Tensor) -> Tensor:
        """The student's hidden states [N, H] that predict each response token."""
        return hidden_BSH.flatten(0, 1)[self.student_at_N]

    def at_teacher(self, hidden_BTH: Tensor) -> Tensor:
        """The teacher's, likewise; the hidden states may be on another device, where the result is too."""
        return hidden_BTH.flatten(0, 1)[self.teacher_at_N.to(hidden_BTH.device)]

    def by_row(self, value_N: Tensor) -> list[list[float]]:
        """Per-token values as one list per trajectory."""
        sizes = [len(t.response) for t in self.trajectories]
        return [part.tolist() for part in value_N.cpu().split(sizes)]


def collate(trajectories: Sequence[Trajectory], *, device: torch.device | None = None) -> Batch:
    """Right-padded tensors. The pad id is 0 and never read: no causal model looks ahead at it, and no index
    points at it."""
    student = [t.student_context + t.response for t in trajectories]
    teacher = [t.teacher_context + t.response for t in trajectories]
    student_ids = _pad_right(student)
    teacher_ids = student_ids if teacher == student else _pad_right(teacher)
    lengths = torch.tensor([len(t.response) for t in trajectories])
    row_N = torch.repeat_interleave(torch.arange(len(trajectories)), lengths)
    step_N = torch.cat([torch.arange(n) for n in lengths.tolist()]) if len(row_N) else row_N
    batch = Batch(
        student_ids_BS=student_ids,
        teacher_ids_BT=teacher_ids,
        student_at_N=_predicting(
            row_N, step_N, [len(t.student_context) for t in trajectories], student_ids.shape[1]
        ),
        teacher_at_N=_predicting(
            row_N, step_N, [len(t.teacher_context) for t in trajectories], teacher_ids.shape[1]
        ),
        token_N=torch.tensor([i for t in trajectories for i in t.response], dtype=torch.long),
        weight_N=torch.tensor([w for t in trajectories for w in t.token_weights], dtype=torch.float32),
        counted_N=torch.tensor([c for t in trajectories for c in t.in_count], dtype=torch.bool),
        row_N=row_N,
        trajectories=tuple(trajectories),
    )
    return batch if device is None else batch.to(device)


def micro_batches(
    trajectories: Sequence[Trajectory], *, max_tokens: int, device: torch.device
) -> Iterator[list[Trajectory]]:
    """Trajectories of one teacher and of similar length together, teacher after teacher, longest first,
    within a budget of padded tokens per side.

    A batch also ends where padding would begin to cost more than another pass. Empty responses train nothing
    and are left out. A trajectory longer than the budget makes a batch of its own.

    Args:
        device: where they will be read.
    """

    def length(t: Trajectory) -> int:
        return max(len(t.student_context), len(t.teacher_context)) + len(t.response)

    rows: list[Trajectory] = []
    held = 0  # tokens of the rows
    some = (t for t in trajectories if t.response)
    for trajectory in sorted(some, key=lambda t: (t.teacher or "", -length(t))):
        longest, mine = length(rows[0]) if rows else 0, length(trajectory)
        if device.type == "cpu":
            pads = len(rows) * longest >= _BUSY_TOKENS and mine < _SIMILAR * longest
        else:
            pads = (len(rows) + 1) * longest - held - mine > _PADDING_TOKENS
        other = rows and rows[0].teacher != trajectory.teacher
        if rows and (other or pads or (len(rows) + 1) * longest > max_tokens):
            yield rows
            rows, held = [], 0
        rows.append(trajectory)
        held += mine
    if rows:
        yield rows


def _pad_right(rows: Sequence[tuple[int, ...]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows])


def _predicting(row_N: Tensor, step_N: Tensor, context_lengths: Sequence[int], width: int) -> Tensor:
    """Flat index of the position before each token: the last context position for the first one."""
    return row_N * width + torch.tensor(context_lengths)[row_N] - 1 + step_N
