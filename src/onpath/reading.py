"""One look at the response tokens with both models before the loss, which then need not look again.

The weights do not move between a method's `prepare` and the loss of the same step, so the teacher's hidden
states are kept for the loss always, and the student's with their graph where one micro-batch holds the whole
step. (The graphs of several would be in memory together.)

Shape suffixes: B rows, S padded length, N response tokens, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onpath.batch import Batch, collate, micro_batches
from onpath.engines.branches import Past
from onpath.losses import StatsRequest, TeacherHidden, TokenStats, token_stats
from onpath.measure import Measure
from onpath.models import head_of, hidden_states
from onpath.records import Trajectory
from onpath.teacher import ModelTeacher

Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Context and response: hidden states depend on nothing else."""


@dataclass(kw_only=True)
class Readings:
    """Hidden states of one step, handed to the loss."""

    teacher: dict[Key, Tensor] = field(default_factory=dict)
    student: dict[Key, Tensor] = field(default_factory=dict)
    """With graph; emptied by the first batch that uses them, since a graph can be walked back once."""

    def teacher_hidden(self, batch: Batch) -> Tensor | None:
        """[N, H], or None if a trajectory of the batch was not read."""
        return _gathered(self.teacher, [(t.teacher_context, t.response) for t in batch.trajectories])

    def student_hidden(self, batch: Batch) -> Tensor | None:
        """[N, H] with the graph of the reading, or None if it was not kept, or is used up."""
        found = _gathered(self.student, [(t.student_context, t.response) for t in batch.trajectories])
        if found is not None:
            self.student = {}
        return found


def _gathered(known: dict[Key, Tensor], keys: Sequence[Key]) -> Tensor | None:
    if not keys or not all(key in known for key in keys):
        return None
    return torch.cat([known[key] for key in keys])


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One micro-batch as both models see it."""

    batch: Batch
    stats: TokenStats
    past: Past | None
    """The teacher's keys and values, where continuations can start from them; as large as the micro-batch."""

    def by_trajectory(self) -> Iterator[tuple[Trajectory, dict[str, list[float]]]]:
        """Each trajectory with its per-token statistics."""
        rows = {
            name: self.batch.by_row(value_N)
            for name, value_N in vars(self.stats).items()
            if isinstance(value_N, Tensor) and value_N.ndim == 1
        }
        for b, trajectory in enumerate(self.batch.trajectories):
            yield trajectory, {name: values[b] for name, values in rows.items()}


def read(
    models: Measure,
    trajectories: Sequence[Trajectory],
    *,
    into: Readings | None = None,
    past: bool = False,
    mass_ids: Sequence[int] = (),
) -> Iterator[Reading]:
    """Micro-batch by micro-batch; trajectories without a response are left out.

    Args:
        models: the student that trains and the teacher that scores.
        into: receives what the loss can use again. None keeps nothing.
        past: also give the teacher's keys and values, if its attention allows it.
        mass_ids: token ids whose total teacher probability is wanted.
    """
    request = StatsRequest(mass_ids=torch.tensor(mass_ids, device=models.device) if mass_ids else None)
    micros = list(micro_batches(trajectories, max_tokens=models.max_tokens))
    graph = into is not None and len(micros) == 1
    for micro in micros:
        batch = collate(micro, device=models.device)
        student_NH = _student(models, batch, graph=graph)
        teacher_NH, memory = _teacher(models, batch, past=past)
        if into is not None:
            into.teacher |= _by_key(teacher_NH, batch, [t.teacher_context for t in micro])
            into.student |= _by_key(student_NH, batch, [t.student_context for t in micro]) if graph else {}
        stats = token_stats(
            student_hidden=student_NH,
            student_head=head_of(models.student, models.vocabulary),
            teacher=TeacherHidden(hidden=teacher_NH, head=models.teacher.head),
            sampled_ids=batch.token_N,
            stats=request,
        )
        yield Reading(batch=batch, stats=stats, past=memory)


def _student(models: Measure, batch: Batch, *, graph: bool) -> Tensor:
    was_training = models.student.training
    models.student.train(graph)  # for the loss, as the loss reads
    with (
        torch.set_grad_enabled(graph),
        torch.autocast(models.device.type, torch.bfloat16, enabled=models.bf16),
    ):
        hidden_BSH = hidden_states(models.student, batch.student_ids_BS, batch.student_mask_BS)
    models.student.train(was_training)
    return hidden_BSH.flatten(0, 1)[batch.student_at_N]


def _teacher(models: Measure, batch: Batch, *, past: bool) -> tuple[Tensor, Past | None]:
    if past and isinstance(models.teacher, ModelTeacher):
        return models.teacher.remembering(batch)
    return models.teacher.hidden(batch), None


def _by_key(hidden_NH: Tensor, batch: Batch, contexts: Sequence[tuple[int, ...]]) -> dict[Key, Tensor]:
    rows = hidden_NH.split([len(t.response) for t in batch.trajectories])
    return {
        (context, t.response): row for context, t, row in zip(contexts, batch.trajectories, rows, strict=True)
    }
