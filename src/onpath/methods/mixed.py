"""Responses that several write: the student's rollout, changed in places, and who wrote what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onpath.engines.forward import Kept, Pass, teacher_key
from onpath.methods.base import Prepared, own_response
from onpath.methods.diagnose import mean
from onpath.methods.tools import Tools
from onpath.records import Completion, Edit, FinishReason, Rollout, Sampling, Writer, Writers, all_by


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """One response while it is written.

    >>> from onpath.records import Prompt, Sampling
    >>> y = Rollout(prompt=Prompt(id="0", text="7 + 5?"), ids=(4, 5, 2), logprobs=(-0.1, -0.7, -0.2),
    ...             finish_reason="stop", policy_version=0, sampling=Sampling(), context=(1, 9))
    >>> z = Mixed.of(y).cut(1).then(Completion(ids=(6,), logprobs=(-0.3,), finish_reason="length"), "teacher")
    >>> z.z.ids, z.writers
    ((4, 6), ('student', 'teacher'))
    """

    y: Rollout
    """The student's rollout."""
    z: Rollout
    """What has become of it."""
    writers: Writers
    start: int = 0
    """What stands before is settled."""
    places: tuple[int, ...] = ()
    """Where somebody took over."""

    @classmethod
    def of(cls, rollout: Rollout) -> "Mixed":
        writers = rollout.written_by
        places = tuple(t for t, who in enumerate(writers) if who != "student")
        return cls(y=rollout, z=replace(rollout, writers=()), writers=writers, places=places)

    @property
    def changed(self) -> bool:
        return bool(self.places)

    @property
    def open(self) -> bool:
        """Whether somebody can go on."""
        return self.z.finish_reason == "length" and len(self.z.ids) < self.z.sampling.max_new_tokens

    def cut(self, length: int) -> "Mixed":
        """Its first tokens, to be gone on from; somebody takes over there."""
        nothing = Completion(ids=(), logprobs=(), finish_reason="length")
        z = self.z.continued(nothing, at=length)
        return replace(self, z=z, writers=self.writers[:length], places=(*self.places, length))

    def then(self, completion: Completion, who: Writer) -> "Mixed":
        """And what `who` wrote, as far as there is room."""
        completion = completion.truncated(self.z.sampling.max_new_tokens - len(self.z.ids))
        writers = self.writers + all_by(who, len(completion.ids))
        return replace(self, z=self.z.continued(completion), writers=writers)


@dataclass(kw_only=True)
class Cost:
    """Tokens generated beside the rollouts."""

    student: int = 0
    teacher: int = 0


def inserted(ids: Sequence[int], tools: Tools) -> Completion:
    """Tokens that are put there and that nobody has drawn; a stop token at their end ends the response."""
    ends = bool(ids) and ids[-1] in tools.generators.student.stop_ids
    reason: FinishReason = "stop" if ends else "length"
    return Completion(ids=tuple(ids), logprobs=(0.0,) * len(ids), finish_reason=reason)


def stopped(mixed: Mixed, tools: Tools) -> Mixed:
    """Up to the token that completes a stop string, whoever wrote its parts."""
    z, end = mixed.z, tools.string_end(mixed.z.ids)
    if end is None or (end == len(z.ids) and z.finish_reason == "stop"):
        return mixed
    z = replace(z, ids=z.ids[:end], logprobs=z.logprobs[:end], finish_reason="stop")
    return replace(mixed, z=z, writers=mixed.writers[:end])


def student_goes_on(some: Sequence[Mixed], tools: Tools, cost: Cost, keys: Sequence[str]) -> list[Mixed]:
    """Each response that is open, to its end."""
    some = [stopped(m, tools) for m in some]
    going = [i for i, m in enumerate(some) if m.open]
    done, generated = tools.student_continues([some[i].z for i in going], [keys[i] for i in going])
    cost.student += generated
    ends = dict(zip(going, done, strict=True))
    return [stopped(m.then(ends[i], "student"), tools) if i in ends else m for i, m in enumerate(some)]


def goes_on_for(
    rollouts: Sequence[Rollout],
    places: Sequence[tuple[int, int]],
    who: Writer,
    tools: Tools,
    cost: Cost,
    sampling: Sampling,
    keys: Sequence[str],
    scored: Pass | None = None,
) -> list[Completion]:
    """Up to `sampling.max_new_tokens` tokens of the student or the teacher after the first tokens of
    responses.

    Args:
        places, scored: as `Tools.teacher_continues` takes them.
    """
    if who == "student":
        cut = [Mixed.of(rollouts[i]).cut(t).z for i, t in places]
        done, generated = tools.student_continues(cut, keys, at_most=sampling.max_new_tokens)
        cost.student += generated
    else:
        done = tools.teacher_continues(rollouts, places, sampling, keys, scored)
        cost.teacher += sum(len(c.ids) for c in done)
    return done


def keep_read(begun: Mixed, ended: Mixed, read: Tensor | None, kept: Kept, *, known: Rollout) -> None:
    """The teacher's states of a whole response, if they are there: of its beginning, and of the rest.

    Args:
        known: what begins like it and was scored.
    """
    before = kept.teacher.get(teacher_key(own_response(known)))
    parts = [] if before is None else [before[: len(begun.z.ids)]]
    parts += [] if read is None else [read]
    if sum(map(len, parts)) == len(ended.z.ids) > 0:
        kept.teacher[teacher_key(own_response(ended.z))] = torch.cat(parts)


def trained_on(
    made: Sequence[Mixed], tools: Tools, cost: Cost, kept: Kept | None = None, *, kind: str
) -> Prepared:
    """Trajectories along what was written, with verdicts, and what it cost.

    Args:
        kept: hidden states that the loss can use.
        kind: of the edits.
    """
    right = tools.text.right([(m.y, m.z.ids) for m in made])
    trajectories = []
    for m, ok in zip(made, right, strict=True):
        changed = Edit(kind=kind, detail={"right": ok, "places": list(m.places)})
        edit = changed if m.changed else Edit(kind="none")
        trajectories.append(replace(own_response(m.z), writers=m.writers, origin=m.y, edit=edit))
    others = sum(who != "student" for m in made for who in m.writers)
    means = {
        "accuracy_z": mean([ok for ok in right if ok is not None]),
        f"{kind}_share": mean([m.changed for m in made]),
        "places_per_response": (float(sum(len(m.places) for m in made)), float(len(made))),
        "others_token_share": (float(others), float(sum(len(m.z.ids) for m in made))),
    }
    totals = {"student_tokens_generated": cost.student, "teacher_tokens_generated": cost.teacher}
    if kept is not None:
        kept.only(trajectories)
    return Prepared(trajectories=trajectories, kept=kept or Kept(), means=means, totals=totals)
