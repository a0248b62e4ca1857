"""Options of truncate."""

from typing import Annotated, Any, Literal

from pydantic import Field

from onpath.config.methods.base import MethodOptions
from onpath.config.section import GoesWith
from onpath.data.tasks import task_of


class TruncateOptions(MethodOptions):
    """OPD up to the first place from which a rollout cannot be saved (arXiv 2605.07804, 2606.09471)."""

    name: Literal["truncate"] = "truncate"
    stop_when: Literal["overlap", "low_kl", "fork", "checker", "share"] = "overlap"
    """Where training ends: both models' likeliest tokens drift apart (Prune-OPD), the reverse KL stays low
    (KAT), the near futures part (TOPD's fork), the first wrong token by the task's checker, a share of the
    response."""
    window: Annotated[int, GoesWith("stop_when", "overlap", "low_kl", "fork")] = Field(16, ge=1)
    """overlap, low_kl: tokens of a window; fork: K of each near-future window."""
    overlap_k: Annotated[int, GoesWith("stop_when", "overlap")] = Field(16, ge=1)
    """overlap: size of both sets of likeliest tokens."""
    overlap_below: Annotated[float, GoesWith("stop_when", "overlap")] = Field(0.5, ge=0, le=1)
    """overlap: mean share in common below which a window has drifted."""
    decay: Annotated[float, GoesWith("stop_when", "overlap")] = Field(0.0, ge=0, lt=1)
    """overlap: each drifted window scales the weight of all later tokens by this; 0 ends training there."""
    least_weight: Annotated[float, GoesWith("stop_when", "overlap"), GoesWith("decay")] = Field(
        0.1, gt=0, le=1
    )
    """overlap: training ends where that weight falls below this."""
    low_share: Annotated[float, GoesWith("stop_when", "low_kl")] = Field(0.1, gt=0, lt=1)
    """low_kl: share of a step's windows that count as low; the threshold is the moving quantile of their mean
    reverse KL."""
    patience: Annotated[int, GoesWith("stop_when", "low_kl")] = Field(2, ge=1)
    """low_kl: low windows in a row that make a trap; training ends where they begin."""
    quantile_decay: Annotated[float, GoesWith("stop_when", "low_kl")] = Field(0.5, ge=0, lt=1)
    """low_kl: decay per step of the moving quantile; 0 is that of the step alone."""
    distance: Annotated[float, GoesWith("stop_when", "fork")] = Field(0.3, ge=0)
    """fork: smallest transport distance of the two windows."""
    share: Annotated[float, GoesWith("stop_when", "share")] = Field(0.5, gt=0, le=1)
    """share: of each response, from its first token."""
    control: Literal["none", "random_place"] = "none"
    """random_place: rollouts that the rule cuts are cut at a place drawn by lot."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts."""

    @property
    def on_policy(self) -> bool:
        return not self.off_policy or self.divergence == "sampled"

    @property
    def keeps_states(self) -> bool:
        return self.stop_when not in ("share", "checker")

    @property
    def keeps_past(self) -> bool:
        return self.stop_when == "fork"

    @property
    def teacher_writes(self) -> bool:
        return self.stop_when == "fork"

    @property
    def finds(self) -> tuple[str, str]:
        advice = {
            "overlap": f"raise method.overlap_below ({self.overlap_below:g})",
            "low_kl": f"raise method.low_share ({self.low_share:g}) or lower method.patience",
            "fork": f"lower method.distance ({self.distance:g})",
        }.get(self.stop_when, "")
        return ("truncated_share" if advice else ""), advice

    @property
    def longest_window(self) -> tuple[int, str]:
        return (self.window if self.stop_when == "fork" else 0), "method.window"

    def check(self, config: Any) -> None:
        task = task_of(config.data.train)
        if self.stop_when == "checker" and not (task and (task.checks_steps or task.labels_tokens)):
            raise ValueError(
                f"method.stop_when: checker needs a task with a checker of steps, as the gym is, not "
                f"{config.data.train}; use overlap"
            )
        served = any(t.engine == "vllm" for t in config.taught_by.values())
        if self.stop_when == "overlap" and served and self.overlap_k > self.support_k:
            raise ValueError(
                f"method.overlap_k is {self.overlap_k}, but the teacher's server is asked for its "
                f"method.support_k: {self.support_k} likeliest tokens; raise that"
            )
