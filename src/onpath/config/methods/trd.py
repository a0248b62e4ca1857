"""Options of TRD."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from onpath.config.methods.base import Divergence, MethodOptions, TeacherWeights
from onpath.config.section import NEUTRAL, ROUNDING, GoesWith
from onpath.data.tasks import task_of
from onpath.data.templates import check_slots


class TRDOptions(MethodOptions):
    """Trajectory-refined distillation (arXiv 2606.08432)."""

    name: Literal["trd"] = "trd"
    divergence: Divergence = "forward_kl"
    """Along the rewrite; cross_entropy is SFT on the rewrites."""
    teacher: Literal["model", "self"] = "model"
    """Who rewrites and scores: the teacher model, or the student's own weights shown the reference solution.
    """
    rewriter: str | None = None
    """Of several teachers the one that rewrites, whichever scores; null: each prompt's own does both."""
    weights: Annotated[TeacherWeights, GoesWith("teacher", "self")] = "base"
    """Weights of teacher: self, as for opsd."""
    ema_decay: Annotated[float, GoesWith("weights", "ema")] = Field(0.99, ge=0, lt=1)
    """Decay per optimiser step of the moving average; weights ema only."""
    reference: bool | None = None
    """Show the reference solution to the rewriter; null: only with teacher: self."""
    see_attempt: bool = True
    """False is the control in which the rewrite is generated without seeing the student's attempt."""
    template: str | None = None
    """User message of the rewriter with slots {problem}, {attempt} and, with a reference, {solution}; null:
    the gym's or our own."""
    rewrite_temperature: float = Field(0.6, ge=0)
    """Of the rewrite z."""
    rewrite_top_p: Annotated[float, GoesWith("rewrite_temperature")] = Field(1.0, gt=0, le=1)
    """Of the rewrite z (the authors: 0.95)."""
    rewrite_max_new_tokens: int | None = Field(None, ge=1)
    """Longest rewrite; null: rollout.max_new_tokens."""
    rewrite_prompt_tokens: int | None = Field(None, ge=1)
    """Longest rewrite prompt: the attempt, then the reference, lose their ends until it fits; null: what the
    rewriter's context leaves."""
    scoring: Literal["rewrite", "plain"] = "rewrite"
    """Context in which the teacher scores z: the rewrite prompt (faithful), or the plain problem."""
    offline: bool = False
    """Another name for rollout.refresh: never: rollouts and rewrites of each prompt once, from the starting
    weights (the paper's setting; one pass where optim.steps × rollout.prompts is the pool)."""
    paper_compat: bool = False
    """The authors' rendering of what is trained on: plain text and a line break before z, on both sides, and
    no EOS supervised."""
    refine: Literal["all", "wrong_only"] = "all"
    """wrong_only leaves right attempts as they are and trains only on rewrites of wrong ones."""
    filter: Literal["none", "drop_harmed", "wrong_to_right"] = "none"
    """drop_harmed drops right→wrong and unfinished rewrites; wrong_to_right keeps only repaired ones."""
    unfinished: Literal["keep", "drop"] = "keep"
    """Rewrites cut by rewrite_max_new_tokens: trained on as far as they go, or dropped."""
    best_of: Annotated[int, GoesWith("rewrite_temperature")] = Field(1, ge=1)
    """Rewrites per attempt; the one the student finds likeliest among the verified is kept."""
    minimal_edit: bool = False
    """Keep the attempt up to its first error and let the rewriter continue from there."""
    locate: Annotated[Literal["checker", "teacher_logprob", "fork"], GoesWith("minimal_edit")] = "checker"
    """How minimal_edit finds the first error: the task's checker of steps (gym), the first steep drop of the
    teacher's log-prob, or the first fork: where TOPD finds that near futures part."""
    locate_drop: Annotated[float, GoesWith("locate", "teacher_logprob")] = Field(4.0, gt=0)
    """teacher_logprob: nats by which a token must be likelier to the student than to the teacher."""
    locate_window: Annotated[int, GoesWith("locate", "fork")] = Field(20, ge=1)
    """fork: K, tokens of each near-future window."""
    locate_distance: Annotated[float, GoesWith("locate", "fork")] = Field(0.3, ge=0)
    """fork: smallest transport distance of the two windows."""
    gate: Annotated[bool, NEUTRAL] = True
    """Before training, rewrite a sample of real rollouts and refuse to go on if that harms them."""
    gate_prompts: Annotated[int, NEUTRAL] = Field(64, ge=1)
    """Rollouts that the gate rewrites."""
    gate_max_harm: Annotated[float, NEUTRAL] = Field(0.1, ge=0, le=1)
    """Largest accepted share of right attempts that the rewriter turns wrong."""
    epistemic: tuple[str, ...] | None = None
    """Words whose teacher probability is logged as epistemic mass; null: the gym's onset or TRD's list."""
    diagnose_every: Annotated[int, ROUNDING] = Field(1, ge=0)
    """Measure support gap, divergence by verdict, epistemic mass and perplexities every so many steps (one
    more forward pass of both models along y and z); 0 never."""

    @property
    def on_policy(self) -> bool:
        return (
            False  # y only seeds the rewrite: the loss runs along z, which nobody takes for a student sample
        )

    @property
    def teacher_weights(self) -> TeacherWeights | None:
        return self.weights if self.teacher == "self" else None

    @property
    def teacher_decay(self) -> float:
        return self.ema_decay

    @property
    def generates_ahead(self) -> bool:
        return self.offline

    @property
    def keeps_states(self) -> bool:
        return True  # those of its rewrites, which it has read while it wrote them

    @property
    def teacher_writes(self) -> bool:
        # A named rewriter goes on from the fork, but it is the prompt's own teacher whose windows find it.
        return self.rewriter is None or (self.minimal_edit and self.locate == "fork")

    @property
    def keeps_past(self) -> bool:
        return self.minimal_edit and self.locate == "fork"

    @property
    def writes_in_batches(self) -> bool:
        return True

    @property
    def asks_teachers(self) -> tuple[str, ...]:
        return () if self.rewriter is None else (self.rewriter,)

    @property
    def trains_on_rollouts(self) -> bool:
        return False

    @property
    def trains_on_own_tokens(self) -> bool:
        return (self.minimal_edit or self.refine == "wrong_only") and not self.paper_compat

    @property
    def supervises_end(self) -> bool:
        return not self.paper_compat

    @property
    def learns_from_text(self) -> bool:
        return True

    @property
    def longest_generated(self) -> tuple[int, str]:
        return self.rewrite_max_new_tokens or 0, "method.rewrite_max_new_tokens"

    @property
    def longest_window(self) -> tuple[int, str]:
        looks = self.minimal_edit and self.locate == "fork"
        return (self.locate_window, "method.locate_window") if looks else super().longest_window

    @property
    def correction_words(self) -> tuple[str, ...] | None:
        return self.epistemic

    @property
    def shows_reference(self) -> bool:
        return self.self_taught if self.reference is None else self.reference

    @property
    def needs(self) -> tuple[str, ...]:
        judges = self.refine != "all" or self.filter != "none"
        return ("solution",) * self.shows_reference + ("answer",) * judges

    @property
    def slots(self) -> frozenset[str]:
        """What the rewriter is shown."""
        shown = {"problem": True, "attempt": self.see_attempt, "solution": self.shows_reference}
        return frozenset(slot for slot, is_shown in shown.items() if is_shown)

    @model_validator(mode="after")
    def _possible(self) -> "TRDOptions":
        if self.minimal_edit and not self.see_attempt:
            raise ValueError("minimal_edit keeps a part of the attempt, so see_attempt must be true")
        if self.scoring == "plain" and self.self_taught:
            raise ValueError(
                "scoring is plain and teacher is self: on the plain problem the teacher is the student "
                "itself, which teaches nothing; use scoring: rewrite"
            )
        if self.minimal_edit and self.locate == "fork" and self.self_taught:
            raise ValueError(
                "locate: fork compares the student's near future with another model's; use teacher: model"
            )
        if self.template is not None:
            check_slots(self.template, self.slots)
        return self

    def check(self, config: Any) -> None:
        task = task_of(config.data.train)
        if self.minimal_edit and self.locate == "checker" and not (task and task.checks_steps):
            raise ValueError(
                f"method.locate: checker needs a task with a checker of steps, as the gym is, not "
                f"{config.data.train}; use teacher_logprob"
            )
        if self.minimal_edit and config.teacher.engine == "chat":
            raise ValueError(
                "method.minimal_edit has the teacher go on from the student's tokens, which a chat endpoint "
                "cannot; set it to false, or use teacher.engine: vllm"
            )

    def without_traces(self) -> "TRDOptions":
        return self.model_copy(update={"offline": False})
