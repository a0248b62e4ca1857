"""OPD, the base: the student writes, the teacher scores each token (GKD, arXiv 2306.13649; TOPD's stage 2,
arXiv 2606.00305).

    y ~ p_S(·|x),  T = 1, untruncated
    L = Σ_t KL(p_S(·|x,y_<t) ‖ p_T(·|x,y_<t)) / Σ_t 1        over the whole batch, no gradient through
    sampling

Token-level remedies (clips, top-k supports, reweighting, truncation) are options of the loss, not of the
trajectory.
`writer: teacher` is the off-policy control: with cross_entropy, SFT on the teacher's samples.
"""

from collections.abc import Sequence
from dataclasses import replace

from onpath.methods.base import Prepared, Stateless, Tools, own_response
from onpath.options import OPDOptions
from onpath.records import Edit, Rollout


class OPD(Stateless):
    """Leaves trajectories as the student wrote them."""

    def __init__(self, options: OPDOptions, tools: Tools) -> None:
        self.options, self.tools = options, tools

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        if self.options.writer == "student":
            return Prepared(trajectories=[own_response(r) for r in rollouts])
        return self._written_by_teacher(rollouts, step)

    def _written_by_teacher(self, rollouts: Sequence[Rollout], step: int) -> Prepared:
        sampling = replace(self.tools.sampling, seed=self.tools.sampling.seed + step)
        keys = [f"{r.prompt.id}/{r.sample}/teacher" for r in rollouts]
        written = self.tools.writer.continue_from([r.context for r in rollouts], sampling, keys=keys)
        trajectories = [
            replace(
                own_response(r), response=c.ids, behaviour_logprobs=None, edit=Edit(kind="teacher_sample")
            )
            for r, c in zip(rollouts, written, strict=True)
        ]
        return Prepared(
            trajectories=trajectories, totals={"teacher_tokens_generated": sum(len(c.ids) for c in written)}
        )
