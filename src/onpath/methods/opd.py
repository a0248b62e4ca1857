"""OPD, the base: the student generates, the teacher scores each token (GKD, arXiv 2306.13649; TOPD's stage 2,
arXiv 2606.00305).

    y ~ p_S(·|x),  T = 1, untruncated
    L = Σ_t KL(p_S(·|x,y_<t) ‖ p_T(·|x,y_<t)) / Σ_t 1        over the whole batch; none through sampling

Token-level remedies (clips, top-k supports, reweighting, truncation) are options of the loss, not of the
trajectory.
`writer: teacher` is the off-policy control, and the student draws nothing: with cross_entropy, SFT on the
teacher's samples.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from onpath.config.methods.opd import OPDOptions
from onpath.methods.base import Method, Prepared, check_generated, own_response
from onpath.records import Edit, Rollout, Trajectory, all_by


class OPD(Method):
    """Leaves trajectories as the student generated them."""

    Options = OPDOptions
    options: OPDOptions

    def write_rollouts(
        self, blank: Sequence[Rollout], *, keys: Sequence[str], step: int
    ) -> Sequence[Rollout]:
        """See `Method.write_rollouts`: the teacher's own samples."""
        samples = self.tools.in_teachers_name(
            [r.prompt for r in blank],
            [r.context for r in blank],
            self.tools.sampling,
            keys=[f"step {step}/{r.key}/teacher" for r in blank],
        )
        known = [replace(c, logprobs=c.logprobs or (math.nan,) * len(c.ids)) for c in samples]  # a black box
        return [
            replace(r.continued(c), writers=all_by("teacher", len(c.ids)))
            for r, c in zip(blank, known, strict=True)
        ]

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
        # The doctor's are the student's, which it has looked at.
        own = any(r.ids and not r.writers for r in rollouts)
        blank = [replace(r, ids=(), logprobs=()) for r in rollouts] if own else rollouts
        samples = self.write_rollouts(blank, keys=[], step=step) if own else rollouts
        trajectories = [
            replace(
                own_response(sample),
                origin=r,
                behaviour_logprobs=None,
                edit=self._edit(sample),
                writers=sample.writers,
            )
            for r, sample in zip(rollouts, samples, strict=True)
        ]
        check_generated(trajectories, step=step, who="the teacher", of="prompts", look="what it writes")
        return Prepared(
            trajectories=trajectories, totals={"teacher_tokens_generated": sum(len(s.ids) for s in samples)}
        )

    def _edit(self, sample: Rollout) -> Edit:
        """Dropped if it has no text: it would teach to say nothing."""
        if self.tools.text.renderer.text(sample.ids).strip():
            return Edit(kind="teacher_sample")
        return Edit(kind="teacher_sample", kept=False, reason="empty")
