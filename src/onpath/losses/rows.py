"""A few rows of logits at a time: softmax, statistics, and the objective's gradient in place of the student's
logits.

On a CPU these passes cost what the memory they touch costs, so a block is as many rows as stay in the cache,
and every operation writes into a buffer that exists already.

Shape suffixes: R rows of one block, V vocabulary, k of a top-k set. In formulas s = log p_S, t = log p_T,
both over V, and the gradient is with respect to z, the student's logits after scale, soft-cap and
temperature: if g = ∂D/∂s entry by entry, then ∂D/∂z = g − p_S·Σg.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onpath import divergence
from onpath.losses import topk
from onpath.losses.interface import StatsRequest, TeacherTopK
from onpath.losses.objective import Objective
from onpath.losses.pure import divergence_of, slopes

_ROW_DOT_MIN = 4096  # a vocabulary from which one BLAS dot per row beats a batched product on a CPU


@dataclass(kw_only=True)
class Block:
    """R rows in flight. The buffers are views and are overwritten: `student_logp` ends up as the gradient."""

    student_logp: Tensor  # [R, V]
    teacher_logp: Tensor | None  # [R, V]; None: no teacher here, or a served one
    student_p: Tensor  # [R, V] scratch
    gap: Tensor  # [R, V] scratch: s − t
    teacher_p: Tensor  # [R, V] scratch
    masked: bool  # whether −inf can occur: then the pure functions do the work
    sampled_ids: Tensor | None  # [R]
    served: TeacherTopK | None = None
    behaviour_logp: Tensor | None = None  # [R]
    advantage: Tensor | None = None  # [R]
    shares: Tensor | None = (
        None  # [R, E]: of each of the objective's ends in their sum, on the student's side
    )


Stats = dict[str, Tensor]


def log_softmax_(z_RV: Tensor) -> Tensor:
    """In place. PyTorch's CPU kernel reads a row before it writes it; elsewhere nothing promises that."""
    if z_RV.device.type == "cpu":
        return torch.log_softmax(z_RV, -1, out=z_RV)
    return z_RV.sub_(torch.logsumexp(z_RV, -1, keepdim=True))


_NOTHING = -1e4
"""Added to a logit: its probability is 0, and finite differences of it do no harm, as −inf would."""


def merge_(z_RV: Tensor, ends_E: Tensor) -> Tensor:
    """Makes several outcomes one, in place: the first gets the logit log Σ_e exp z_e, the others none.

    Returns:
        exp(z_e) / Σ exp(z_e) [R, E]: with ∂D/∂z of the one outcome the gradient of each is that times this.
    """
    each_RE = z_RV[:, ends_E]
    sum_R1 = torch.logsumexp(each_RE, -1, keepdim=True)
    z_RV[:, ends_E] = sum_R1 + _NOTHING
    z_RV[:, ends_E[:1]] = sum_R1
    return torch.where(sum_R1.isneginf(), 0.0, (each_RE - sum_R1).exp())


def measure(block: Block, request: StatsRequest) -> Stats:
    """Everything that TokenStats wants, and p_S, p_T and the gap left in the scratch buffers for
    `evaluate`."""
    s_RV, t_RV = block.student_logp, block.teacher_logp
    p_RV = torch.exp(s_RV, out=block.student_p)
    stats: Stats = {"student_entropy": divergence.entropy(logp=s_RV) if block.masked else -_dot(p_RV, s_RV)}
    if block.sampled_ids is not None:
        stats["student_logp"] = _at(s_RV, block.sampled_ids)
    if request.top_k:
        stats["student_top_logp"], stats["student_top_ids"] = topk.largest(s_RV, request.top_k)
    if t_RV is not None:
        stats |= _measure_teacher(block, request, t_RV)
    elif block.served is not None:
        stats |= topk.measure_served(block.served, student_logp=s_RV, student_p=p_RV, top_k=request.top_k)
    if "teacher_top_ids" in stats and request.top_k:
        theirs = stats["teacher_top_ids"]  # a server may have said fewer
        stats["overlap"] = topk.overlap(stats["student_top_ids"][:, : theirs.shape[-1]], theirs)
    return stats


def _measure_teacher(block: Block, request: StatsRequest, t_RV: Tensor) -> Stats:
    s_RV, p_RV = block.student_logp, block.student_p
    q_RV = torch.exp(t_RV, out=block.teacher_p)
    stats: Stats = {}
    if block.masked:
        stats["reverse_kl"] = divergence.reverse_kl(teacher_logp=t_RV, student_logp=s_RV)
        stats["forward_kl"] = divergence.forward_kl(teacher_logp=t_RV, student_logp=s_RV)
        stats["teacher_entropy"] = divergence.entropy(logp=t_RV)
    else:
        gap_RV = torch.sub(s_RV, t_RV, out=block.gap)
        stats["reverse_kl"] = _dot(p_RV, gap_RV)
        stats["forward_kl"] = -_dot(q_RV, gap_RV)
        stats["teacher_entropy"] = -_dot(q_RV, t_RV)
    if block.sampled_ids is not None:
        stats["teacher_logp"] = _at(t_RV, block.sampled_ids)
    if request.mass_ids is not None:
        stats["teacher_mass"] = q_RV[:, request.mass_ids].sum(-1)
    if request.top_k:
        stats["teacher_top_logp"], stats["teacher_top_ids"] = topk.largest(t_RV, request.top_k)
    return stats


def evaluate(block: Block, objective: Objective, stats: Stats, *, gradient: bool) -> Tensor:
    """The value [R], after `measure`; with `gradient`, ∂value/∂z replaces `block.student_logp`."""
    if not objective.is_divergence:
        return _sampled_token(block, objective, stats, gradient)
    if objective.teacher_temperature != 1.0:
        stats = _sharpened(block, objective.teacher_temperature)
    if not topk.is_full(objective, block.student_logp.shape[-1]) or block.served is not None:
        sides = block.student_logp, block.teacher_logp
        return topk.evaluate(objective, *sides, block.student_p, block.teacher_p, block.served, gradient)
    assert block.teacher_logp is not None, "a divergence needs a teacher"
    by_hand = FAST if objective.entry_clip is None else FAST_CLIPPED
    fast = by_hand.get(objective.kind) if isinstance(objective.kind, str) else None
    # With −inf about, `measure` has left no gap: 0 · (−inf − −inf) by hand would be nan.
    if fast is None or block.masked:
        return _by_autograd(block, objective, gradient)
    return fast(block, objective, stats, gradient)


def _sharpened(block: Block, temperature: float) -> Stats:
    """p_T^(1/τ)/Z in the place of p_T, and what the gradients read; what was measured stays that of p_T."""
    t_RV = block.teacher_logp
    assert t_RV is not None, "checked by the caller"
    log_softmax_(t_RV.div_(temperature))
    torch.exp(t_RV, out=block.teacher_p)
    if block.masked:
        return {}
    torch.sub(block.student_logp, t_RV, out=block.gap)
    return {
        "reverse_kl": _dot(block.student_p, block.gap),
        "forward_kl": -_dot(block.teacher_p, block.gap),
    }


def _kl(block: Block, objective: Objective, stats: Stats, gradient: bool) -> Tensor:
    """∂ forward/∂z = p_S − p_T;  ∂ reverse/∂z = p_S·(s − t − KL)."""
    value = stats[objective.name]
    if gradient and objective.kind == "forward_kl":
        torch.sub(block.student_p, block.teacher_p, out=block.student_logp)
    elif gradient:
        torch.mul(block.student_p, block.gap.sub_(value[:, None]), out=block.student_logp)
    return value


def _jensen_shannon(block: Block, objective: Objective, _: Stats, gradient: bool) -> Tensor:
    """∂/∂z = (1−β)·p_S·(s − log m − KL(p_S‖m))."""
    assert objective.beta is not None
    assert block.teacher_logp is not None
    log_m_RV = _log_mixture(block, objective.beta)
    t_minus_m_RV = block.teacher_logp.sub_(log_m_RV)
    s_minus_m_RV = block.student_logp.sub_(log_m_RV)
    student_part = _dot(block.student_p, s_minus_m_RV)
    value = objective.beta * _dot(block.teacher_p, t_minus_m_RV) + (1 - objective.beta) * student_part
    if gradient:
        s_minus_m_RV.sub_(student_part[:, None]).mul_(block.student_p).mul_(1 - objective.beta)
    return value


def _log_mixture(block: Block, beta: float) -> Tensor:
    """log(β·p_T + (1−β)·p_S) in `gap`; where both underflow, both weights are 0 and any finite value will
    do."""
    m_RV = torch.mul(block.student_p, 1 - beta, out=block.gap).add_(block.teacher_p, alpha=beta)
    return m_RV.clamp_min_(torch.finfo(m_RV.dtype).tiny).log_()


def _entry_clipped(block: Block, objective: Objective, _: Stats, gradient: bool) -> Tensor:
    """Σ_v min(f_v, c); g_v = ∂f_v/∂s_v where f_v ≤ c, else 0."""
    s_RV, t_RV, p_RV, q_RV, gap_RV = (
        block.student_logp, block.teacher_logp, block.student_p, block.teacher_p, block.gap,
    )  # fmt: skip
    assert t_RV is not None
    assert objective.entry_clip is not None
    if objective.kind == "forward_kl":  # f = q(t − s), g = −q
        terms_RV = torch.mul(q_RV, gap_RV, out=t_RV).neg_()
        slope_RV = q_RV.neg_()
    elif objective.kind == "reverse_kl":  # f = p(s − t), g = p(s − t + 1) = f + p
        terms_RV = torch.mul(p_RV, gap_RV, out=t_RV)
        slope_RV = torch.add(terms_RV, p_RV, out=gap_RV)
    else:  # f = β·q(t − m) + (1−β)·p(s − m), g = (1−β)·p(s − m)
        assert objective.beta is not None
        log_m_RV = _log_mixture(block, objective.beta)
        slope_RV = s_RV.sub_(log_m_RV).mul_(p_RV).mul_(1 - objective.beta)
        terms_RV = t_RV.sub_(log_m_RV).mul_(q_RV).mul_(objective.beta).add_(slope_RV)
    # The terms are where t was, the slopes where q, the gap or s was: nothing but p is as before. In the last
    # case `slope_RV` is `s_RV`, so the row's sum must be taken before the gradient is written.
    clipped_RV = terms_RV > objective.entry_clip
    if gradient:
        slope_RV.masked_fill_(clipped_RV, 0.0)
        torch.addcmul(slope_RV, p_RV, slope_RV.sum(-1, keepdim=True), value=-1, out=s_RV)
    return terms_RV.clamp_(max=objective.entry_clip).sum(-1)


FAST = {"forward_kl": _kl, "reverse_kl": _kl, "jensen_shannon": _jensen_shannon}
"""Gradients made by hand, in the block's own buffers; of any other divergence autograd makes it."""
FAST_CLIPPED = {
    "forward_kl": _entry_clipped,
    "reverse_kl": _entry_clipped,
    "jensen_shannon": _entry_clipped,
}
"""The same with `entry_clip`."""


def _by_autograd(block: Block, objective: Objective, gradient: bool) -> Tensor:
    """g from the pure function, which knows of −inf, one block at a time."""
    assert block.teacher_logp is not None
    with torch.enable_grad():
        leaf = block.student_logp.detach().clone().requires_grad_(gradient)
        value = divergence_of(objective, block.teacher_logp, leaf)
    if gradient:
        (slope_RV,) = slopes(objective, value, (leaf,))
        torch.addcmul(
            slope_RV, block.student_p, slope_RV.sum(-1, keepdim=True), value=-1, out=block.student_logp
        )
    return value.detach()


def _sampled_token(block: Block, objective: Objective, stats: Stats, gradient: bool) -> Tensor:
    """Objectives of s_y alone: ∂/∂z = ∂L/∂s_y·(onehot(y) − p_S)."""
    assert block.sampled_ids is not None, "checked by the caller"
    with torch.enable_grad():
        leaf = stats["student_logp"].detach().clone().requires_grad_(gradient)
        value = _sampled_value(block, objective, leaf, stats.get("teacher_logp"))
        if gradient:
            (slope,) = torch.autograd.grad(value.sum(), leaf)
            torch.mul(block.student_p, -slope[:, None], out=block.student_logp)
            block.student_logp.scatter_add_(-1, block.sampled_ids[:, None], slope[:, None])
    return value.detach()


def _sampled_value(
    block: Block, objective: Objective, student_logp: Tensor, teacher_logp: Tensor | None
) -> Tensor:
    if objective.kind == "cross_entropy":
        return -student_logp
    if objective.kind == "negative_advantage":
        applies = student_logp.detach() < objective.below_logp
        return torch.where(applies, -objective.advantage * student_logp, 0.0 * student_logp)
    assert teacher_logp is not None, "checked by the caller"
    return divergence.sampled_reverse_kl_loss(
        teacher_logp=teacher_logp,
        student_logp=student_logp,
        behaviour_logp=block.behaviour_logp,
        ppo_clip=objective.ppo_clip,
        advantage=block.advantage,
    )


def _at(values_RV: Tensor, ids_R: Tensor) -> Tensor:
    return values_RV.gather(-1, ids_R[:, None]).squeeze(-1)


def _dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    """Σ_v a·b for each row, without a third [R, V]."""
    if a_RV.device.type == "cpu" and a_RV.shape[-1] >= _ROW_DOT_MIN:
        return torch.stack([torch.dot(a, b) for a, b in zip(a_RV, b_RV, strict=True)])
    sums: Tensor = torch.linalg.vecdot(a_RV, b_RV)
    return sums
