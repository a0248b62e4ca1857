"""Options of OPD."""

from typing import Literal

from onpath.config.methods.base import MethodOptions


class OPDOptions(MethodOptions):
    """On-policy distillation and its token-level baselines."""

    name: Literal["opd"] = "opd"
    writer: Literal["student", "teacher"] = "student"
    """Who generates the responses. teacher with divergence cross_entropy is SFT on teacher samples."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts, which are not samples of the student's own distribution."""

    @property
    def on_policy(self) -> bool:
        """Whether rollouts must come untruncated from the student."""
        return self.writer == "student" and (not self.off_policy or self.divergence == "sampled")

    @property
    def trains_on_rollouts(self) -> bool:
        return self.writer == "student"

    @property
    def writes_rollouts(self) -> bool:
        return self.writer == "teacher"

    @property
    def takes_rollouts(self) -> bool:
        return True

    @property
    def runs_models(self) -> bool:
        return self.writer == "teacher"

    @property
    def teacher_writes(self) -> bool:
        return self.writer == "teacher"

    @property
    def learns_from_text(self) -> bool:
        return self.writer == "teacher"
