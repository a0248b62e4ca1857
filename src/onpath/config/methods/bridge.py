"""Options of bridge."""

from typing import Annotated, Literal

from pydantic import Field

from onpath.config.methods.base import MethodOptions
from onpath.config.section import GoesWith


class BridgeOptions(MethodOptions):
    """OPD along rollouts whose first fork the teacher has bridged (arXiv 2608.01953, ours)."""

    name: Literal["bridge"] = "bridge"
    window: int = Field(20, ge=1)
    """K, tokens of the near-future windows by which the first fork is found; the longest bridge."""
    distance: float = Field(0.3, ge=0)
    """Smallest transport distance of a fork's two windows."""
    meet_window: Annotated[int, GoesWith("control", "none", "random_place")] = Field(8, ge=1)
    """Tokens of the near futures that are compared behind the bridge."""
    meet_distance: Annotated[float, GoesWith("control", "none", "random_place")] = Field(0.1, ge=0)
    """Transport distance at which they have met: the student goes on."""
    every: Annotated[int, GoesWith("control", "none", "random_place")] = Field(4, ge=1)
    """Tokens of the bridge between two such comparisons."""
    failed_only: bool = True
    """Rollouts with the right answer are trained on as they are."""
    keep: Literal["better", "all"] = "better"
    """better: a bridged response is kept if it is right where the rollout was not, or, both being alike, if
    the teacher finds what the student wrote behind the bridge likelier, per token, than what it had written
    from the fork on; else the rollout is trained on."""
    control: Literal["none", "own_token", "random_place"] = "none"
    """own_token: from the same places the student writes on itself; random_place: bridges from places drawn
    by lot."""

    @property
    def warnings(self) -> tuple[str, ...]:
        least = self.every + self.meet_window
        if self.control == "own_token" or self.window >= least:
            return ()
        return (
            f"method.window {self.window} ends before the near futures are compared, behind method.every "
            f"{self.every} tokens by the next method.meet_window {self.meet_window}: every bridge is a whole "
            f"window; from {least} on it ends where they meet",
        )

    @property
    def keeps_states(self) -> bool:
        return True

    @property
    def keeps_past(self) -> bool:
        return True

    @property
    def teacher_writes(self) -> bool:
        return True

    @property
    def writes_in_batches(self) -> bool:
        return self.control == "random_place"

    @property
    def finds(self) -> tuple[str, str]:
        return "bridge_share", (
            f"{'where one failed ' if self.failed_only else ''}no fork reached method.distance "
            f"({self.distance:g}), or no bridge was better: lower it"
        )

    @property
    def others_write(self) -> bool:
        return True

    @property
    def longest_window(self) -> tuple[int, str]:
        return self.window, "method.window"
