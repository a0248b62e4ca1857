"""A small real batch that the checks of models look at, and what both sides make of it.

Shape suffixes: N response tokens, H hidden.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from onpath.data.batch import Batch, collate, micro_batches
from onpath.data.load import prompts_of_step
from onpath.engines import sharding
from onpath.engines.base import sample_keys, unwritten
from onpath.engines.head import evaluating
from onpath.losses import (
    Head,
    StatsRequest,
    TeacherHidden,
    TeacherMixture,
    TeacherScores,
    TeacherTopK,
    TokenStats,
    token_stats,
)
from onpath.methods import Prepared
from onpath.records import Rollout, Trajectory
from onpath.run.check_prepared import check_prepared
from onpath.run.origins import judge, with_origins
from onpath.run.parts import Parts
from onpath.run.sampling import written
from onpath.run.trajectories import TOP_TOKENS
from onpath.run.weights import shaped
from onpath.system import distributed
from onpath.system.errors import UserError

T = TypeVar("T")

_TOKENS = 4096
"""Response tokens, at most, that the checks sample."""
_LENGTH = 256
"""Longest response of the probe."""
_ROLLOUTS = (4, 32)
"""Fewest and most rollouts of the probe."""
_EACH = 2
"""Prompts of a teacher that has none among the first step's."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Rollouts of the first step's prompts, and what the method makes of them."""

    rollouts: list[Rollout]
    prepared: Prepared
    trajectories: list[Trajectory]
    """Those that would be trained on."""
    seconds: float
    refused: str = ""
    """Why the method could not make trajectories."""
    shortened: bool = False
    """Responses were cut at _LENGTH tokens, before rollout.max_new_tokens."""

    def of(self, teacher: str | None) -> "Probe":
        """What one of several teachers scores of it; None: all of it."""
        if teacher is None:
            return self
        return replace(self, trajectories=[t for t in self.trajectories if t.teacher == teacher])

    def batches(self, parts: Parts) -> Iterator[Batch]:
        """In micro-batches."""
        return batches_of(parts, self.trajectories)


def make_probe(parts: Parts) -> Probe:
    """Samples and corrects as the first step would, with fewer prompts."""
    config = parts.config
    low, high = _ROLLOUTS
    sampling = replace(parts.sampling, max_new_tokens=min(_LENGTH, parts.sampling.max_new_tokens))
    size = max(low, min(high, _TOKENS // sampling.max_new_tokens))
    size = min(size, config.rollout.prompts, len(parts.prompts.pool))
    prompts = prompts_of_step(parts.prompts.pool, size=size, seed=config.run.seed, step=0)
    for name in parts.models.teacher.names:  # each must be seen at work
        mine = [p for p in parts.prompts.pool if p.teacher == name]
        prompts += mine[:_EACH] if not any(p.teacher == name for p in prompts) else []
    begun = time.perf_counter()
    student, keys = parts.generators.student, [f"doctor/{p.id}" for p in prompts]
    prepared, refused = unread(), ""
    kept: list[Trajectory] = []
    writes = config.method.writes_rollouts
    if not config.method.takes_rollouts:
        blank = unwritten(student, student.renderer, prompts, sampling, n=1)
        rollouts = written(parts, blank, sample_keys(keys, 1), 0)
    else:
        rollouts = student.generate(prompts, sampling, keys=keys)
        begun = time.perf_counter() if writes else begun  # they are for the checks, the run has none
    rollouts = agreed(rollouts)
    try:
        prepared = parts.method.prepare(rollouts, step=0)
        check_prepared(prepared, parts)
        prepared, judged = with_origins(parts.text, prepared, rollouts, judge(parts.text, rollouts))
        prepared = shaped(parts, prepared, judged.rewards)
        kept = [t for t in prepared.trajectories if t.edit.kept and t.response]
    except UserError as error:
        refused, prepared = str(error), unread()
    made, kept, refused = agreed((prepared.trajectories, kept, refused))
    prepared = replace(prepared, trajectories=made)
    seconds = time.perf_counter() - begun
    return Probe(
        rollouts=rollouts,
        prepared=prepared,
        trajectories=kept,
        seconds=seconds,
        refused=refused,
        shortened=sampling != parts.sampling,
    )


def agreed(found: T) -> T:
    """What the first of several processes has: servers, and graders with a limit of time, do not give all of
    them the same, and each must then look at as much as the others."""
    return distributed.first_decides(lambda: found)


def batches_of(parts: Parts, trajectories: Sequence[Trajectory]) -> Iterator[Batch]:
    """Micro-batches of the config's size on the student's device."""
    most, device = parts.config.optim.micro_batch_tokens, parts.models.device
    for micro in micro_batches(trajectories, max_tokens=most, device=device):
        yield collate(micro, device=device)


def unread() -> Prepared:
    """No hidden states of before: everything is read anew."""
    return Prepared(trajectories=[])


def as_they_are(rollouts: Sequence[Rollout]) -> list[Trajectory]:
    """Rollouts in the student's own context, without any method."""
    return [
        Trajectory(student_context=r.context, teacher_context=r.context, response=r.ids, origin=r)
        for r in rollouts
        if r.ids
    ]


@torch.no_grad()
def trainer_stats(parts: Parts, trajectories: Sequence[Trajectory]) -> list[tuple[Batch, TokenStats]]:
    """The student's statistics along trajectories by the forward pass that training uses, without a
    teacher."""
    found = []
    with evaluating(parts.models.student):
        for batch in batches_of(parts, trajectories):
            hidden_NH, head = parts.models.student_states(batch), parts.models.head
            with parts.models.autocast():  # as the loss
                stats = token_stats(
                    student_hidden=hidden_NH, student_head=head, teacher=None, sampled_ids=batch.token_N
                )
            found.append((batch, stats))
    return found


@torch.no_grad()
def teacher_scores(parts: Parts, batch: Batch) -> TeacherScores:
    """What a teacher that gives scores makes of a batch, read anew."""
    scores = parts.models.teacher.scores(batch)
    assert scores is not None
    return scores


@torch.no_grad()
def divergence(parts: Parts, batch: Batch) -> TokenStats:
    """Student against teacher, per token."""
    scores, hidden_NH = teacher_scores(parts, batch), parts.models.student_states(batch)
    head = parts.models.head
    with parts.models.autocast():  # as the loss
        return token_stats(
            student_hidden=hidden_NH,
            student_head=head,
            teacher=scores,
            sampled_ids=batch.token_N,
            stats=StatsRequest(top_k=TOP_TOKENS),
        )


@torch.no_grad()
def logp_of(scores: TeacherScores, token_N: Tensor) -> Tensor:
    """Log-prob [N] of given tokens under a teacher's scores; of a token outside a served set, that of all
    outside together (an upper bound)."""
    if isinstance(scores, TeacherMixture):
        each = zip(scores.members, scores.weights, strict=True)
        return torch.stack([logp_of(one, token_N) + math.log(w) for one, w in each]).logsumexp(0)
    if isinstance(scores, TeacherHidden):
        logp_N = token_stats(
            student_hidden=scores.hidden, student_head=scores.head, teacher=None, sampled_ids=token_N
        ).student_logp
        assert logp_N is not None
        return logp_N
    inside_Nk = scores.ids == token_N[:, None]
    logp_N = scores.logp.masked_fill(~inside_Nk, -torch.inf).amax(-1)
    outside_N = scores.unserved_mass().clamp_min(1e-9).log()
    return torch.where(inside_Nk.any(-1), logp_N, outside_N.to(logp_N))


def rows_of(scores: TeacherScores, at: Tensor) -> TeacherScores:
    """Some rows of a teacher's scores."""
    if isinstance(scores, TeacherMixture):
        some = tuple(TeacherHidden(hidden=one.hidden[at], head=one.head) for one in scores.members)
        return TeacherMixture(members=some, weights=scores.weights)
    if isinstance(scores, TeacherHidden):
        return TeacherHidden(hidden=scores.hidden[at], head=scores.head)
    sampled = scores.sampled_logp
    return TeacherTopK(
        ids=scores.ids[at],
        logp=scores.logp[at],
        sampled_logp=None if sampled is None else sampled[at],
    )


def own_scores(hidden_NH: Tensor, head: Head) -> TeacherHidden:
    """Hidden states in the place of a teacher's."""
    return TeacherHidden(hidden=hidden_NH.detach(), head=head)


@contextlib.contextmanager
def untouched(parts: Parts) -> Iterator[Callable[[], bool]]:
    """Whatever happens inside: afterwards trained weights and the method's state are, bit for bit, what they
    were, and the engine has them. Of a sharded model these are each process's rows.

    Yields:
        A function that puts them back and says whether they are the same again; alone it runs at the end too.
    """
    weights = {n: p for n, p in parts.models.student.named_parameters() if p.requires_grad}
    trained = {**weights, **parts.method.state(), **parts.models.teacher.state()}
    mine = {name: sharding.local(p.detach()) for name, p in trained.items()}
    saved = {name: p.to("cpu", copy=True) for name, p in mine.items()}

    @torch.no_grad()
    def restore() -> bool:
        sharding.give_back(parts.models.student, *parts.models.teacher.models)
        for name, tensor in mine.items():
            tensor.copy_(saved[name])
        for p in parts.models.student.parameters():
            p.grad = None
        with contextlib.suppress(UserError):  # one that takes no weights: engine_follows has said so
            parts.generators.student.sync_weights(0)
        same = all(_same(tensor.cpu(), saved[name]) for name, tensor in mine.items())
        return not distributed.anywhere(not same, parts.models.device)

    try:
        yield restore
    finally:
        if distributed.world() == 1:  # an error in one of several ends all, and the others do not answer
            restore()


def _same(one: Tensor, two: Tensor) -> bool:
    """Equal, NaN included: a state that is not known yet."""
    return bool(one.isnan().equal(two.isnan()) and one.nan_to_num().equal(two.nan_to_num()))


def teachers_whole(parts: Parts) -> bool:
    """Whether teachers in this process can write, inside `parts.whole()`: one that only scores stays in its
    shards."""
    return all(sharding.is_whole(model) for model in parts.models.teacher.models)


def narrow(parts: Parts) -> bool:
    """Whether some forward pass is in half precision, so that equal models differ by rounding."""
    dtypes = {p.dtype for p in parts.models.student.parameters()}
    theirs = {section.dtype for section in parts.config.taught_by.values()}
    return parts.config.optim.bf16 or dtypes != {torch.float32} or theirs != {"float32"}


def without_guidance(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The objective alone."""
    return [replace(t, guidance=()) for t in trajectories]
