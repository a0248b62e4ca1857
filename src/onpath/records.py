"""The records that flow through a step. Plain Python, no torch; frozen: a change makes a new record.

    Prompt ──engine──▶ Rollout ──method──▶ Trajectory ──batch──▶ tensors
                          └──grade──▶ Graded

Token ids are the truth: text is made from ids for people and for graders, never the other way round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

FinishReason = Literal["stop", "length"]
Writer = Literal["student", "teacher", "forced"]
"""Who wrote a token: a model sampled it, or a rule put it there."""
WRITERS: tuple[Writer, ...] = get_args(Writer)
Writers = tuple[Writer, ...]
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem of the data set.

    >>> Prompt(id="0", text="7 + 5?", answer="12").question
    '7 + 5?'
    """

    id: str
    """Unique in its data set; results are paired by it."""
    text: str | None = None
    """Plain prompt. Exactly one of `text` and `messages` is set."""
    messages: tuple[Message, ...] | None = None
    """Chat prompt: `{"role": …, "content": …}` each, the last one from the user."""
    answer: str | None = None
    """What the grader compares with; None where there is nothing to grade."""
    tests: bool = False
    """Whether that is tests of a program (for `eval.grader: code`)."""
    solution: str | None = None
    """Reference solution: privileged information that only a teacher may see."""
    teacher: str | None = None
    """The one of several teachers that teaches it; None: there is one only."""
    where: str = field(default="", compare=False, repr=False)
    """File and line, or source and row, that it was read from."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError(f"prompt {self.id!r} needs exactly one of text and messages")

    @property
    def named(self) -> str:
        """Its id and where it stands, for whoever has to mend it."""
        return f"{self.id!r} ({self.where})" if self.where else repr(self.id)

    @property
    def question(self) -> str:
        """The problem as one string: the text, or the last user message."""
        if self.text is not None:
            return self.text
        assert self.messages is not None
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def shown(self) -> str:
        """All of it, for a reader: of several messages each behind its role.

        >>> turns = ("user", "7 + 5?"), ("assistant", "12."), ("user", "Sure?")
        >>> print(Prompt(id="0", messages=tuple({"role": r, "content": c} for r, c in turns)).shown)
        user: 7 + 5?
        assistant: 12.
        user: Sure?
        """
        if self.messages is None or len(self.messages) == 1:
            return self.question
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    >>> Sampling(temperature=0.6, top_p=0.95).untruncated
    False
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the likeliest tokens of so much mass; 1 is off."""
    top_k: int = 0
    """0 is off."""
    max_new_tokens: int = 256
    """Longest response, the stop token included."""
    seed: int = 0
    """Draws depend on it and on the request's key alone."""

    @property
    def untruncated(self) -> bool:
        """Draws from the model's own distribution: what on-policy objectives assume."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Tokens generated after a prefix.

    >>> Completion(ids=(4, 2), logprobs=(-0.3, -0.1), finish_reason="stop").finish_reason
    'stop'
    """

    ids: tuple[int, ...]
    """The stop token included, if one was drawn."""
    logprobs: tuple[float, ...]
    """Under the distribution drawn from (after temperature, top-k, top-p), nats."""
    finish_reason: FinishReason
    """stop: by a stop token or text; length: there was no more room."""

    def truncated(self, length: int) -> "Completion":
        """Its first tokens; unfinished, if that is not all of them."""
        if len(self.ids) <= length:
            return self
        return Completion(ids=self.ids[:length], logprobs=self.logprobs[:length], finish_reason="length")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response. `ids` includes the stop token if one was drawn.

    >>> prompt = Prompt(id="0", text="7 + 5?")
    >>> r = Rollout(prompt=prompt, ids=(4, 5, 2), logprobs=(-0.1, -0.7, -0.2), finish_reason="stop",
    ...             policy_version=0, sampling=Sampling(), context=(1, 9))
    >>> len(r.ids) == len(r.logprobs)
    True
    """

    prompt: Prompt
    """The problem that it answers."""
    ids: tuple[int, ...]
    """The response's tokens, without the prompt's."""
    logprobs: tuple[float, ...]
    """Of each token under the distribution it was drawn from (after temperature, top-p, top-k), nats."""
    finish_reason: FinishReason
    """As in `Completion`."""
    policy_version: int
    """Number of optimiser steps that the weights had seen."""
    sampling: Sampling
    """How its tokens were drawn."""
    context: tuple[int, ...] = ()
    """The ids that the response continues: the rendered prompt."""
    sample: int = 0
    """Which of the prompt's n samples this is."""
    place: int = 0
    """Its index among the rollouts that were generated together: what joins it to its verdict."""
    writers: Writers = ()
    """Who wrote each token, where others than the student did; empty: it wrote all."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.logprobs):
            raise ValueError(
                f"rollout of {self.prompt.id!r}: {len(self.ids)} ids, {len(self.logprobs)} logprobs"
            )
        if self.writers and len(self.ids) != len(self.writers):
            raise ValueError(
                f"rollout of {self.prompt.id!r}: {len(self.ids)} ids, {len(self.writers)} writers"
            )

    @property
    def key(self) -> str:
        """Names it in the draws of its step: prompt and sample."""
        return f"{self.prompt.id}/{self.sample}"

    @property
    def written_by(self) -> Writers:
        """`writers` with the default spelled out."""
        return self.writers or all_by("student", len(self.ids))

    def prefix(self, length: int) -> tuple[int, ...]:
        """The context and the first `length` tokens of the response."""
        return self.context + self.ids[:length]

    def continued(self, completion: Completion, *, at: int | None = None) -> "Rollout":
        """Its first `at` tokens (None: all) and what was generated after them.

        >>> r = Rollout(prompt=Prompt(id="0", text="7 + 5?"), ids=(4, 5), logprobs=(-0.1, -0.7),
        ...             finish_reason="length", policy_version=0, sampling=Sampling(), context=(1, 9))
        >>> r.continued(Completion(ids=(6, 2), logprobs=(-0.2, -0.3), finish_reason="stop"), at=1).ids
        (4, 6, 2)
        """
        return replace(
            self,
            ids=(*self.ids[:at], *completion.ids),
            logprobs=(*self.logprobs[:at], *completion.logprobs),
            finish_reason=completion.finish_reason,
            writers=self.writers and self.writers[:at] + all_by("student", len(completion.ids)),
        )


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Sparse target distributions for consecutive response positions (TOPD).

    >>> g = Guidance(start=2, targets=({5: 1.0}, {7: 0.5, 8: 0.5}))   # positions 2 and 3 of the response
    >>> [sum(t.values()) for t in g.targets]
    [1.0, 1.0]
    """

    start: int
    """Index into the response of the first target."""
    targets: tuple[Mapping[int, float], ...]
    """For each position: token id → mass, above 0. The mass of a row need not be 1: several windows may meet
    there."""

    def scaled(self, factor: float) -> "Guidance":
        """With each mass times a factor above 0: so is the gradient, Σ KL's constant aside."""
        return replace(self, targets=tuple({k: p * factor for k, p in t.items()} for t in self.targets))


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a method did to a trajectory, and why.

    >>> Edit(kind="none").kept
    True
    """

    kind: str
    """`none`, `rewrite`, `minimal_edit`, `bridge`, …"""
    kept: bool = True
    """False: recorded, but not trained on."""
    reason: str = ""
    """Why it is as it is, in a word or two, where there is a choice; of one that is not kept always."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready values that the method measured (edit distance, length ratio, forks, …)."""


_PER_TOKEN = ("weights", "counted", "writers", "advantages", "behaviour_logprobs")
"""Fields of a trajectory that have one value per response token, where they are set."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Two contexts of different lengths, one shared response: what is trained on.

    The student is conditioned on `student_context + response`, the teacher on `teacher_context + response`;
    position t of the response is the same token in both.

    >>> t = Trajectory(student_context=(1, 9), teacher_context=(1, 7, 7, 9), response=(4, 2))
    >>> t.weights is None        # every response token counts once
    True
    """

    student_context: tuple[int, ...]
    """Ids of the prompt as the student sees it."""
    teacher_context: tuple[int, ...]
    """Ids of the prompt as the teacher sees it, with what it alone may know."""
    response: tuple[int, ...]
    """Ids that both continue with."""
    weights: tuple[float, ...] | None = None
    """Per response token; None is all ones. A trajectory made with weight 0 for a token drops it from the
    loss and from the count; a weight that `reweighted` brings to 0 leaves it in the count."""
    guidance: tuple[Guidance, ...] = ()
    """Target distributions at some positions, beside the divergence."""
    origin: Rollout | None = None
    """The student's rollout that this came from."""
    edit: Edit = field(default_factory=lambda: Edit(kind="none"))
    """What was done to it."""
    behaviour_logprobs: tuple[float, ...] | None = None
    """Log-probs under the policy that generated the response, where the objective corrects for it."""
    advantages: tuple[float, ...] | None = None
    """Of each response token, in place of log p_T − log p_S and of its discounted sum: divergence sampled
    only. All trajectories of a step have them, or none."""
    writers: Writers | None = None
    """Who wrote each response token; None: the student, all of them."""
    place: int | None = None
    """Its index among the trajectories that are read or trained on together; set there."""
    counted: tuple[bool, ...] | None = None
    """Whether each response token is in the loss's count; None: those whose weight is not 0."""
    begins: int = 0
    """Tokens of the response that stand in both contexts already (a second branch)."""

    def __post_init__(self) -> None:
        if not self.student_context or not self.teacher_context:
            raise ValueError("a trajectory needs at least one context token on each side")
        for name in _PER_TOKEN:
            given = getattr(self, name)
            if given is not None and len(given) != len(self.response):
                raise ValueError(f"{len(given)} {name} for {len(self.response)} response tokens")
        for g in self.guidance:
            if g.start < 0 or g.start + len(g.targets) > len(self.response):
                raise ValueError(f"guidance at {g.start} for {len(g.targets)} positions leaves the response")

    @property
    def teacher(self) -> str | None:
        """The one of several teachers that scores it: its prompt's.

        >>> x = Prompt(id="0", text="7 + 5?", teacher="math")
        >>> y = Rollout(prompt=x, ids=(2,), logprobs=(0.0,), finish_reason="stop", policy_version=0,
        ...             sampling=Sampling())
        >>> Trajectory(student_context=(1,), teacher_context=(1,), response=(2,), origin=y).teacher
        'math'
        """
        return None if self.origin is None else self.origin.prompt.teacher

    @property
    def token_weights(self) -> tuple[float, ...]:
        """Weights with the default spelled out."""
        return (1.0,) * len(self.response) if self.weights is None else self.weights

    @property
    def written_by(self) -> Writers:
        """`writers` with the default spelled out."""
        return all_by("student", len(self.response)) if self.writers is None else self.writers

    def truncated(self, length: int) -> "Trajectory":
        """Only the first `length` response tokens; the rest is neither scored nor counted.

        >>> t = Trajectory(student_context=(1,), teacher_context=(1,), response=(4, 5, 2))
        >>> t.truncated(2).response
        (4, 5)
        """
        if len(self.response) <= length:
            return self
        per_token = {name: getattr(self, name) for name in _PER_TOKEN}
        cut: dict[str, Any] = {
            name: None if given is None else given[:length] for name, given in per_token.items()
        }
        guidance = tuple(
            replace(g, targets=g.targets[: length - g.start]) for g in self.guidance if g.start < length
        )
        return replace(self, response=self.response[:length], guidance=guidance, **cut)

    @property
    def in_count(self) -> tuple[bool, ...]:
        """`counted` with the default spelled out."""
        return tuple(w != 0 for w in self.token_weights) if self.counted is None else self.counted

    def reweighted(self, factors: Sequence[float]) -> "Trajectory":
        """Every token's weight times a factor. The count stays: a factor of 0 and one of 1e-9 give the same
        loss.

        >>> t = Trajectory(student_context=(1,), teacher_context=(1,), response=(4, 5, 2))
        >>> token_count([t.reweighted([1.0, 0.0, 1.0])])
        3.0
        """
        weights = tuple(w * f for w, f in zip(self.token_weights, factors, strict=True))
        return replace(self, weights=weights, counted=self.in_count)


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A rollout with its verdict.

    >>> prompt = Prompt(id="0", text="7 + 5?", answer="12")
    >>> r = Rollout(prompt=prompt, ids=(2,), logprobs=(0.0,), finish_reason="stop",
    ...             policy_version=0, sampling=Sampling())
    >>> Graded(rollout=r, correct=True, extracted="12").correct
    True
    """

    rollout: Rollout
    """What was judged."""
    correct: bool
    """Whether its answer is the problem's."""
    extracted: str | None
    """The answer that the grader found in the text; None if there was none."""


def all_by(writer: Writer, count: int) -> Writers:
    """So many tokens by one writer.

    >>> all_by("teacher", 2)
    ('teacher', 'teacher')
    """
    return (writer,) * count


def token_count(trajectories: Sequence[Trajectory]) -> float:
    """The loss's denominator before it is summed over processes: response tokens that were not dropped."""
    return float(sum(sum(t.in_count) for t in trajectories))
