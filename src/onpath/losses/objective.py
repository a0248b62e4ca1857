"""What is minimised at one token, as data. A combination that is known to be wrong cannot be built."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
"""The names in `onpath.divergence.DIVERGENCES`, written out: reading them there would load torch."""
TokenLoss = Literal["sampled", "cross_entropy", "negative_advantage"]
"""Losses of the sampled token alone."""
Kind = Literal[Divergence, TokenLoss]
KINDS: tuple[str, ...] = get_args(Kind)
OwnDivergence = Callable[..., Any]
"""f(*, teacher_logp, student_logp), or f(teacher_logp, student_logp) by position: [..., V] → [...], nats."""
Support = Literal["full", "teacher_topk", "student_topk", "union"]
Tail = Literal["renormalise", "bucket"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss per token, in nats. docs/objectives.md has the equation, the direction and the paper of each.

    >>> Objective(kind="jensen_shannon", beta=1.0)
    Traceback (most recent call last):
    ValueError: jensen_shannon at beta 1.0 is zero everywhere: the mixture is one of its two sides; ...
    """

    kind: Kind | OwnDivergence = "reverse_kl"
    """`sampled`: reverse KL from sampled tokens as a policy gradient. `cross_entropy`: plain SFT on the
    response. `negative_advantage`: a control without a teacher, which pushes unlikely sampled tokens down.
    A function is a divergence of your own, differentiated by autograd: docs/objectives.md."""
    beta: float | None = None
    """jensen_shannon: the teacher's share of the mixture, strictly between 0 and 1."""
    support: Support = "full"
    """Outcomes that a divergence compares: all, the teacher's k likeliest, the student's, or both sets."""
    k: int | None = None
    """Size of a top-k set. k ≥ V is the full vocabulary."""
    tail: Tail = "bucket"
    """Mass outside a top-k support: one outcome of its own, or dropped and both sides renormalised."""
    entry_clip: float | None = None
    """Cap on each vocabulary entry's contribution before the sum, nats (OPSD: 0.05)."""
    token_clip: float | None = None
    """Cap on the token's loss, nats (0.06-0.1 in the literature); a capped token gives no gradient."""
    ppo_clip: float | None = None
    """sampled: ε of PPO's clip, against the behaviour's log-probs."""
    teacher_temperature: float = 1.0
    """τ of a divergence from p_T^(1/τ)/Z in p_T's place; below 1 the teacher is sharpened. Reverse KL: an OPD
    whose entropy bonus is τ. Not least at p_S = p_T, deliberately."""
    discount: float = 0.0
    """sampled: γ of the discounted sum of the following tokens' advantages; 0 is the token alone."""
    advantage: float = -1.0
    """negative_advantage: the fixed advantage, below 0."""
    below_logp: float = -2.302585092994046
    """negative_advantage: for sampled tokens with a student log-prob below this, nats (here p < 0.1)."""
    ends: tuple[int, ...] = ()
    """Ids that are one outcome on both sides, with the sum of their probabilities: models that end their
    responses on different ids are then not told apart by which."""

    def __post_init__(self) -> None:
        _check_name("support", self.support, get_args(Support))
        _check_name("tail", self.tail, get_args(Tail))
        if callable(self.kind):
            takes_names(self.kind)
        else:
            _check_name("kind", self.kind, KINDS)
        _check_divergence(self)
        _check_temperature(self)
        _check_support(self)
        _check_sampled(self)
        if self.ends and not self.is_divergence:
            raise ValueError(f"ends are outcomes that a divergence compares, and {self.name} compares none")
        if len(set(self.ends)) < len(self.ends):
            raise ValueError(f"ends are one outcome, each of whose ids counts once, not {self.ends}")
        for name in ("entry_clip", "token_clip", "ppo_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0 (or None for no clip), not {value}")

    @property
    def name(self) -> str:
        """Of the kind, for people: a function has its own."""
        return self.kind if isinstance(self.kind, str) else _name(self.kind)

    @property
    def is_divergence(self) -> bool:
        """Compares distributions, not the sampled token alone."""
        return callable(self.kind) or self.kind in get_args(Divergence)

    @property
    def needs_teacher(self) -> bool:
        return self.is_divergence or self.kind == "sampled"


def takes_names(function: OwnDivergence) -> bool:
    """Whether a divergence is called with names; else by position, the teacher first.

    Names come first: a function that has the two in the other order is still called right.

    Raises:
        ValueError: it can be called in neither way.
    """
    signature, logps = inspect.signature(function), {"teacher_logp": None, "student_logp": None}
    for by_name in (True, False):
        try:
            signature.bind(**logps) if by_name else signature.bind(*logps.values())
        except TypeError:
            continue
        return by_name
    raise ValueError(
        f"a divergence is called as f(teacher_logp, student_logp), and {_name(function)}{signature} cannot be"
    )


def _name(function: OwnDivergence) -> str:
    while isinstance(function, partial):
        function = function.func
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}, not {value!r}")


def _check_divergence(o: Objective) -> None:
    if (o.kind == "jensen_shannon") != (o.beta is not None):
        raise ValueError(f"beta belongs to jensen_shannon and only to it: kind is {o.name}, beta is {o.beta}")
    if o.beta is not None and not 0 < o.beta < 1:
        raise ValueError(
            f"jensen_shannon at beta {o.beta} is zero everywhere: the mixture is one of its two sides; "
            "use forward_kl (TRL's beta = 0) or reverse_kl (TRL's beta = 1)"
        )
    if o.entry_clip is not None and callable(o.kind):
        raise ValueError(
            f"entry_clip caps the terms of a built-in divergence, and {o.name} sums its own: cap them there"
        )
    if o.entry_clip is not None and not o.is_divergence:
        raise ValueError(
            f"entry_clip caps the terms of a sum over the vocabulary, and {o.name} has no such sum"
        )
    if o.token_clip is not None and not o.is_divergence:
        raise ValueError(
            f"token_clip caps a divergence, which is at least 0; {o.name} is not one: use ppo_clip for "
            f"sampled"
        )


def _check_temperature(o: Objective) -> None:
    if not 0 < o.teacher_temperature < math.inf:
        raise ValueError(f"teacher_temperature must be above 0, not {o.teacher_temperature}")
    if o.teacher_temperature != 1.0 and not o.is_divergence:
        raise ValueError(
            f"teacher_temperature sharpens the distribution that a divergence compares with, and {o.name} is "
            "none: use reverse_kl"
        )


def _check_support(o: Objective) -> None:
    if o.support == "full":
        if o.k is not None:
            raise ValueError(
                "k is the size of a top-k support, and support is full: set support, or leave k out"
            )
        return
    if o.kind == "sampled":
        raise ValueError(
            "a top-k KL used as an advantage gives a zero expected gradient (it does not depend on the "
            "sampled token, so it "
            "is a baseline): differentiate the KL itself, kind reverse_kl, or use sampled with support full"
        )
    if not o.is_divergence:
        raise ValueError(f"{o.name} looks at the sampled token alone: support must be full")
    if o.k is None or o.k < 1:
        raise ValueError(f"support {o.support} needs k, the size of the set, at least 1, not {o.k}")
    if o.k == 1 and o.tail == "renormalise" and o.support != "union":
        raise ValueError(
            "one renormalised outcome has probability 1 on both sides, so the loss is zero: use tail bucket"
        )


def _check_sampled(o: Objective) -> None:
    if o.kind != "sampled" and (o.ppo_clip is not None or o.discount != 0.0):
        raise ValueError(f"ppo_clip and discount belong to kind sampled, not to {o.name}")
    if not 0 <= o.discount <= 1:
        raise ValueError(f"discount must lie in [0, 1], not {o.discount}")
    if o.kind == "negative_advantage" and not -math.inf < o.advantage < 0:
        raise ValueError(f"advantage must be below 0 for negative_advantage, not {o.advantage}")
