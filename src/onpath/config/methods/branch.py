"""Options of branch."""

from typing import Annotated, Literal

from pydantic import Field

from onpath.config.methods.base import MethodOptions
from onpath.config.section import GoesWith


class BranchOptions(MethodOptions):
    """OPD along rollouts that take the teacher's token at one place and go on as the student does (arXiv
    2609.30878)."""

    name: Literal["branch"] = "branch"
    branches: int = Field(1, ge=1)
    """Student's suffixes of each rollout; they share the prefix, which is trained on once."""
    place: Annotated[Literal["reverse_kl", "sampled_gap"], GoesWith("control", "none", "own_token")] = (
        "reverse_kl"
    )
    """What the disagreement is that is largest there: KL(p_S‖p_T), or log p_S − log p_T of the student's own
    token."""
    failed_only: bool = True
    """Rollouts with the right answer are trained on as they are."""
    keep: Literal["all", "right"] = "all"
    """right: only branches with the right answer; where none has it, the rollout itself."""
    control: Literal["none", "own_token", "random_place"] = "none"
    """own_token: the student's own token stays, and it writes new suffixes; random_place: the teacher's
    likeliest token, at a place drawn by lot."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("answer",) if self.keep == "right" else ()

    @property
    def keeps_states(self) -> bool:
        return True

    @property
    def others_write(self) -> bool:
        return True
