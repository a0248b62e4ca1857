"""What a method is: it turns rollouts into trajectories. Everything else is the same for all of them.

A method of your own is a class like those beside this file, in a file anywhere: docs/extending.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from onpath.config.methods import MethodOptions
from onpath.engines.forward import Kept
from onpath.methods.tools import Tools
from onpath.records import Prompt, Rollout, Trajectory
from onpath.system import distributed
from onpath.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A method's answer to one step's rollouts."""

    trajectories: list[Trajectory]
    """To train on, and with `edit.kept` false those recorded only."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Added to the step's line of metrics.jsonl."""
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Likewise, as (sum, count) of this process: divided after both are summed over all processes."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Likewise, summed over all processes. `student_tokens_generated` and `teacher_tokens_generated` are what
    the method had them generate, beside the rollouts."""
    kept: Kept = field(default_factory=Kept)
    """Hidden states that the method has computed already and the loss can use."""
    guidance_weight: float = 1.0
    """λ of the trajectories' guidance."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a method finds out about itself on a sample of prompts, before it trains."""

    sentence: str
    """For people."""
    refusal: str = ""
    """Why training like this would do harm; empty if it should not."""
    binding: bool = True
    """Whether `before_training` refuses to go on then."""
    values: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """One published method: `prepare` is all that it must define.

    Args:
        options: an instance of `Options`, from the config's section `method`.
        tools: models, engines, text, sampling.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    compares_samples: ClassVar[bool] = False
    """Whether `prepare` compares the samples of one prompt (rollout.n above 1): then they go to one process
    together, where rollouts are dealt to several."""

    def __init__(self, options: Any, tools: Tools) -> None:
        self.options, self.tools = options, tools

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not (isinstance(cls.Options, type) and issubclass(cls.Options, MethodOptions)):
            raise UserError(
                f"{cls.__name__}.Options must be derived from onpath.methods.MethodOptions, as in "
                "class Options(MethodOptions)"
            )
        inherited = "Options" not in vars(cls)
        others = "method_class" in vars(cls.Options)  # another class has them by now
        asks = cls.Options.method_class and cls.Options.model_fields["name"].annotation is not str
        if inherited or others or asks:
            # A method is found by its options' class, which must not be another one's, nor ask for its name.
            own = {
                "__module__": cls.__module__,
                "__doc__": cls.Options.__doc__,
                "__annotations__": {"name": str},
            }
            cls.Options = type("Options", (cls.Options,), {**own, "name": ""})
        cls.Options.method_class = cls

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """Edits or annotates the rollouts of one optimiser step. Draws depend on `step`.

        Args:
            rollouts: this process's part of them (see `compares_samples` and `Tools.gather`).
        """
        raise NotImplementedError

    def write_rollouts(
        self, blank: Sequence[Rollout], *, keys: Sequence[str], step: int
    ) -> Sequence[Rollout]:
        """Writes the rollouts of one step in place of the student's engine, where the options say so
        (`writes_rollouts`); with `Rollout.writers`, where the student has not written all.

        Args:
            blank: this process's rollouts, without a token.
            keys: of each: name its first draws, as they name the student's own.
        """
        raise NotImplementedError

    def scored_first(self, rollout: Rollout) -> Trajectory | None:
        """What the teacher will be asked to score of a rollout, where that is known as soon as it is written:
        it may begin while others are. None: it depends on more."""
        return None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Looks at the training prompts before anything is generated.

        Raises:
            UserError: one cannot be used.
        """

    def before_training(self, prompts: Sequence[Prompt], directory: Path) -> str:
        """Called once before the first step, on every process, with the starting weights.

        Args:
            prompts: the training pool.
            directory: of the run; what is written there is found again by a resumed run.

        Returns:
            A sentence for people, or nothing.

        Raises:
            UserError: the run should not start.
        """
        return ""

    def rehearse(self, prompts: Sequence[Prompt]) -> Rehearsal | None:
        """What `before_training` would find, without a trace: for `onpath doctor`. None: it asks nothing."""
        return None

    def after_step(self, measured: Mapping[str, Any]) -> None:
        """Called after each optimiser step with its metrics over all processes, as metrics.jsonl has them,
        without seconds, learning rate and versions."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a resumed run needs, restored in place. All processes hold the same (`Tools.gather`):
        a checkpoint has one, for any number of processes."""
        return {}


def own_response(
    rollout: Rollout, *, teacher_context: Sequence[int] | None = None, length: int | None = None
) -> Trajectory:
    """A rollout, or its first tokens, in the teacher's context (default: the student's)."""
    return Trajectory(
        student_context=rollout.context,
        teacher_context=rollout.context if teacher_context is None else tuple(teacher_context),
        response=rollout.ids[:length],
        origin=rollout,
        behaviour_logprobs=rollout.logprobs[:length],
        writers=rollout.writers[:length] or None,
    )


def check_generated(trajectories: Sequence[Trajectory], *, step: int, who: str, of: str, look: str) -> None:
    """Some of what was generated in the teacher's name must be text, over all processes: each must call.

    Raises:
        UserError: none of it is.
    """
    mine = [len(trajectories), sum(t.edit.reason == "empty" for t in trajectories)]
    asked, empty = distributed.total(mine)
    if asked and empty == asked:
        raise UserError(
            f"step {step + 1}: {who} returned no text for any of {asked:.0f} {of}, so there is nothing to "
            f"train on; look at {look} (a reasoning model may have thought for all of rollout.max_new_tokens)"
        )
