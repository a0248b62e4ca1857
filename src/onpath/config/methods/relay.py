"""Options of relay."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from onpath.config.methods.base import MethodOptions
from onpath.config.section import GoesWith
from onpath.config.sections import teacher_option
from onpath.data.tasks import task_of


class RelayOptions(MethodOptions):
    """OPD along rollouts in which the teacher takes over for a token where the student's is bad (ours; arXiv
    2607.26057)."""

    name: Literal["relay"] = "relay"
    trigger: Literal["log_ratio", "reflection", "fork", "first_error"] = "log_ratio"
    """Where the teacher takes over: at a token with log p_S − log p_T above `delta`; where its likeliest
    token opens a correction and is not among the student's `reflection_k` (Relay-OPD); at TOPD's fork; at the
    first wrong token by the task's checker."""
    delta: Annotated[float, GoesWith("trigger", "log_ratio")] = 8.0
    """log_ratio: δ, nats. A teacher whose tail is soft, such as a distilled one, seldom reaches it: look at
    the log's `relay_share`, and try 4 where it is near 0."""
    from_start: Annotated[bool, GoesWith("trigger", "log_ratio")] = False
    """Both models write side by side from the first token on, and the student's own response never is: a step
    costs little more than OPD's, and the accuracy and rewards of rollouts are those of the mended ones. With
    log_ratio, no hold and no control, both models in this process."""
    hold: int = Field(0, ge=0)
    """Tokens that the teacher generates beyond the first before the student goes on."""
    paragraphs: int = Field(0, ge=0)
    """The teacher hands back earlier, at the end of so many paragraphs (Relay-OPD: 3, with a large hold); 0
    is off."""
    legs: int | None = Field(None, ge=1)
    """Most takeovers of one rollout (Relay-OPD: 2); null: no limit."""
    reflection_k: Annotated[int, GoesWith("trigger", "reflection")] = Field(20, ge=1)
    """reflection: size of the student's set of likeliest tokens."""
    words: Annotated[tuple[str, ...] | None, GoesWith("trigger", "reflection")] = None
    """reflection: words that open a correction; null: the task's, or TRD's list."""
    window: Annotated[int, GoesWith("trigger", "fork")] = Field(20, ge=1)
    """fork: K, tokens of each near-future window."""
    distance: Annotated[float, GoesWith("trigger", "fork")] = Field(0.3, ge=0)
    """fork: smallest transport distance of the two windows."""
    control: Literal["none", "own_token", "random_place"] = "none"
    """own_token: at the same places the student itself draws once more; random_place: where the trigger fires
    the teacher takes over, but at another place by lot, about as far from the leg's start."""

    @property
    def teacher_writes(self) -> bool:
        return True

    @property
    def correction_words(self) -> tuple[str, ...] | None:
        return self.words

    @property
    def keeps_states(self) -> bool:
        return True

    @property
    def keeps_past(self) -> bool:
        return not self.from_start

    @property
    def side_by_side(self) -> bool:
        return self.trigger == "log_ratio" and not self.hold and self.control == "none"

    @property
    def writes_in_batches(self) -> bool:
        return self.side_by_side

    @property
    def writes_rollouts(self) -> bool:
        return self.from_start

    @property
    def finds(self) -> tuple[str, str]:
        advice = {
            "log_ratio": f"lower method.delta ({self.delta:g})",
            "fork": f"lower method.distance ({self.distance:g})",
            "reflection": f"lower method.reflection_k ({self.reflection_k})",
        }.get(self.trigger, "")
        return ("relay_share" if advice else ""), advice

    @property
    def others_write(self) -> bool:
        return True

    @property
    def longest_window(self) -> tuple[int, str]:
        windows = [(1 + self.hold, "method.hold"), (self.window, "method.window")]
        return max(windows[: 2 if self.trigger == "fork" else 1])

    @model_validator(mode="after")
    def _possible(self) -> "RelayOptions":
        if self.paragraphs and not self.hold:
            raise ValueError("paragraphs needs room to be written: set hold to the most tokens they may take")
        if self.from_start and not self.side_by_side:
            raise ValueError(
                "from_start goes with trigger: log_ratio, hold: 0 and control: none; set it to false"
            )
        return self

    def check(self, config: Any) -> None:
        task = task_of(config.data.train)
        if self.trigger == "first_error" and not (task and (task.checks_steps or task.labels_tokens)):
            raise ValueError(
                f"method.trigger: first_error needs a task with a checker of steps, as the gym is, not "
                f"{config.data.train}; use log_ratio"
            )
        if self.from_start:
            self._can_write_together(config)

    def _can_write_together(self, config: Any) -> None:
        world = getattr(task_of(config.data.train), "world", None)
        others = {"rollout.engine": config.rollout.engine} | {
            f"{teacher_option(name)}.engine": teacher.engine for name, teacher in config.taught_by.items()
        }
        reasons = [f"{key} is {engine}: take hf" for key, engine in others.items() if engine != "hf"]
        if config.rollout.stop:
            reasons.append("rollout.stop has strings, which only a whole text shows: leave them out")
        if world is not None and world.loses:
            reasons.append(f"a teacher that is lost ({config.data.train}) is two models: leave lost out")
        if self.ends == "one":
            reasons.append("method.ends: one takes several tokens for one: take apart")
        if reasons:
            raise ValueError(
                f"method.from_start has both models write in this process, token by token, and {reasons[0]}, "
                "or set from_start to false"
            )
