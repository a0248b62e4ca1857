"""Forward passes of both models along trajectories: per-token statistics, and hidden states that the loss can
use again.

The weights do not move between a method's `prepare` and the loss of the same step, so the teacher's hidden
states are kept for the loss always, and the student's with their graphs where the whole step fits into the
budget of one micro-batch.

Shape suffixes: B rows, S padded length, N response tokens, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from onpath.data.batch import Batch, collate, micro_batches
from onpath.engines.decoding.branches import Past
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.head import evaluating, head_of, hidden_states, unwrapped
from onpath.engines.models import context_length
from onpath.engines.teacher import Teacher
from onpath.losses import Head, Objective, StatsRequest, TeacherHidden, TeacherScores, TokenStats, token_stats
from onpath.records import Trajectory
from onpath.system import distributed
from onpath.system.draws import request_seed

Key = tuple[str | None, tuple[int, ...], tuple[int, ...]]
"""Which of several teachers (None: the only one, or the student), context and response: hidden states depend
on nothing else."""
Values = dict[str, list[float]]
"""Statistic → one value per response token."""
# Of a graph, this share of its tokens must be left: the way back costs two passes, and runs over all of them.
_WORTH = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Models:
    """The student that trains and the teacher that scores."""

    student: nn.Module
    teacher: Teacher
    vocabulary: int
    """Number of token ids that they share."""
    device: torch.device
    """Of the student."""
    max_tokens: int
    """Padded tokens of one forward pass."""
    bf16: bool = False
    dropout: bool = False
    """Whether the pass that trains has the student's dropout and router noise; scores never have."""

    keeps_graphs: bool = True
    """Whether the student's weights stay in their place from `prepare` to the loss."""
    ends: tuple[int, ...] = ()
    """Ids that are one outcome to every statistic, as they are to the loss (`Objective.ends`)."""

    @property
    def student_context_length(self) -> int:
        """Most tokens, prompt and response, that the student takes."""
        return context_length(unwrapped(self.student).config)

    @property
    def head(self) -> Head:
        """The student's output layer."""
        return head_of(self.student, self.vocabulary)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 forward passes if optim.bf16 asks for them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def begin_training(self, *, seed: int, step: int) -> None:
        """Into the mode of the pass that trains. Masks of dropout are drawn from (seed, step, process)."""
        self.student.train(self.dropout)
        if self.dropout:
            key = f"step {step}/dropout/{distributed.rank()}"
            torch.manual_seed(request_seed(seed, key))  # of all devices

    def student_states(self, batch: Batch) -> Tensor:
        """The student's hidden states [N, H] that predict each response token, with their graph if gradients
        are on."""
        with self.autocast():
            hidden_BSH = hidden_states(self.student, batch.student_ids_BS)
        return batch.at_student(hidden_BSH)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The student's hidden states of one pass, which is walked back once."""

    rows: dict[Key, Tensor]
    tokens: int
    """That the way back runs over."""


@dataclass(kw_only=True)
class Kept:
    """Hidden states of one step, handed to the loss."""

    teacher: dict[Key, Tensor] = field(default_factory=dict)
    student: list[Graph] = field(default_factory=list)
    """Each goes with the first batch that uses it."""

    def has_scored(self, trajectories: Iterable[Trajectory]) -> bool:
        """Whether the teacher's states of all of them are here."""
        return all(teacher_key(t) in self.teacher for t in trajectories if t.response)

    def teacher_hidden(self, batch: Batch) -> Tensor | None:
        """[N, H], or None if a trajectory of the batch was not scored."""
        return _gathered(self.teacher, [teacher_key(t) for t in batch.trajectories])

    def student_hidden(self, batch: Batch) -> Tensor | None:
        """[N, H] with the graphs of the pass, or None if they were not kept, or are used up."""
        keys = [student_key(t) for t in batch.trajectories]
        used = [graph for graph in self.student if any(key in graph.rows for key in keys)]
        found = _gathered({key: row for graph in used for key, row in graph.rows.items()}, keys)
        if found is not None:
            self.student = [graph for graph in self.student if not any(graph is u for u in used)]
        return found

    def batches(
        self, trajectories: Sequence[Trajectory], *, max_tokens: int, device: torch.device
    ) -> list[list[Trajectory]]:
        """Micro-batches such that what is known is used: those of a graph together, then others that the
        teacher has scored, then what is new. A graph of which little is left would be walked back for that
        little, and is dropped."""
        left, found = [t for t in trajectories if t.response], list[list[Trajectory]]()
        graphs, self.student = self.student, []
        for graph in graphs:
            mine, others = _parted(left, [student_key(t) in graph.rows for t in left])
            if mine and sum(len(t.response) for t in mine) >= _WORTH * graph.tokens:
                self.student.append(graph)
                found += micro_batches(mine, max_tokens=max_tokens, device=device)
                left = others
        for some in _parted(left, [teacher_key(t) in self.teacher for t in left]):
            found += micro_batches(some, max_tokens=max_tokens, device=device)
        return sorted(found, key=lambda rows: rows[0].teacher or "")  # each comes to its device once

    def forget(self, teacher: str | None) -> None:
        """What this teacher has scored."""
        self.teacher = {key: row for key, row in self.teacher.items() if key[0] != teacher}

    def only(self, trajectories: Iterable[Trajectory]) -> None:
        """Forgets what a loss along these would not use: other responses' states, and graphs of which they
        are too little (see `batches`)."""
        wanted = list(trajectories)
        teachers, students = {teacher_key(t) for t in wanted}, {student_key(t) for t in wanted}
        self.teacher = {key: row for key, row in self.teacher.items() if key in teachers}
        self.student = [
            graph
            for graph in self.student
            if sum(len(graph.rows[key]) for key in students & graph.rows.keys()) >= _WORTH * graph.tokens
        ]

    def truncated(self, whole: Trajectory, length: int) -> None:
        """Only the first `length` tokens of a response are trained on: states look backwards alone."""
        short = whole.truncated(length)
        if (read := self.teacher.get(teacher_key(whole))) is not None:
            self.teacher[teacher_key(short)] = read[:length].clone()
        for graph in self.student:
            if (rows := graph.rows.get(student_key(whole))) is not None:
                graph.rows[student_key(short)] = rows[:length]


def teacher_key(trajectory: Trajectory) -> Key:
    """Of the teacher's states."""
    return trajectory.teacher, trajectory.teacher_context, trajectory.response


def student_key(trajectory: Trajectory) -> Key:
    """Of the student's."""
    return None, trajectory.student_context, trajectory.response


def _parted(some: Sequence[Trajectory], marks: Sequence[bool]) -> tuple[list[Trajectory], list[Trajectory]]:
    marked = list(zip(some, marks, strict=True))
    return [t for t, mark in marked if mark], [t for t, mark in marked if not mark]


def _gathered(known: dict[Key, Tensor], keys: Sequence[Key]) -> Tensor | None:
    if not keys or not all(key in known for key in keys):
        return None
    return torch.cat([known[key] for key in keys])


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Some trajectories as both models see them: as many micro-batches as fit into the budget of one."""

    batches: tuple[Batch, ...]
    stats: tuple[TokenStats, ...]
    past: Past | None
    """The teacher's keys and values, for continuations; None if its attention does not allow it."""

    @property
    def teacher(self) -> str | None:
        """The one of several teachers that has scored them."""
        return self.batches[0].teacher

    @property
    def trajectories(self) -> list[Trajectory]:
        """In the order of the rows of `past`; `place` is the index in what was asked for."""
        return [t for batch in self.batches for t in batch.trajectories]

    def drafts(self) -> list[Drafts]:
        """Of the rows of `past`: what the teacher would probably generate from inside them."""
        found = []
        for batch, stats in zip(self.batches, self.stats, strict=True):
            assert stats.teacher_top_ids is not None
            likeliest, end = stats.teacher_top_ids[:, 0].tolist(), 0
            for t in batch.trajectories:
                start, end = end, end + len(t.response)
                context = len(t.teacher_context)
                found.append(Drafts(start=context, response=t.response, likeliest=likeliest[start:end]))
        return found

    def by_place(self, names: Sequence[str] | None = None) -> Iterator[tuple[int, Values]]:
        """Each trajectory's place and per-token statistics; `names`: only these, and lists of tokens too."""
        for batch, stats in zip(self.batches, self.stats, strict=True):
            rows = {
                name: batch.by_row(value_N)
                for name, value_N in vars(stats).items()
                if isinstance(value_N, Tensor) and (value_N.ndim == 1 if names is None else name in names)
            }
            for b, trajectory in enumerate(batch.trajectories):
                assert trajectory.place is not None
                yield trajectory.place, {name: values[b] for name, values in rows.items()}


def forward(
    models: Models,
    trajectories: Sequence[Trajectory],
    *,
    keep: Kept | None = None,
    past: bool = False,
    top_k: int = 0,
    mass_ids: Sequence[int] = (),
) -> Iterator[Pass]:
    """Both models along the trajectories; those without a response are left out.

    Args:
        keep: receives what the loss can use again. None keeps nothing, and gradients are off.
        past: also give the teacher's keys and values.
        top_k: size of both models' sets of likeliest tokens, and of their `overlap`; 0 asks for none.
        mass_ids: token ids whose total teacher probability is wanted.
    """
    mass = torch.tensor(mass_ids, device=models.device) if mass_ids else None
    request = StatsRequest(mass_ids=mass, top_k=max(top_k, int(past)))
    placed = [replace(t, place=i) for i, t in enumerate(trajectories)]
    micros = list(micro_batches(placed, max_tokens=models.max_tokens, device=models.device))
    models.teacher.expect(t for micro in micros for t in micro)
    batches = [collate(m, device=models.device) for m in micros]
    groups, together = _grouped(batches, models.max_tokens), sum(map(_size, batches)) <= models.max_tokens
    # Graphs of several groups would all live until the loss: only a step that fits into one pass keeps them.
    # A pass with dropout trains, but must not score.
    # What a sharded pass has gathered is given back after it, and a graph would point at nothing.
    small = together or len(batches) == 1
    graph = keep is not None and small and not models.dropout and models.keeps_graphs
    for group in groups:
        stats = []
        memory = models.teacher.past(group) if past else None
        for b, batch in enumerate(group):
            student_NH = _student(models, batch, graph=graph)
            scores = models.teacher.scores(batch, None if memory is None else memory.parts[b])
            if keep is not None and isinstance(scores, TeacherHidden):
                read = _by_key(scores.hidden, batch, teacher_key)
                # In memory of their own: a view of one would keep those of all that were read with it.
                keep.teacher |= {key: row.clone() for key, row in read.items()}
            if keep is not None and graph:
                rows = _by_key(student_NH, batch, student_key)
                keep.student.append(Graph(rows=rows, tokens=len(student_NH)))
            stats.append(_stats(models, batch, student_NH, scores, request))
        yield Pass(batches=tuple(group), stats=tuple(stats), past=memory)


def per_token(
    models: Models,
    trajectories: Sequence[Trajectory],
    *,
    keep: Kept | None = None,
    top_k: int = 0,
    mass_ids: Sequence[int] = (),
) -> list[Values]:
    """The statistics that this teacher can give, in the trajectories' order; empty without a response.

    Args: see `forward`.
    """
    found: list[Values] = [{} for _ in trajectories]
    for one in forward(models, trajectories, keep=keep, top_k=top_k, mass_ids=mass_ids):
        for place, values in one.by_place():
            found[place] = values
    return found


def _grouped(batches: Sequence[Batch], max_tokens: int) -> list[list[Batch]]:
    """Consecutive batches of one teacher whose padded tokens fit together; one that does not fit is a group
    of its own."""
    groups: list[list[Batch]] = []
    left = 0
    for batch in batches:
        if _size(batch) > left or groups[-1][0].teacher != batch.teacher:
            groups.append([])
            left = max_tokens
        groups[-1].append(batch)
        left -= _size(batch)
    return groups


def _size(batch: Batch) -> int:
    """Padded tokens of its larger side."""
    return max(batch.student_ids_BS.numel(), batch.teacher_ids_BT.numel())


def _student(models: Models, batch: Batch, *, graph: bool) -> Tensor:
    with evaluating(models.student), torch.set_grad_enabled(graph):
        return models.student_states(batch)


def _stats(
    models: Models, batch: Batch, student_NH: Tensor, scores: TeacherScores | None, request: StatsRequest
) -> TokenStats:
    head = models.head
    one_end = Objective(kind="reverse_kl", ends=models.ends) if models.ends and scores is not None else None
    with models.autocast():  # as the loss
        return token_stats(
            student_hidden=student_NH,
            student_head=head,
            teacher=scores,
            objective=one_end,
            sampled_ids=batch.token_N,
            stats=request,
        )


def _by_key(hidden_NH: Tensor, batch: Batch, key: Callable[[Trajectory], Key]) -> dict[Key, Tensor]:
    rows = hidden_NH.split([len(t.response) for t in batch.trajectories])
    return {key(t): row for t, row in zip(batch.trajectories, rows, strict=True)}
