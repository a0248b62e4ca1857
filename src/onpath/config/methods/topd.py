"""Options of TOPD."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from onpath.config.methods.base import MethodOptions
from onpath.config.section import NEUTRAL, ROUNDING, GoesWith

_BY_DISTANCE = ("quantile", "threshold", "upper_quartile_of_low_loss")
_GUIDING = ("transport", "shuffled", "positional")
"""Plans that become targets of the rollout's own tokens."""


class TOPDOptions(MethodOptions):
    """Trajectory-aware OPD: near-future windows, optimal transport, guidance (arXiv 2606.00305)."""

    name: Literal["topd"] = "topd"
    candidates: Annotated[
        Literal["reverse_kl", "teacher_nll", "sampled_gap"],
        GoesWith("decide", *_BY_DISTANCE, "sampled_gap", "all_high_loss"),
    ] = "reverse_kl"
    """Per-token loss that ranks positions; sampled_gap is log p_S − log p_T of the sampled token."""
    top_share: float = Field(0.0225, gt=0, le=1)
    """Share of each trajectory's positions that become candidates (at least one)."""
    min_gap: int = Field(1, ge=1)
    """Smallest distance between two candidates of one rollout."""
    max_per_rollout: int | None = Field(None, ge=1)
    """Most candidates of one rollout; null: no cap (the paper)."""
    max_per_step: int | None = Field(None, ge=1)
    """Most candidates of one optimiser step over all processes; all rollouts give up the same share. null: no
    cap (the paper)."""
    window: int = Field(50, ge=1)
    """K, tokens of each near-future window; scale it to the task (the gym: two steps)."""
    window_temperature: float = Field(0.0, ge=0)
    """Of the teacher's window; 0 is greedy."""
    student_window: Literal["rollout", "regenerate"] = "rollout"
    """What D compares with: the student's own rollout, or a fresh sample from the same prefix. Guidance
    follows the rollout in both cases."""
    reuse_cache: Annotated[bool, ROUNDING] = True
    """Windows start from the keys and values of the teacher's scoring pass; false reads each prefix anew."""
    embedding: Literal["student", "teacher", "student_layer"] = "student"
    """Vectors of the cost: input embeddings of either model, or the student's hidden states in context."""
    embedding_layer: Annotated[int, GoesWith("embedding", "student_layer")] = -1
    """student_layer: which hidden states, counted as transformers does (0 the embeddings, -1 the last)."""
    decide: Literal[
        "quantile",
        "threshold",
        "upper_quartile_of_low_loss",
        "sampled_gap",
        "random_positions",
        "all_high_loss",
    ] = "upper_quartile_of_low_loss"
    """How real forks are told from surface mismatches: D above the upper quartile of D at low-loss positions
    (what the paper calls a low divergence), above its quantile drop_share (its cut for suppression), or above
    threshold. Arms: the sampled log-ratio above its quantile drop_share; positions drawn at random; all
    candidates."""
    drop_share: Annotated[float, GoesWith("decide", "quantile", "sampled_gap", "random_positions")] = Field(
        0.3, ge=0, lt=1
    )
    """quantile, sampled_gap, random_positions: share of candidates that are dropped."""
    quantile_decay: Annotated[
        float, GoesWith("decide", "quantile", "sampled_gap", "upper_quartile_of_low_loss")
    ] = Field(0.5, ge=0, lt=1)
    """The quantile is a moving average over steps with this decay; 0 is that of the step alone."""
    threshold: Annotated[float, GoesWith("decide", "threshold")] = Field(0.3, ge=0)
    """threshold: smallest distance of a fork."""
    references: Annotated[
        PositiveInt | Literal["auto"] | None, GoesWith("decide", "upper_quartile_of_low_loss")
    ] = "auto"
    """upper_quartile_of_low_loss: windows at low-loss positions in one optimiser step over all processes,
    each in a rollout of its own; auto: one for every 16 candidates, at least 4, at most 16; null: as many as
    candidates."""
    plan: Annotated[
        Literal["transport", "spliced", "shuffled", "positional", "teacher_window_ce"], GoesWith("guide")
    ] = "transport"
    """transport: the plan between the windows spreads the teacher's tokens over the student's own. spliced:
    no guidance, but the objective along the teacher's window after y_<t, scored by the teacher there, its
    tokens in the common count. Controls: the plan's columns shuffled; token i to token i; cross-entropy along
    the spliced window."""
    splice: Annotated[Literal["window", "end"], GoesWith("guide")] = "window"
    """spliced: the teacher's K tokens, or its continuation to the end."""
    epsilon: Annotated[float, GoesWith("guide"), GoesWith("plan", "transport", "shuffled")] = Field(
        0.05, gt=0
    )
    """Entropic regularisation of the guidance plan (the distance is exact)."""
    mass: Annotated[Literal["literal", "row"], GoesWith("guide"), GoesWith("plan", *_GUIDING)] = "literal"
    """literal: each target keeps its row's mass, 1/K, as the formula says. row scales it to 1: behind an
    error it teaches tokens of another context (docs/methods.md)."""
    guidance_weight: Annotated[
        float | Literal["auto"], GoesWith("guide"), GoesWith("plan", *_GUIDING, "teacher_window_ce")
    ] = 1.0
    """λ. auto holds |λ∇L_traj| / |∇L_OPD|, the norms of the two gradients of the trained weights, at
    auto_ratio."""
    auto_ratio: Annotated[float, GoesWith("guidance_weight", "auto")] = Field(0.5, gt=0)
    """Target of guidance_weight: auto."""
    ratio_every: Annotated[
        int | None, GoesWith("guide"), GoesWith("plan", *_GUIDING, "teacher_window_ce")
    ] = Field(None, ge=0)
    """Measure that ratio every so many steps (one more pass of the student, a copy of the gradient); null: at
    every step with guidance_weight: auto, else at every tenth; 0 never."""
    overlap: Literal["sum", "average", "suppress"] = "sum"
    """Targets that meet at one position: summed, as the formula says, or averaged; suppress first drops forks
    closer than K/2 to one of larger D, then sums."""
    guide: bool = True
    """False leaves only the suppression."""
    suppress: Annotated[
        Literal["none", "low", "high"], GoesWith("decide", *_BY_DISTANCE, "sampled_gap", "random_positions")
    ] = "none"
    """low caps surface mismatches among the candidates at the rollout's median loss; high caps as many of the
    others, drawn at random (control)."""
    record_above: Annotated[float, NEUTRAL, GoesWith("guide"), GoesWith("plan", *_GUIDING)] = Field(
        0.05, ge=0, le=1
    )
    """Entries of a plan, as a share of their row, that are stored with the trajectories."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts."""

    @property
    def on_policy(self) -> bool:
        return not self.off_policy or self.divergence == "sampled"

    @property
    def teacher_writes(self) -> bool:
        return True

    @property
    def others_write(self) -> bool:
        return self.guide and self.plan == "spliced"

    @property
    def idle(self) -> dict[str, str]:
        """See `Section.idle`."""
        guided, found = self.guide and self.plan in _GUIDING, super().idle
        if self.overlap == "average" and not guided:
            found["overlap"] = f"plan: {' or '.join(_GUIDING)}" if self.guide else "guide"
        if self.decide in _BY_DISTANCE or self.overlap == "suppress":
            return found
        judged = f"decide: {' or '.join(_BY_DISTANCE)}"  # else the distance is only written down
        if self.student_window == "regenerate":
            found["student_window"] = judged
        if self.embedding != "student" and not (guided and self.plan != "positional"):
            found["embedding"] = judged
        return found

    @property
    def longest_window(self) -> tuple[int, str]:
        return self.window, "method.window"

    @property
    def keeps_states(self) -> bool:
        return True

    @property
    def keeps_past(self) -> bool:
        return self.reuse_cache

    @property
    def finds(self) -> tuple[str, str]:
        fixed = self.decide == "threshold" and self.suppress == "none"
        return ("fork_share" if fixed else ""), f"lower method.threshold ({self.threshold:g})"

    @property
    def warnings(self) -> tuple[str, ...]:
        if self.mass == "literal" or not self.guide or self.plan in ("spliced", "teacher_window_ce"):
            return ()
        return (
            "method.mass: row gives every guided token a target of mass 1, also behind an error, where the "
            "target's tokens belong to another context; where errors stay that cost 8 to 27 points "
            "(docs/methods.md); the formula's mass is literal",
        )

    @property
    def measures_ratio_every(self) -> int:
        if self.ratio_every is not None:
            return self.ratio_every
        return 1 if self.guidance_weight == "auto" else 10

    def check(self, config: Any) -> None:
        if self.guidance_weight == "auto" and config.refresh is not None:
            raise ValueError(
                "method.guidance_weight: auto follows each step's gradients, and with rollout.refresh the "
                "guidance of many steps is made at once; give it a number"
            )
        if self.embedding == "teacher" and config.teachers:
            raise ValueError(
                "method.embedding: teacher is for one teacher, and there are several; use student"
            )
        if self.embedding == "teacher" and config.teacher.engine != "hf":
            raise ValueError(
                "method.embedding: teacher reads the embeddings of a teacher in this process, and "
                f"teacher.engine is {config.teacher.engine}; use student"
            )

    @model_validator(mode="after")
    def _possible(self) -> "TOPDOptions":
        if self.guidance_weight != "auto" and self.guidance_weight < 0:
            raise ValueError(f"guidance_weight must be at least 0, not {self.guidance_weight:g}")
        if self.guidance_weight == "auto" and self.ratio_every == 0:
            raise ValueError("guidance_weight auto follows the ratio that ratio_every: 0 never measures")
        if self.splice == "end" and self.plan != "spliced":
            raise ValueError(f"splice end continues the windows of plan spliced, not of plan {self.plan}")
        if self.guide and self.ends == "one":
            raise ValueError("ends: one is not for guidance, whose targets are tokens; use ends: apart")
        if not self.guide and self.suppress == "none":
            raise ValueError(
                "guide false without suppress changes nothing: use method.name opd, or set suppress"
            )
        return self
