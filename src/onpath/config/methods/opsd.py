"""Options of OPSD."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from onpath.config.methods.base import Divergence, MethodOptions, TeacherWeights
from onpath.config.section import ROUNDING, GoesWith
from onpath.data.tasks import task_of
from onpath.data.templates import check_slots


class OPSDOptions(MethodOptions):
    """Self-distillation with privileged information (arXiv 2601.18734)."""

    name: Literal["opsd"] = "opsd"
    divergence: Divergence = "forward_kl"
    """As published; reverse_kl and jensen_shannon as options."""
    entry_clip: float | None = Field(0.05, gt=0)
    """Cap each vocabulary entry's contribution before summing; null is off."""
    weights: TeacherWeights = "base"
    """Whose weights the privileged teacher has: the start's (LoRA: adapter off), the student's own, or their
    moving average."""
    ema_decay: Annotated[float, GoesWith("weights", "ema")] = Field(0.99, ge=0, lt=1)
    """Decay per optimiser step of the moving average; weights ema only."""
    hint: Literal["solution", "answer"] = "solution"
    """Which column the teacher is shown."""
    shown: Literal["own", "foreign", "wrong", "none", "contrast"] = "own"
    """Controls: foreign shows another problem's hint, wrong this problem's with another problem's answer in
    place of its own, none shows nothing (arXiv 2608.09228, 2609.20612). contrast shows own and wrong: a
    token's advantage is by how much likelier the own hint makes it than the wrong one, which cancels what
    any hint does to the style (arXiv 2606.11709); with divergence: sampled and entry_clip: null."""
    template: Annotated[str | None, GoesWith("shown", "own", "foreign", "wrong", "contrast")] = None
    """User message of the teacher with slots {problem} and {solution} (or {answer}); null: the gym's or our
    own."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts."""
    epistemic: tuple[str, ...] | None = None
    """Words whose teacher probability is logged as epistemic mass; null: the gym's onset or TRD's list."""
    diagnose_every: Annotated[int, ROUNDING] = Field(1, ge=0)
    """Measure divergence by verdict, epistemic mass and perplexities every so many steps (the loss uses the
    same forward passes); 0 never."""

    @property
    def on_policy(self) -> bool:
        return not self.off_policy or self.divergence == "sampled"

    @property
    def keeps_states(self) -> bool:
        return self.diagnose_every > 0

    @property
    def runs_models(self) -> bool:
        return self.diagnose_every > 0 or self.shown == "contrast"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("solution", "answer") if self.shown in ("wrong", "contrast") else (self.hint,)

    @property
    def teacher_weights(self) -> TeacherWeights:
        return self.weights

    @property
    def teacher_decay(self) -> float:
        return self.ema_decay

    @property
    def shows_reference(self) -> bool:
        return True

    @property
    def correction_words(self) -> tuple[str, ...] | None:
        return self.epistemic

    def check(self, config: Any) -> None:
        task = task_of(config.data.train)
        if self.shown in ("wrong", "contrast") and self.hint == "answer":
            raise ValueError(
                f"method.shown: {self.shown} changes a solution; use hint: solution, or shown: foreign"
            )
        if self.shown == "contrast" and (self.divergence != "sampled" or self.discount):
            raise ValueError(
                "method.shown: contrast is an advantage of the sampled token; set method.divergence: "
                "sampled, without method.discount"
            )
        if self.shown == "contrast" and self.weights != "base" and config.refresh is not None:
            raise ValueError(
                f"method.shown: contrast is kept with its rollouts, and the teacher's weights are "
                f"{self.weights}; set method.weights: base, or rollout.refresh: always"
            )
        if self.hint == "answer" and self.template is None and task and "hint_answer" not in task.templates:
            raise ValueError(
                f"method.hint: answer is a prompt that the {task.name}'s models were never shown; use hint: "
                "solution"
            )

    @model_validator(mode="after")
    def _slots(self) -> "OPSDOptions":
        if self.template is not None:
            check_slots(self.template, {"problem", self.hint})
        return self
