"""OPD, the base: the student generates, the teacher scores each token (GKD, arXiv 2306.13649; TOPD's stage 2,
arXiv 2606.00305).

    y ~ p_S(·|x),  T = 1, untruncated
    L = Σ_t KL(p_S(·|x,y_<t) ‖ p_T(·|x,y_<t)) / Σ_t 1        over the whole batch; none through sampling

Token-level remedies (clips, top-k supports, reweighting, truncation) are options of the loss, not of the
trajectory.
`writer: teacher` is the off-policy control: with cross_entropy, SFT on the teacher's samples.
"""

from collections.abc import Sequence
from dataclasses import replace

from onpath.config.methods.opd import OPDOptions
from onpath.methods.base import Method, Prepared, check_generated, own_response
from onpath.records import Completion, Edit, Rollout, Trajectory, all_by


class OPD(Method):
    """Leaves trajectories as the student generated them."""

    Options = OPDOptions
    options: OPDOptions

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        if self.options.writer == "student":
            return Prepared(trajectories=[own_response(r) for r in rollouts])
        return self._written_by_teacher(rollouts, step)

    def scored_first(self, rollout: Rollout) -> Trajectory | None:
        """See `Method.scored_first`."""
        mine = self.options.writer == "student"
        return own_response(rollout, length=self.options.first_tokens) if mine else None

    def _written_by_teacher(self, rollouts: Sequence[Rollout], step: int) -> Prepared:
        keys = [f"step {step}/{r.key}/teacher" for r in rollouts]
        asked = [r.prompt for r in rollouts]
        samples = self.tools.in_teachers_name(
            asked, [r.context for r in rollouts], self.tools.sampling, keys=keys
        )
        trajectories = [
            replace(
                own_response(r),
                response=c.ids,
                behaviour_logprobs=None,
                edit=self._edit(c),
                writers=all_by("teacher", len(c.ids)),
            )
            for r, c in zip(rollouts, samples, strict=True)
        ]
        check_generated(trajectories, step=step, who="the teacher", of="prompts", look="what it writes")
        return Prepared(
            trajectories=trajectories, totals={"teacher_tokens_generated": sum(len(c.ids) for c in samples)}
        )

    def _edit(self, sample: Completion) -> Edit:
        """Dropped if it has no text: it would teach to say nothing."""
        if self.tools.text.renderer.text(sample.ids).strip():
            return Edit(kind="teacher_sample")
        return Edit(kind="teacher_sample", kept=False, reason="empty")
