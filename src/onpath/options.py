"""Options of each method: `method.name` chooses one of these. Data only, no torch.

What a method does is in `methods/`; what the papers say, leave open, and what we chose stands there too.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onpath.objective import Objective
from onpath.prompts import check_slots

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "sampled", "cross_entropy", "negative_advantage"
]


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values frozen, docstrings descriptions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class LossOptions(Section):
    """The per-token objective; the names are those of `onpath.losses.Objective`."""

    divergence: Divergence = "reverse_kl"
    """reverse_kl is KL(student‖teacher), forward_kl KL(teacher‖student); sampled is the policy gradient on
    the sampled token; cross_entropy and negative_advantage (a control) use no teacher."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Teacher's weight in the Jensen-Shannon mixture; jensen_shannon only."""
    support: Literal["full", "teacher_topk", "student_topk", "union"] = "full"
    """Vocabulary entries that the divergence runs over."""
    support_k: int = Field(32, ge=1)
    """k of a top-k support."""
    tail: Literal["renormalise", "bucket"] = "bucket"
    """What a top-k support does with the mass outside it: drop and renormalise, or one bucket for the rest.
    """
    entry_clip: float | None = Field(None, gt=0)
    """Cap each vocabulary entry's contribution before summing (OPSD uses 0.05); null is off."""
    token_clip: float | None = Field(None, gt=0)
    """Cap each token's summed divergence (TRD's baselines use 0.06 to 0.1); null is off."""
    reweight: Literal["none", "teacher_entropy", "student_entropy", "divergence"] = "none"
    """Weigh tokens by a statistic of theirs, normalised to mean 1 over the micro-batch-independent total."""
    first_tokens: int | None = Field(None, ge=1)
    """Train only on the first so many response tokens; null trains on all."""
    ppo_clip: float | None = Field(None, gt=0)
    """Clip range of the importance ratio; sampled only."""
    discount: float = Field(0.0, ge=0, le=1)
    """Weight of future log-ratios in a token's advantage; 0 is the token's own; sampled only."""

    def objective(self) -> Objective:
        """The loss that these options describe.

        Raises:
            ValueError: a combination that is known to be wrong, with the reason.
        """
        return Objective(
            kind=self.divergence,
            beta=self.beta if self.divergence == "jensen_shannon" else None,
            support=self.support,
            k=self.support_k if self.support != "full" else None,
            tail=self.tail,
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
            ppo_clip=self.ppo_clip,
            discount=self.discount,
        )

    cosine_every: int = Field(0, ge=0)
    """Measure the cosine of consecutive steps' gradients every so many steps (keeps one copy); 0 never."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that every training prompt must have."""
        return ()

    @property
    def self_taught(self) -> bool:
        """Whether the student is its own teacher."""
        return False


class OPDOptions(LossOptions):
    """On-policy distillation and its token-level baselines."""

    name: Literal["opd"] = "opd"
    writer: Literal["student", "teacher"] = "student"
    """Who writes the responses. teacher with divergence cross_entropy is SFT on teacher samples."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts, which are not samples of the student's own distribution."""

    @property
    def on_policy(self) -> bool:
        """Whether rollouts must come untruncated from the student."""
        return self.writer == "student" and (not self.off_policy or self.divergence == "sampled")


class OPSDOptions(LossOptions):
    """Self-distillation with privileged information (arXiv 2601.18734)."""

    name: Literal["opsd"] = "opsd"
    divergence: Divergence = "forward_kl"
    """As published; reverse_kl and jensen_shannon as options."""
    entry_clip: float | None = Field(0.05, gt=0)
    """Cap each vocabulary entry's contribution before summing; null is off."""
    weights: Literal["base", "live", "ema"] = "base"
    """Whose weights the privileged teacher has: the start's (LoRA: adapter off), the student's own, or their
    moving average."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Decay per optimiser step of the moving average; weights ema only."""
    hint: Literal["solution", "answer"] = "solution"
    """Which column the teacher is shown."""
    template: str | None = None
    """User message of the teacher with slots {problem} and {solution} (or {answer}); null: the gym's or our
    own."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts."""
    epistemic: tuple[str, ...] | None = None
    """Words whose teacher probability is logged as epistemic mass; null: the gym's onset or TRD's list."""
    diagnose_every: int = Field(1, ge=0)
    """Measure divergence by verdict, epistemic mass and perplexities every so many steps (the loss uses the
    same forward passes); 0 never."""

    @property
    def on_policy(self) -> bool:
        return not self.off_policy

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.hint,)

    @property
    def self_taught(self) -> bool:
        return True

    @model_validator(mode="after")
    def _slots(self) -> "OPSDOptions":
        if self.template is not None:
            check_slots(self.template, {"problem", self.hint})
        return self


class TRDOptions(LossOptions):
    """Trajectory-refined distillation (arXiv 2606.08432)."""

    name: Literal["trd"] = "trd"
    divergence: Divergence = "forward_kl"
    """Along the rewrite; cross_entropy is SFT on the rewrites."""
    teacher: Literal["model", "self"] = "model"
    """Who rewrites and scores: the teacher model, or the student's own weights shown the reference solution.
    """
    weights: Literal["base", "live", "ema"] = "base"
    """Weights of teacher: self, as for opsd."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Decay per optimiser step of the moving average; weights ema only."""
    reference: bool | None = None
    """Show the reference solution to the rewriter; null: only with teacher: self."""
    see_attempt: bool = True
    """False is the control in which the rewrite is written without seeing the student's attempt."""
    template: str | None = None
    """User message of the rewriter with slots {problem}, {attempt} and, with a reference, {solution}; null:
    the gym's or our own."""
    rewrite_temperature: float = Field(0.6, ge=0)
    """Of the rewrite z."""
    rewrite_top_p: float = Field(1.0, gt=0, le=1)
    """Of the rewrite z (the authors: 0.95)."""
    rewrite_max_new_tokens: int | None = Field(None, ge=1)
    """Longest rewrite; null: rollout.max_new_tokens."""
    rewrite_prompt_tokens: int | None = Field(None, ge=1)
    """Longest rewrite prompt: the attempt, then the reference, lose their ends until it fits; null: what the
    rewriter's context leaves."""
    scoring: Literal["rewrite", "plain"] = "rewrite"
    """Context in which the teacher scores z: the rewrite prompt (faithful), or the plain problem."""
    offline: bool = False
    """Rollouts and rewrites of each prompt once, from the starting weights (the paper's setting; one pass
    where optim.steps × rollout.prompts is the pool)."""
    paper_compat: bool = False
    """The authors' rendering: no chat template in the trained text and no EOS supervised."""
    refine: Literal["all", "wrong_only"] = "all"
    """wrong_only leaves right attempts as they are and trains only on rewrites of wrong ones."""
    filter: Literal["none", "drop_harmed", "wrong_to_right"] = "none"
    """drop_harmed drops right→wrong and unfinished rewrites; wrong_to_right keeps only repaired ones."""
    unfinished: Literal["keep", "drop"] = "keep"
    """Rewrites cut by rewrite_max_new_tokens: trained on as far as they go, or dropped."""
    best_of: int = Field(1, ge=1)
    """Rewrites per attempt; the one the student finds likeliest among the verified is kept."""
    minimal_edit: bool = False
    """Keep the attempt up to its first error and let the rewriter continue from there."""
    locate: Literal["checker", "teacher_logprob", "fork"] = "checker"
    """How minimal_edit finds the first error: the task's checker of steps (gym), the first steep drop of the
    teacher's log-prob, or the first fork: where TOPD finds that near futures part."""
    locate_drop: float = Field(4.0, gt=0)
    """teacher_logprob: nats by which a token must be likelier to the student than to the teacher."""
    locate_window: int = Field(20, ge=1)
    """fork: K, tokens of each near-future window."""
    locate_distance: float = Field(0.3, ge=0)
    """fork: smallest transport distance of the two windows."""
    gate: bool = True
    """Before training, rewrite a sample of real rollouts and refuse to go on if that harms them."""
    gate_prompts: int = Field(64, ge=1)
    """Rollouts that the gate rewrites."""
    gate_max_harm: float = Field(0.1, ge=0, le=1)
    """Largest accepted share of right attempts that the rewriter turns wrong."""
    epistemic: tuple[str, ...] | None = None
    """Words whose teacher probability is logged as epistemic mass; null: the gym's onset or TRD's list."""
    diagnose_every: int = Field(1, ge=0)
    """Measure support gap, divergence by verdict, epistemic mass and perplexities every so many steps (one
    more forward pass of both models along y and z); 0 never."""

    @property
    def on_policy(self) -> bool:
        return (
            False  # y only seeds the rewrite: the loss runs along z, which nobody takes for a student sample
        )

    @property
    def self_taught(self) -> bool:
        return self.teacher == "self"

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
        if self.minimal_edit and self.locate != "checker" and self.offline:
            raise ValueError(
                f"locate: {self.locate} asks the student as it is, but offline rewrites come from the "
                "starting weights; use locate: checker"
            )
        if self.template is not None:
            check_slots(self.template, self.slots)
        return self


class TOPDOptions(LossOptions):
    """Trajectory-aware OPD: near-future windows, optimal transport, guidance (arXiv 2606.00305)."""

    name: Literal["topd"] = "topd"
    candidates: Literal["reverse_kl", "teacher_nll", "sampled_gap"] = "reverse_kl"
    """Per-token loss that ranks positions; sampled_gap is log p_S − log p_T of the sampled token."""
    top_share: float = Field(0.0225, gt=0, le=1)
    """Share of each trajectory's positions that become candidates (at least one)."""
    min_gap: int = Field(1, ge=1)
    """Smallest distance between two candidates of one rollout."""
    max_per_rollout: int = Field(64, ge=1)
    """Most candidates of one rollout."""
    max_per_step: int = Field(4096, ge=1)
    """Most candidates of one optimiser step (per process); all rollouts give up the same share."""
    window: int = Field(50, ge=1)
    """K, tokens of each near-future window; scale it to the task (the gym: two steps)."""
    teacher_temperature: float = Field(0.0, ge=0)
    """Of the teacher's window; 0 is greedy."""
    student_window: Literal["rollout", "regenerate"] = "rollout"
    """What D compares with: the student's own rollout, or a fresh sample from the same prefix. Guidance
    follows the rollout in both cases."""
    reuse_cache: bool = True
    """Windows start from the keys and values of the teacher's scoring pass; false reads each prefix anew."""
    embedding: Literal["student", "teacher", "student_layer"] = "student"
    """Vectors of the cost: input embeddings of either model, or the student's hidden states in context."""
    embedding_layer: int = -1
    """student_layer: which hidden states, counted as transformers does (0 the embeddings, -1 the last)."""
    decide: Literal[
        "quantile",
        "threshold",
        "upper_quartile_of_low_loss",
        "sampled_gap",
        "random_positions",
        "all_high_loss",
    ] = "quantile"
    """How real forks are told from surface mismatches: D above its quantile drop_share, above threshold, or
    above the upper quartile of D at low-loss positions (the paper). Arms: the sampled log-ratio above its
    quantile drop_share; positions drawn at random; all candidates."""
    drop_share: float = Field(0.3, ge=0, lt=1)
    """quantile, sampled_gap, random_positions: share of candidates that are dropped."""
    quantile_decay: float = Field(0.5, ge=0, lt=1)
    """The quantile is a moving average over steps with this decay; 0 is that of the step alone."""
    threshold: float = Field(0.3, ge=0)
    """threshold: smallest distance of a fork."""
    plan: Literal["transport", "shuffled", "positional", "teacher_window_ce"] = "transport"
    """What spreads the guidance: the transport plan, or a control (its columns shuffled, token i to token i,
    or cross-entropy along the teacher's own window spliced in after y_<t)."""
    epsilon: float = Field(0.05, gt=0)
    """Entropic regularisation of the guidance plan (the distance is exact)."""
    mass: Literal["row", "literal"] = "row"
    """row scales each target to mass 1; literal keeps the plan's 1/K."""
    guidance_weight: float | Literal["auto"] = 1.0
    """λ. auto holds |λ∇L_traj| / |∇L_OPD|, at the hidden states, at auto_ratio."""
    auto_ratio: float = Field(0.5, gt=0)
    """Target of guidance_weight: auto."""
    overlap: Literal["average", "suppress"] = "average"
    """Targets that meet at one position are averaged; suppress first drops forks closer than K/2 to one of
    larger D."""
    guide: bool = True
    """False leaves only the suppression."""
    suppress: Literal["none", "low", "high"] = "none"
    """low caps surface mismatches among the candidates at the rollout's median loss; high caps as many of the
    others, drawn at random (control)."""
    record_above: float = Field(0.05, ge=0, le=1)
    """Entries of a plan, as a share of their row, that are stored with the trajectories."""
    off_policy: bool = False
    """Accept tempered or truncated rollouts."""

    @property
    def on_policy(self) -> bool:
        return not self.off_policy

    @model_validator(mode="after")
    def _possible(self) -> "TOPDOptions":
        if self.guidance_weight != "auto" and self.guidance_weight < 0:
            raise ValueError(f"guidance_weight must be at least 0, not {self.guidance_weight:g}")
        if not self.guide and self.suppress == "none":
            raise ValueError(
                "guide false without suppress changes nothing: use method.name opd, or set suppress"
            )
        return self


Method = OPDOptions | OPSDOptions | TRDOptions | TOPDOptions
METHOD_OPTIONS: dict[str, type[LossOptions]] = {
    "opd": OPDOptions,
    "opsd": OPSDOptions,
    "trd": TRDOptions,
    "topd": TOPDOptions,
}
