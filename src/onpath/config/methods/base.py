"""What the options of all methods have in common: the per-token objective, and the questions that the rest of
the library asks a method instead of asking which one it is. No torch.

A question is a property with a default; a method's options answer otherwise where they must.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticUndefined

from onpath.config.section import NEUTRAL, GoesWith, OneOf, Section
from onpath.losses.objective import KINDS, Objective
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.text import short

TeacherWeights = Literal["base", "live", "ema"]
_COLUMNS = ("text", "answer", "solution", "teacher")


def _is_column(name: str) -> str:
    if name not in _COLUMNS:
        raise ValueError(f"{name!r} is no column of a prompt: {', '.join(_COLUMNS)} are")
    return name


Divergence = Annotated[str, OneOf(KINDS, "function")]


class MethodOptions(Section):
    """Options of a method. The names of the per-token objective are those of `onpath.losses.Objective`."""

    model_config = ConfigDict(validate_default=True)  # those of a user's own may be wrong

    method_class: ClassVar[Any] = None
    """The `onpath.methods.Method` that these options belong to; set where that class is defined."""

    name: str = ""
    """`opd`, `opsd`, `trd`, `topd`, or a method of your own as file.py:Class (docs/extending.md)."""
    divergence: Divergence = "reverse_kl"
    """reverse_kl is KL(student‖teacher), forward_kl KL(teacher‖student); sampled is the policy gradient on
    the sampled token; cross_entropy and negative_advantage (a control) use no teacher; or a function of your
    own, file.py:name."""
    beta: Annotated[float, GoesWith("divergence", "jensen_shannon")] = Field(0.5, gt=0, lt=1)
    """Teacher's weight in the Jensen-Shannon mixture; jensen_shannon only."""
    teacher_temperature: float = Field(1.0, gt=0)
    """τ: the divergence is that from p_T^(1/τ), scaled to mass 1; below 1 a sharpened teacher. With
    reverse_kl an OPD whose entropy bonus is τ: it is not least where the student equals the teacher,
    deliberately."""
    support: Literal["full", "teacher_topk", "student_topk", "union"] = "full"
    """Vocabulary entries that the divergence runs over."""
    support_k: Annotated[int, GoesWith("support", "teacher_topk", "student_topk", "union")] = Field(32, ge=1)
    """k of a top-k support."""
    tail: Annotated[
        Literal["renormalise", "bucket"], GoesWith("support", "teacher_topk", "student_topk", "union")
    ] = "bucket"
    """What a top-k support does with the mass outside it: drop and renormalise, or one bucket for the rest.
    """
    entry_clip: float | None = Field(None, gt=0)
    """Cap each vocabulary entry's contribution before summing (OPSD uses 0.05); null is off."""
    token_clip: float | None = Field(None, gt=0)
    """Cap each token's summed divergence (TRD's baselines use 0.06 to 0.1); null is off."""
    reweight: Literal["none", "teacher_entropy", "student_entropy", "divergence"] = "none"
    """Weigh tokens by a statistic of theirs, scaled to mean 1 over the step."""
    first_tokens: int | None = Field(None, ge=1)
    """Train only on the first so many response tokens; null trains on all."""
    random_share: float = Field(1.0, gt=0, le=1)
    """Train on this share of the response tokens, drawn by lot; the others leave the count too. A control for
    whatever chooses tokens."""
    ppo_clip: float | None = Field(None, gt=0)
    """Clip range of the importance ratio; sampled only."""
    discount: float = Field(0.0, ge=0, le=1)
    """Weight of future log-ratios in a token's advantage; 0 is the token's own; sampled only."""

    importance: Literal["none", "token", "sequence"] = "none"
    """Weigh tokens by the ratio of the student's probability now and when the rollout was drawn, of each
    token or of the whole response, capped: for rollouts of older weights (rollout.overlap,
    rollout.refresh)."""
    importance_cap: float = Field(2.0, gt=0)
    """Largest such weight; ratios above it are counted in metrics.jsonl whatever importance is."""
    ends: Literal["apart", "one"] = "apart"
    """one: every token that ends a response is the same outcome to the divergence, whichever model prefers
    which (onpath doctor says what both end on). Not with TOPD's guidance or a served teacher."""

    cosine_every: Annotated[int, NEUTRAL] = Field(0, ge=0)
    """Measure the cosine of consecutive steps' gradients every so many steps (keeps one copy); 0 never."""

    @model_validator(mode="after")
    def _own_tokens(self) -> "MethodOptions":
        if self.divergence == "sampled" and self.others_write:
            raise ValueError(
                f"divergence sampled takes every token for the student's own, and {self.name} trains on some "
                "that others wrote; use reverse_kl"
            )
        return self

    def objective(self) -> Objective:
        """The loss that these options describe.

        Raises:
            ValueError: a combination that is known to be wrong, with the reason.
        """
        kind: Any = self.divergence
        if code.is_own(kind):
            kind = code.load(kind, key="method.divergence")
        found = Objective(
            kind=kind,
            beta=self.beta if self.divergence == "jensen_shannon" else None,
            support=self.support,
            k=self.support_k if self.support != "full" else None,
            tail=self.tail,
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
            teacher_temperature=self.teacher_temperature,
            ppo_clip=self.ppo_clip,
            discount=self.discount,
        )
        if self.ends == "one" and not found.is_divergence:
            raise ValueError(f"ends: one is about what a divergence compares, and {found.name} compares none")
        return found

    @property
    def measures_ratio_every(self) -> int:
        """Steps between two measurements of the gradients of guidance and objective apart; 0: never."""
        return 10

    @property
    def needs(self) -> tuple[Annotated[str, AfterValidator(_is_column)], ...]:
        """Columns that every training prompt must have."""
        return ()

    @property
    def on_policy(self) -> bool:
        """Whether rollouts must come untruncated from the student: what most objectives assume."""
        return True

    @property
    def generates_ahead(self) -> bool:
        """Whether the starting weights generate all that the run will train on, before its first step."""
        return False

    @property
    def teacher_weights(self) -> TeacherWeights | None:
        """Which of the student's own weights teach; None: the teacher is another model."""
        return None

    @property
    def teacher_decay(self) -> float:
        """Decay per optimiser step of `teacher_weights: ema`."""
        return 0.99

    @property
    def self_taught(self) -> bool:
        """Whether the student is its own teacher."""
        return self.teacher_weights is not None

    @property
    def asks_teachers(self) -> tuple[str, ...]:
        """Of several teachers those that the method asks, whatever a prompt's own is."""
        return ()

    @property
    def trains_on_rollouts(self) -> bool:
        """Whether the loss runs along the student's own rollouts."""
        return True

    @property
    def trains_on_own_tokens(self) -> bool:
        """Whether tokens are trained on that the student drew."""
        return self.trains_on_rollouts

    @property
    def writes_rollouts(self) -> bool:
        """Whether the method writes the rollouts (`Method.write_rollouts`), and not the student's engine."""
        return False

    @property
    def takes_rollouts(self) -> bool:
        """Whether `prepare` also takes rollouts that the student's engine has written."""
        return not self.writes_rollouts

    @property
    def others_write(self) -> bool:
        """Whether tokens are trained on that the student did not draw."""
        return not self.trains_on_rollouts

    @property
    def supervises_end(self) -> bool:
        """Whether the stop token is trained on."""
        return True

    @property
    def shows_reference(self) -> bool:
        """Whether the teacher sees the reference solution."""
        return False

    @property
    def runs_models(self) -> bool:
        """Whether `prepare` runs the models."""
        return True

    @property
    def gathers_models(self) -> bool:
        """Whether they are run between sampling and the loss: where they are sharded, they are whole then."""
        return self.runs_models or self.reweight != "none"

    @property
    def keeps_past(self) -> bool:
        """Whether the teacher goes on from its scoring pass, whose keys and values are kept until then."""
        return False

    @property
    def keeps_states(self) -> bool:
        """Whether the teacher's states of what `prepare` reads are kept for the loss, of the whole step."""
        return False

    @property
    def teacher_writes(self) -> bool:
        """Whether a prompt's own teacher generates: it rewrites, goes on, or takes over."""
        return False

    @property
    def writes_in_batches(self) -> bool:
        """Whether it does so in batches of generation, and not from a scoring pass alone."""
        return self.teacher_writes and not self.keeps_past

    @property
    def side_by_side(self) -> bool:
        """Whether student and teacher, where both are in this process, write one response together."""
        return False

    @property
    def learns_from_text(self) -> bool:
        """Whether a teacher that only answers messages, and scores nothing, is enough."""
        return False

    @property
    def longest_generated(self) -> tuple[int, str]:
        """Most new tokens that the method asks for beside rollout.max_new_tokens, and the option that says
        so."""
        return 0, "rollout.max_new_tokens"

    @property
    def longest_window(self) -> tuple[int, str]:
        """Most tokens that are generated behind a place inside a response, and the option that says so."""
        return 0, "rollout.max_new_tokens"

    @property
    def correction_words(self) -> tuple[str, ...] | None:
        """Words whose teacher probability is logged as epistemic mass; None: the task's, or TRD's list."""
        return None

    @property
    def finds(self) -> tuple[str, str]:
        """The metric that is the share in which the method found something to correct, and what to change
        where that is 0; empty: it corrects all of them, or by a checker."""
        return "", ""

    def nothing_found(self, shares: Mapping[str, Any]) -> str:
        """What to know where the metrics of a step say that the method found nothing; else empty."""
        metric, advice = self.finds
        if not metric or shares.get(metric) != 0:
            return ""
        return (
            f"{self.name} found nothing to correct in these rollouts: such a step is OPD's at a higher "
            f"price; {advice}"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a run with these options says at its start."""
        return ()

    def check(self, config: Any) -> None:
        """Looks at the whole config (`onpath.config.Config`) for what cannot go together with this method.

        Raises:
            ValueError: it cannot; one sentence that names the keys and says what would be right.
        """

    def without_traces(self) -> "MethodOptions":
        """The same method where nothing may be written beside a run (`onpath doctor`)."""
        return self


def check_defaults(options: type[MethodOptions], name: str) -> None:
    """Asks whether the options of a user's own method take their own defaults, before a config is blamed.

    Raises:
        UserError: one does not; or it has the name of an option of every method, which does not.
    """
    for key, own in options.model_fields.items():
        if own.default is PydanticUndefined:
            continue
        shared = MethodOptions.model_fields.get(key)
        for field, said in ((shared, "is an option of every method, and is"), (own, "is")):
            if field is None:
                continue
            try:
                kind: Any = Annotated[field.annotation, *field.metadata, key]  # at least one beside the type
                TypeAdapter(kind).validate_python(own.default)
            except ValidationError as error:
                reason = _reason(error.errors(include_url=False)[0])
                end = "" if field is own else "; name yours otherwise"
                where = f"method.name {name}: Options.{key}"
                raise UserError(f"{where} {said} {short(own.default)} by default: {reason}{end}") from None
            except PydanticUserError:  # a type that only the whole class can say how to read
                continue


def check_answers(method: MethodOptions) -> None:
    """Asks the options of a user's own method all questions, before anything relies on an answer.

    Raises:
        UserError: one fails, or its answer is of no use.
    """
    for name, kind in _questions().items():
        where = f"method.name {method.name}: Options.{name}"
        with code.blamed(where, code.modules_of(method)):
            answer = getattr(method, name)
        if callable(answer):
            raise UserError(f"{where} is no property; write @property above it")
        try:
            kind.validate_python(answer, strict=not isinstance(answer, list))
        except ValidationError as error:
            reason = _reason(error.errors(include_url=False)[0])
            raise UserError(f"{where} gives {short(answer)}: {reason}") from None


def _reason(said: Any) -> str:
    """Of pydantic's, as the end of a sentence."""
    reason = str(said.get("ctx", {}).get("error") or said["msg"])
    return reason[0].lower() + reason[1:]


@cache
def _questions() -> dict[str, TypeAdapter[Any]]:
    """Of each question what an answer must be; whatever is true or false answers one about that."""
    asked = {name: value.fget for name, value in vars(MethodOptions).items() if isinstance(value, property)}
    kinds = {n: get_type_hints(function, include_extras=True)["return"] for n, function in asked.items()}
    return {name: TypeAdapter(Any if kind is bool else kind) for name, kind in kinds.items()}


def check_with(method: MethodOptions, config: Any) -> None:
    """`MethodOptions.check` of any method.

    Raises:
        ValueError: it refuses the config; or one of the user's own fails.
    """
    own = code.is_own(method.name)
    with code.blamed(f"method.name {method.name}: Options.check", code.modules_of(method) if own else ()):
        try:
            method.check(config)
        except ValueError as error:
            raise UserError(str(error)) from error
