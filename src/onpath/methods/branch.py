"""Branch: at the largest disagreement of a failed rollout the teacher's token is forced, and the student
writes the rest (after TISD, arXiv 2609.30878).

    y ~ p_S(·|x);   t = argmax KL(p_S ‖ p_T) over the places where v_t = argmax p_T(·|x, y_<t) is not y_t
    z^i = y_<t v_t s^i,   s^i ~ p_S(·|x, y_<t v_t),   i = 1 … n
    L = Σ KL(p_S ‖ p_T) / Σ 1 over y_<t once, and v_t s^i of each branch

One token is nobody's sample (`forced`); all others are the student's, so the suffixes are on-policy in a
context that holds the correction.
Deviations: we know the paper's idea, not its numbers, so n = 1, the measure of disagreement, and that
rollouts without a verdict count as failed are ours; a rollout that is right is trained on as it is.
Controls: `control: own_token`, `control: random_place`; and `opd`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from onpath.config.methods.branch import BranchOptions
from onpath.engines.forward import Kept, Values, forward
from onpath.methods.base import Method, Prepared, own_response
from onpath.methods.mixed import Cost, Mixed, inserted, student_goes_on, trained_on
from onpath.methods.places import by_lot
from onpath.methods.topd.candidates import NO_LOSS
from onpath.records import Rollout, Trajectory, Writer

_READ = ("reverse_kl", "student_logp", "teacher_logp", "teacher_top_ids")


class Branch(Method):
    """Replaces what follows one token."""

    Options = BranchOptions
    options: BranchOptions

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        kept, cost, when, options = Kept(), Cost(), f"step {step}", self.options
        right = self.tools.text.right([(r, r.ids) for r in rollouts])
        own = [own_response(r) for r in rollouts]
        values: dict[int, Values] = {}
        for one in forward(self.tools.models, own, keep=kept, top_k=1):
            values |= one.by_place(_READ)
        stems: list[Mixed] = []
        for i, (r, ok) in enumerate(zip(rollouts, right, strict=True)):
            failed = i in values and (ok is not True or not options.failed_only)
            stems.append(self.forced(r, values[i], f"{when}/{r.key}/branch") if failed else Mixed.of(r))
        numbered = [(i, m) for m in stems for i in range(options.branches if m.changed else 1)]
        keys = [f"{when}/{m.y.key}/branch {i}" for i, m in numbered]
        grown = student_goes_on([m for _, m in numbered], self.tools, cost, keys)
        if options.keep == "right":
            grown = self.right_ones(grown)
        prepared = trained_on(grown, self.tools, cost, kept, kind="branch")
        # The ratio of a whole response is a product that the prefix belongs to, on every branch.
        read = options.importance == "sequence"
        return replace(prepared, trajectories=shared_prefixes(prepared.trajectories, read=read))

    def forced(self, y: Rollout, values: Values, key: str) -> Mixed:
        """y up to its place and the token that is put there; y itself, where the teacher has no other."""
        likeliest = [int(ids[0]) for ids in cast(Any, values["teacher_top_ids"])]
        gaps = [s - t for s, t in zip(values["student_logp"], values["teacher_logp"], strict=True)]
        measure = gaps if self.options.place == "sampled_gap" else values["reverse_kl"]
        ends = self.tools.models.ends  # one outcome, under the id of the first
        own_ids = [ends[0] if i in ends else i for i in y.ids]
        apart = [t for t, (mine, theirs) in enumerate(zip(own_ids, likeliest, strict=True)) if mine != theirs]
        at = max(apart, key=lambda t: measure[t], default=0)
        if not apart or measure[at] <= NO_LOSS:
            return Mixed.of(y)
        if self.options.control == "random_place":
            at = apart[by_lot(self.tools.sampling.seed, f"{key}/place", len(apart))]
        own = self.options.control == "own_token"
        token, who = (y.ids[at], "student") if own else (likeliest[at], "forced")
        put = replace(inserted([token], self.tools), logprobs=(y.logprobs[at] if own else 0.0,))
        return Mixed.of(y).cut(at).then(put, cast(Writer, who))

    def right_ones(self, grown: Sequence[Mixed]) -> list[Mixed]:
        """Branches with the right answer; of a rollout that has none, the rollout."""
        right = self.tools.text.right([(m.y, m.z.ids) for m in grown])
        by_rollout: dict[int, list[Mixed]] = {}
        for m, ok in zip(grown, right, strict=True):
            mine = by_rollout.setdefault(m.y.place, [])
            if ok is True or not m.changed:
                mine.append(m)
        rollouts = {m.y.place: m.y for m in grown}
        return [m for place, mine in by_rollout.items() for m in mine or [Mixed.of(rollouts[place])]]


def shared_prefixes(made: Sequence[Trajectory], *, read: bool = False) -> list[Trajectory]:
    """Of the branches of one rollout the first carries the prefix; to the others it is context.

    Args:
        read: its tokens are read on the others too, without weight and outside the count.
    """
    found: list[Trajectory] = []
    for t in made:
        if found and t.origin is found[-1].origin:
            at = t.edit.detail["places"][0]
            if read:
                weights = (*(0.0,) * at, *(1.0,) * (len(t.response) - at))
                found.append(replace(t, weights=weights))
                continue
            prefix, writers = t.student_context + t.response[:at], t.written_by[at:]
            t = replace(
                t, student_context=prefix, teacher_context=prefix, response=t.response[at:], writers=writers,
                behaviour_logprobs=t.behaviour_logprobs and t.behaviour_logprobs[at:], begins=at,
            )  # fmt: skip
        found.append(t)
    return found
