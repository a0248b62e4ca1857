"""What goes into and comes out of one pass over the vocabulary.

Shape suffixes: N tokens, k of a top-k set, G guided tokens, M entries of a sparse target, H hidden.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onpath.losses.head import Head


@dataclass(frozen=True, kw_only=True)
class TeacherHidden:
    """A teacher in this process: its last hidden states and its head. Never receives a gradient."""

    hidden: Float[Tensor, "N H"]
    head: Head


@dataclass(frozen=True, kw_only=True)
class TeacherMixture:
    """Several teachers in this process, mixed in probability: p_T = Σ_i w_i·p_i, at each token.

    >>> one = TeacherHidden(hidden=torch.zeros(2, 3), head=Head(weight=torch.zeros(4, 3)))
    >>> len(TeacherMixture(members=(one, one), weights=(0.25, 0.75)).members)
    2
    """

    members: tuple[TeacherHidden, ...]
    """Of the same tokens and the same vocabulary; widths may differ."""
    weights: tuple[float, ...]
    """w, above 0, of sum 1."""

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.weights):
            raise ValueError(f"a mixture of {len(self.members)} teachers with {len(self.weights)} weights")
        if not min(self.weights) > 0 or not abs(sum(self.weights) - 1) < 1e-6:
            raise ValueError(f"a mixture's weights are above 0 and their sum is 1, not {self.weights}")


_TOLD = 1e-6
"""Mass that a sum of float32 probabilities can tell from 0."""


@dataclass(frozen=True, kw_only=True)
class TeacherTopK:
    """A teacher behind a wire: the log-probs of its k likeliest tokens.

    >>> t = TeacherTopK(ids=torch.tensor([[5, 8]]), logp=torch.tensor([[-0.1, -3.0]]))
    >>> round(t.tail_mass(vocabulary=32).item(), 4)
    0.0454
    """

    ids: Int[Tensor, "N k"]
    """Distinct in each row."""
    logp: Float[Tensor, "N k"]
    """At full-vocabulary normalisation, nats; −inf pads a row that has fewer entries."""
    sampled_logp: Float[Tensor, " N"] | None = None
    """Of the response's own token."""

    def unserved_mass(self) -> Float[Tensor, " N"]:
        """1 − Σ p in float64, as it comes out: about 0 it is rounding noise of the log-probs."""
        return 1 - self.logp.double().exp().sum(-1)

    def tail_mass(self, *, vocabulary: int) -> Float[Tensor, " N"]:
        """Outside the set: 1 − Σ p. Below a millionth that is rounding noise of the log-probs, often 0, of
        which a reverse KL is huge: there it is what the other tokens can have at most, none being likelier
        than the set's last, or a millionth.

        Args:
            vocabulary: tokens in all.
        """
        given_Nk = ~self.logp.isneginf()
        last_N = self.logp.double().masked_fill(~given_Nk, 0.0).amin(-1).exp()
        others_N = last_N * (vocabulary - given_Nk.sum(-1))
        return self.unserved_mass().maximum(others_N.clamp_max(_TOLD)).to(self.logp.dtype)


TeacherScores = TeacherHidden | TeacherMixture | TeacherTopK


def in_process(teacher: TeacherScores | None) -> tuple[TeacherHidden, ...]:
    """The teachers whose logits are formed here: one, those of a mixture, or none."""
    if isinstance(teacher, TeacherMixture):
        return teacher.members
    return (teacher,) if isinstance(teacher, TeacherHidden) else ()


@dataclass(frozen=True, kw_only=True)
class SparseGuidance:
    """TOPD's targets ỹ (arXiv 2606.00305): adds strength·weight·Σ_m ỹ_m·(log ỹ_m − log p_S(id_m))."""

    positions: Int[Tensor, " G"]
    """Rows of the student's hidden states, strictly increasing."""
    ids: Int[Tensor, "G M"]
    """Token ids; the same id may appear twice in a row, its masses add up in the gradient."""
    probs: Float[Tensor, "G M"]
    """ỹ, zero where padded; the mass of a row is above 0 (literal 1/K, or 1, times the windows that meet)."""
    weights: Float[Tensor, " G"] | None = None
    """Of the guided tokens in the sum; None: the same as in the objective."""
    strength: float = 1.0
    """λ."""

    def __post_init__(self) -> None:
        if self.ids.shape != self.probs.shape or self.positions.shape[0] != self.ids.shape[0]:
            raise ValueError("guidance: positions [G], ids [G, M] and probs [G, M] must agree in G and M")
        if self.weights is not None and self.weights.shape != self.positions.shape:
            raise ValueError("guidance: weights must have one entry per position")
        if self.positions.numel() > 1 and not bool((self.positions.diff() > 0).all()):
            raise ValueError(
                "guidance: positions must be strictly increasing (merge the targets of one token first)"
            )
        if not bool(((self.probs >= 0) & self.probs.isfinite()).all()):
            raise ValueError("guidance: probs must be finite and at least 0")


@dataclass(frozen=True, kw_only=True)
class StatsRequest:
    """What to measure beside the loss."""

    mass_ids: Int[Tensor, " E"] | None = None
    """Token ids whose total teacher probability is wanted (TRD's epistemic mass)."""
    top_k: int = 0
    """Size of the two top-k sets; 0: neither sets nor overlap."""


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Per token, detached, nats. None: not measured, or not measurable from this teacher.

    With a served teacher the divergences and the teacher's entropy are those of its set plus one bucket:
    lower bounds.
    """

    loss: Float[Tensor, " N"]
    """Of the objective after clips, before weights; without guidance."""
    student_entropy: Float[Tensor, " N"]
    reverse_kl: Float[Tensor, " N"] | None = None
    forward_kl: Float[Tensor, " N"] | None = None
    teacher_entropy: Float[Tensor, " N"] | None = None
    student_logp: Float[Tensor, " N"] | None = None
    """Of the sampled token."""
    teacher_logp: Float[Tensor, " N"] | None = None
    teacher_mass: Float[Tensor, " N"] | None = None
    """Teacher probability of `StatsRequest.mass_ids`."""
    overlap: Float[Tensor, " N"] | None = None
    """Share of the k likeliest tokens that both have in common."""
    student_top_ids: Int[Tensor, "N k"] | None = None
    student_top_logp: Float[Tensor, "N k"] | None = None
    teacher_top_ids: Int[Tensor, "N k"] | None = None
    teacher_top_logp: Float[Tensor, "N k"] | None = None


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """One pass's sum and what was measured on the way."""

    loss: Float[Tensor, ""]
    """Objective plus guidance, summed and divided by the denominator: call `backward()` on it, once."""
    objective_sum: Float[Tensor, ""]
    """Weighted sum of the objective alone, detached, divided by the denominator."""
    guidance_sum: Float[Tensor, ""]
    """The same of the guidance, strength included; 0 without guidance."""
    stats: TokenStats


def check_shapes(
    student_hidden: Tensor, head: Head, teacher: TeacherScores | None, per_token: dict[str, Tensor | None]
) -> None:
    """Raises ValueError where two inputs cannot belong together."""
    count = student_hidden.shape[0]
    if student_hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"student hidden width {student_hidden.shape[1]} ≠ head width {head.weight.shape[1]}"
        )
    for one in in_process(teacher):
        if one.hidden.shape[0] != count:
            raise ValueError(
                f"{count} student tokens but {one.hidden.shape[0]} teacher tokens: they must be aligned"
            )
        if one.hidden.shape[1] != one.head.weight.shape[1]:
            raise ValueError(
                f"teacher hidden width {one.hidden.shape[1]} ≠ head width {one.head.weight.shape[1]}"
            )
        if one.head.vocabulary != head.vocabulary:
            raise ValueError(
                f"student has {head.vocabulary} outcomes, teacher {one.head.vocabulary}: if the "
                f"surplus is padding, "
                "set Head.tokens on both sides to the number of real token ids"
            )
    if isinstance(teacher, TeacherTopK) and teacher.ids.shape[0] != count:
        raise ValueError(
            f"{count} student tokens but {teacher.ids.shape[0]} served rows: they must be aligned"
        )
    for name, value in per_token.items():
        if value is not None and value.shape[0] != count:
            raise ValueError(f"{name} has {value.shape[0]} entries for {count} tokens")
    if per_token.get("sampled_ids") is not None:
        ids = per_token["sampled_ids"]
        assert ids is not None
        if ids.numel() and not bool(torch.logical_and(ids >= 0, ids < head.vocabulary).all()):
            raise ValueError(f"sampled_ids must lie in 0..{head.vocabulary - 1}")
