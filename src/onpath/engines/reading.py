"""Both models along trajectories: per-token statistics, and hidden states that the loss can use again.

The weights do not move between a method's `prepare` and the loss of the same step, so the teacher's hidden
states are kept for the loss always, and the student's with their graphs where the whole step fits into the
budget of one micro-batch.

Shape suffixes: B rows, S padded length, N response tokens, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.data.batch import Batch, collate, micro_batches
from onpath.engines.decoding.branches import Past
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.head import head_of, hidden_states
from onpath.engines.teacher import ModelTeacher, Teacher
from onpath.losses import StatsRequest, TeacherHidden, TeacherScores, TokenStats, token_stats
from onpath.records import Trajectory

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


Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Context and response: hidden states depend on nothing else."""


@dataclass(kw_only=True)
class Readings:
    """Hidden states of one step, handed to the loss."""

    teacher: dict[Key, Tensor] = field(default_factory=dict)
    student: list[dict[Key, Tensor]] = field(default_factory=list)
    """One entry per graph; it goes with the first batch that uses it: a graph is walked back once."""

    def teacher_hidden(self, batch: Batch) -> Tensor | None:
        """[N, H], or None if a trajectory of the batch was not read."""
        return _gathered(self.teacher, [(t.teacher_context, t.response) for t in batch.trajectories])

    def student_hidden(self, batch: Batch) -> Tensor | None:
        """[N, H] with the graphs of the reading, or None if they were not kept, or are used up."""
        keys = [(t.student_context, t.response) for t in batch.trajectories]
        used = [graph for graph in self.student if any(key in graph for key in keys)]
        found = _gathered({key: row for graph in used for key, row in graph.items()}, keys)
        if found is not None:
            self.student = [graph for graph in self.student if not any(graph is u for u in used)]
        return found


def _gathered(known: dict[Key, Tensor], keys: Sequence[Key]) -> Tensor | None:
    if not keys or not all(key in known for key in keys):
        return None
    return torch.cat([known[key] for key in keys])


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Some trajectories as both models see them: as many micro-batches as fit into the budget of one."""

    batches: tuple[Batch, ...]
    stats: tuple[TokenStats, ...]
    past: Past | None
    """The teacher's keys and values, for continuations; None if its attention does not allow it."""

    @property
    def trajectories(self) -> list[Trajectory]:
        """In the order of the rows of `past`."""
        return [t for batch in self.batches for t in batch.trajectories]

    def drafts(self) -> list[Drafts]:
        """Of the rows of `past`: what the teacher would probably write from inside them."""
        found = []
        for batch, stats in zip(self.batches, self.stats, strict=True):
            assert stats.teacher_top_ids is not None
            likeliest, end = stats.teacher_top_ids[:, 0].tolist(), 0
            for t in batch.trajectories:
                start, end = end, end + len(t.response)
                context = len(t.teacher_context)
                found.append(Drafts(start=context, response=t.response, likeliest=likeliest[start:end]))
        return found

    def by_trajectory(
        self, names: Sequence[str] | None = None
    ) -> Iterator[tuple[Trajectory, dict[str, list[float]]]]:
        """Each trajectory with its per-token statistics; `names`: only these."""
        for batch, stats in zip(self.batches, self.stats, strict=True):
            rows = {
                name: batch.by_row(value_N)
                for name, value_N in vars(stats).items()
                if isinstance(value_N, Tensor) and value_N.ndim == 1 and (names is None or name in names)
            }
            for b, trajectory in enumerate(batch.trajectories):
                yield trajectory, {name: values[b] for name, values in rows.items()}


def read(
    models: Measure,
    trajectories: Sequence[Trajectory],
    *,
    into: Readings | None = None,
    past: bool = False,
    mass_ids: Sequence[int] = (),
) -> Iterator[Reading]:
    """Both models along the trajectories; those without a response are left out.

    Args:
        models: the student that trains and the teacher that scores.
        into: receives what the loss can use again. None keeps nothing.
        past: also give the teacher's keys and values.
        mass_ids: token ids whose total teacher probability is wanted.
    """
    mass = torch.tensor(mass_ids, device=models.device) if mass_ids else None
    request = StatsRequest(mass_ids=mass, top_k=1 if past else 0)
    micros = micro_batches(trajectories, max_tokens=models.max_tokens)
    groups = _grouped([collate(m, device=models.device) for m in micros], models.max_tokens)
    graph = into is not None and len(groups) == 1
    for group in groups:
        stats = []
        memory = _memory(models, group) if past else None
        for b, batch in enumerate(group):
            student_NH = _student(models, batch, graph=graph)
            scores = _teacher(models, batch, None if memory is None else memory.parts[b])
            if into is not None and isinstance(scores, TeacherHidden):
                into.teacher |= _by_key(scores.hidden, batch, [t.teacher_context for t in batch.trajectories])
            if into is not None and graph:
                contexts = [t.student_context for t in batch.trajectories]
                into.student.append(_by_key(student_NH, batch, contexts))
            stats.append(_stats(models, batch, student_NH, scores, request))
        yield Reading(batches=tuple(group), stats=tuple(stats), past=memory)


def _grouped(batches: Sequence[Batch], max_tokens: int) -> list[list[Batch]]:
    """Consecutive batches whose padded tokens fit together; one that does not fit is a group of its own."""
    groups: list[list[Batch]] = []
    room = 0
    for batch in batches:
        size = max(batch.student_ids_BS.numel(), batch.teacher_ids_BT.numel())
        if size > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(batch)
        room -= size
    return groups


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


def _memory(models: Measure, batches: Sequence[Batch]) -> Past | None:
    teacher = models.teacher
    if not isinstance(teacher, ModelTeacher) or not Past.possible(teacher.model):
        return None
    return Past(teacher.model, batches)


def _teacher(models: Measure, batch: Batch, cache: DynamicCache | None) -> TeacherScores | None:
    if cache is None or not isinstance(models.teacher, ModelTeacher):
        return models.teacher.scores(batch)
    return TeacherHidden(hidden=models.teacher.hidden(batch, cache), head=models.teacher.head)


def _stats(
    models: Measure, batch: Batch, student_NH: Tensor, scores: TeacherScores | None, request: StatsRequest
) -> TokenStats:
    return token_stats(
        student_hidden=student_NH,
        student_head=head_of(models.student, models.vocabulary),
        teacher=scores,
        sampled_ids=batch.token_N,
        stats=request,
    )


def _by_key(hidden_NH: Tensor, batch: Batch, contexts: Sequence[tuple[int, ...]]) -> dict[Key, Tensor]:
    rows = hidden_NH.split([len(t.response) for t in batch.trajectories])
    return {
        (context, t.response): row for context, t, row in zip(contexts, batch.trajectories, rows, strict=True)
    }
