"""Divergences between two next-token distributions: pure functions of log-probabilities.

Shape suffixes: V vocabulary (or any finite set of outcomes); `*batch` any leading dimensions.

Every function takes log-probabilities (not logits) and returns nats, unreduced, in float32 (float64 if an
input is float64). Zero-probability outcomes, log-prob −inf, follow the usual conventions: 0·log(0/q) = 0, and
p·log(p/0) = +inf for p > 0. Where both sides are −inf (masked vocabulary), value and gradient are exactly
zero.

`entry_clip` caps each outcome's contribution before the sum, Σ_v min(f_v, c), as OPSD does (arXiv
2601.18734): a capped outcome gives no gradient. The result is then no divergence: it can be negative.

KL(a‖b) = Σ a·log(a/b). **Forward** is KL(teacher‖student), mass-covering; **reverse** is KL(student‖teacher),
mode-seeking. Gradients flow to whatever requires them: detach the teacher's log-probs if it is not to be
trained.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def forward_kl(
    *,
    teacher_logp: Float[Tensor, "*batch V"],
    student_logp: Float[Tensor, "*batch V"],
    entry_clip: float | None = None,
) -> Float[Tensor, "*batch"]:
    """KL(p_T‖p_S) = Σ_v p_T(v)·(log p_T(v) − log p_S(v)), nats.

    The distillation loss of Hinton et al. (arXiv 1503.02531) less the teacher's entropy, and OPSD's (arXiv
    2601.18734). +inf where the student gives no probability to an outcome that the teacher allows.

    >>> p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(forward_kl(teacher_logp=p, student_logp=q).item(), 4)       # 0.75·log 1.5 + 0.25·log 0.5
    0.1308
    """
    teacher_logp, student_logp = _working_precision(teacher_logp, student_logp)
    return _clipped_sum(_kl_terms(teacher_logp, student_logp), entry_clip)


def reverse_kl(
    *,
    teacher_logp: Float[Tensor, "*batch V"],
    student_logp: Float[Tensor, "*batch V"],
    entry_clip: float | None = None,
) -> Float[Tensor, "*batch"]:
    """KL(p_S‖p_T) = Σ_v p_S(v)·(log p_S(v) − log p_T(v)), nats.

    The loss of on-policy distillation (GKD, arXiv 2306.13649, at its reverse end; MiniLLM, arXiv 2306.08543).
    +inf where the student gives probability to an outcome that the teacher excludes.

    >>> p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(reverse_kl(teacher_logp=p, student_logp=q).item(), 4)       # 0.5·log(2/3) + 0.5·log 2
    0.1438
    """
    teacher_logp, student_logp = _working_precision(teacher_logp, student_logp)
    return _clipped_sum(_kl_terms(student_logp, teacher_logp), entry_clip)


def jensen_shannon(
    *,
    teacher_logp: Float[Tensor, "*batch V"],
    student_logp: Float[Tensor, "*batch V"],
    beta: float,
    entry_clip: float | None = None,
) -> Float[Tensor, "*batch"]:
    """Generalised Jensen-Shannon divergence: β·KL(p_T‖m) + (1−β)·KL(p_S‖m), m = β·p_T + (1−β)·p_S, nats.

    Finite always, at most the entropy of (β, 1−β), hence log 2 at β = ½. Swapping teacher and student is the
    same as replacing β by 1−β. At β = 0 and 1 the mixture is one of the two and the equation gives exactly
    zero: it does *not* turn into a KL there (divided by β it tends to the forward KL as β → 0, divided by 1−β
    to the reverse KL as β → 1). TRL's `beta` is the same inside (0, 1), but its 0 means forward KL and its 1
    reverse KL. GKD, arXiv 2306.13649, eq. 1.

    Raises:
        ValueError: β outside [0, 1].

    >>> p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    >>> round(jensen_shannon(teacher_logp=p, student_logp=q, beta=0.5).item(), 4)         # log 2
    0.6931
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is the teacher's share of the mixture and must lie in [0, 1], not {beta}")
    teacher_logp, student_logp = _working_precision(teacher_logp, student_logp)
    if beta in (0, 1):
        return (student_logp.exp() * 0.0).sum(-1)
    both_zero = teacher_logp.isneginf() & student_logp.isneginf()
    teacher_logp, student_logp = (x.masked_fill(both_zero, 0.0) for x in (teacher_logp, student_logp))
    mixture_logp = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    teacher_terms = _kl_terms(teacher_logp, mixture_logp).masked_fill(both_zero, 0.0)
    student_terms = _kl_terms(student_logp, mixture_logp).masked_fill(both_zero, 0.0)
    return _clipped_sum(beta * teacher_terms + (1 - beta) * student_terms, entry_clip)


def entropy(*, logp: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """H(p) = −Σ_v p(v)·log p(v), nats; outcomes of probability 0 add nothing.

    >>> round(entropy(logp=torch.tensor([0.5, 0.5, 0.0]).log()).item(), 4)
    0.6931
    """
    (logp,) = _working_precision(logp)
    inside = logp.masked_fill(logp.isneginf(), 0.0)
    return -(logp.exp() * inside).sum(-1)


def cross_entropy(
    *, target_p: Float[Tensor, "*batch V"], student_logp: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch"]:
    """−Σ_v y(v)·log p_S(v), nats; targets y ≥ 0 need not sum to 1. y(v) = 0 adds nothing, even at −inf.

    >>> y, q = torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5]).log()
    >>> round(cross_entropy(target_p=y, student_logp=q).item(), 4)
    0.3466
    """
    target_p, student_logp = _working_precision(target_p, student_logp)
    return -(target_p * student_logp.masked_fill(target_p == 0, 0.0)).sum(-1)


def sparse_forward_kl(
    *, target_p: Float[Tensor, "*batch V"], student_logp: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch"]:
    """Σ_v y(v)·(log y(v) − log p_S(v)), nats: KL(y‖p_S) when y has mass 1, TOPD's L_traj (arXiv 2606.00305).

    With less mass (TOPD's literal 1/K per row) it is no divergence any more and may be negative; its gradient
    is that of the cross-entropy either way, since the entropy of the target is constant.
    """
    target_p, student_logp = _working_precision(target_p, student_logp)
    negative_entropy: Tensor = torch.special.xlogy(target_p, target_p).sum(-1)
    return negative_entropy + cross_entropy(target_p=target_p, student_logp=student_logp)


def sampled_reverse_kl_loss(
    *,
    teacher_logp: Float[Tensor, "*batch"],
    student_logp: Float[Tensor, "*batch"],
    behaviour_logp: Float[Tensor, "*batch"] | None = None,
    ppo_clip: float | None = None,
    advantage: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Policy-gradient surrogate of the reverse KL from sampled tokens alone: −r·A, nats.

    A = stop_gradient(log p_T(y) − log p_S(y)) is the advantage of the sampled token y, and
    r = p_S(y) / stop_gradient(p_S(y)) = 1 carries the gradient. Over y ~ p_S, with both log-probs of full
    distributions, E[value] = KL(p_S‖p_T) and E[gradient] = ∇KL(p_S‖p_T): A's own gradient has expectation
    zero, so it is left out. Schulman's k1, used as an advantage.

    Args:
        teacher_logp: of the sampled tokens.
        student_logp: of the same tokens; the gradient flows here alone.
        behaviour_logp: under the policy that drew them, where that is not the student as it is now. Then
            r = p_S(y) / p_behaviour(y), which corrects the expectation for tokens drawn from the older
            policy.
        ppo_clip: ε of PPO's clip, the larger of −r·A and −clip(r, 1−ε, 1+ε)·A: no gradient from tokens that
            have already moved that far in the direction of their advantage. Without `behaviour_logp` r is 1:
            nothing is clipped.
        advantage: used in place of A (discounted future sums, for instance). Detached.

    A token that the student cannot draw (log-prob −inf) gives exactly zero, as its probability does in the
    expectation.

    >>> t, s = torch.tensor([-0.5]), torch.tensor([-1.5], requires_grad=True)
    >>> loss = sampled_reverse_kl_loss(teacher_logp=t, student_logp=s)     # the teacher likes it more
    >>> loss.sum().backward(); round(loss.item(), 4), s.grad.item()
    (-1.0, -1.0)
    """
    teacher_logp, student_logp = _working_precision(teacher_logp, student_logp)
    impossible = student_logp.isneginf()
    student_logp = student_logp.masked_fill(impossible, 0.0)
    old_logp = (
        student_logp.detach() if behaviour_logp is None else behaviour_logp.detach().to(student_logp.dtype)
    )
    ratio = (student_logp - old_logp.masked_fill(impossible, 0.0)).exp()
    gain = (
        (teacher_logp - student_logp).detach()
        if advantage is None
        else advantage.detach().to(student_logp.dtype)
    )
    loss = -ratio * gain
    if ppo_clip is not None:
        loss = torch.maximum(loss, -ratio.clamp(1 - ppo_clip, 1 + ppo_clip) * gain)
    return loss.masked_fill(impossible, 0.0)


def _working_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in float64 if any is, else float32: half precision cannot hold log-probs of a vocabulary."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def _kl_terms(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    """p·(log p − log q) per outcome; masked before any arithmetic, so that no gradient is 0·inf = NaN."""
    outside = p_logp.isneginf()
    impossible = q_logp.isneginf() & ~outside  # also where p underflows to 0: 0·inf would be NaN
    neither = outside | impossible
    p_logp, q_logp = p_logp.masked_fill(outside, 0.0), q_logp.masked_fill(neither, 0.0)
    return (p_logp.exp() * (p_logp - q_logp)).masked_fill(outside, 0.0).masked_fill(impossible, torch.inf)


def _clipped_sum(terms: Tensor, entry_clip: float | None) -> Tensor:
    return (terms if entry_clip is None else terms.clamp(max=entry_clip)).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
"""What `losses.Objective` knows by name: each takes `teacher_logp`, `student_logp` and `entry_clip` (and
jensen_shannon `beta`), and autograd differentiates it where `losses/rows.py` has no gradient made by hand. A
new one is a function above, its row here and its name in `losses.objective.Divergence`."""
