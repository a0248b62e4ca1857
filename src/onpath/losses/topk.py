"""Divergences on a few outcomes: the teacher's likeliest tokens, the student's, or both, and what to do with
the rest.

Shape suffixes: R rows, V vocabulary, k outcomes of the set, B blocks of the vocabulary.
"""

import torch
from torch import Tensor

from onpath import divergence
from onpath.losses.interface import TeacherTopK
from onpath.losses.objective import Objective
from onpath.losses.pure import divergence_of, slopes

_BLOCK = 64  # entries whose maximum stands for them in the search for the k largest


def is_full(objective: Objective, vocabulary: int) -> bool:
    """A set of all outcomes leaves no tail, so the plain divergence is exact."""
    return objective.support == "full" or (objective.k is not None and objective.k >= vocabulary)


def largest(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their indices, sorted. On a CPU only within the k blocks of the largest
    maxima: exact."""
    rows, vocabulary = x_RV.shape
    k, blocks = min(k, vocabulary), vocabulary // _BLOCK
    if x_RV.device.type != "cpu" or blocks < 8 * k:
        values, ids = x_RV.max(-1, keepdim=True) if k == 1 else torch.topk(x_RV, k)
        return values, ids
    whole = blocks * _BLOCK
    peaks_RB = x_RV[:, :whole].unflatten(-1, (blocks, _BLOCK)).amax(-1)
    chosen = torch.topk(peaks_RB, k).indices
    inside = (chosen[..., None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    rest = torch.arange(whole, vocabulary).expand(rows, -1)
    candidates = torch.cat([inside, rest], -1)
    values, where = torch.topk(x_RV.gather(-1, candidates), k)
    return values, candidates.gather(-1, where)


def overlap(a_Rk: Tensor, b_Rk: Tensor) -> Tensor:
    """|A ∩ B| / k for each row."""
    hits = (a_Rk[:, :, None] == b_Rk[:, None, :]).any(-1)
    return hits.to(torch.float32).mean(-1)


def evaluate(
    objective: Objective,
    student_logp_RV: Tensor,
    teacher_logp_RV: Tensor | None,
    student_p_RV: Tensor,
    teacher_p_RV: Tensor,
    served: TeacherTopK | None,
    gradient: bool,
) -> Tensor:
    """Value [R] of the objective on its set; with `gradient`, ∂value/∂z replaces `student_logp_RV`.

    Autograd works on the k + 1 outcomes alone. With g_k = ∂D/∂s_k, h = ∂D/∂log(tail) and G = Σ_k g_k + h:
    ∂D/∂z_v = g_v − p_v·G in the set, p_v·(h / tail − G) outside it.
    """
    if served is not None:
        ids_Rk, valid_Rk, teacher_Rk = _served_set(served, student_logp_RV.dtype)
        teacher_tail = served.tail_mass(vocabulary=student_logp_RV.shape[-1]).to(student_logp_RV.dtype)
    else:
        assert teacher_logp_RV is not None, "a divergence needs a teacher"
        ids_Rk, valid_Rk = _choose(objective, teacher_logp_RV, student_logp_RV)
        teacher_Rk = teacher_logp_RV.gather(-1, ids_Rk).masked_fill(~valid_Rk, -torch.inf)
        teacher_tail = _mass_outside(teacher_p_RV, ids_Rk, valid_Rk)
    # A column that does not count (padding, an id that a union has twice) has probability 0 on both sides: no
    # term, and no share of a renormalised set.
    student_Rk = student_logp_RV.gather(-1, ids_Rk).masked_fill(~valid_Rk, -torch.inf)
    student_tail = _mass_outside(student_p_RV, ids_Rk, valid_Rk)
    # The tail is a leaf beside the set, as if they were independent; that all of them move with every logit
    # comes in by G below.
    with torch.enable_grad():
        set_leaf = student_Rk.clone().requires_grad_(gradient)
        tail_leaf = _log_mass(student_tail).requires_grad_(gradient)
        value = _on_set(objective, teacher_Rk, _log_mass(teacher_tail), set_leaf, tail_leaf)
    if gradient:
        set_slope, tail_slope = slopes(objective, value, (set_leaf, tail_leaf))
        # First every entry as if it were in the tail, over log-probs that are no longer needed; then the set.
        total = (set_slope.sum(-1) + tail_slope)[:, None]
        inside_Rk = torch.where(valid_Rk, set_slope - student_Rk.exp() * total, 0.0)
        torch.mul(
            student_p_RV, tail_slope[:, None] / tail_leaf.detach().exp()[:, None] - total, out=student_logp_RV
        )
        # Set to 0, then added: an id that stands there twice gets its own gradient and a 0. A plain scatter
        # would keep either of the two.
        student_logp_RV.scatter_(-1, ids_Rk, 0.0).scatter_add_(-1, ids_Rk, inside_Rk)
    return value.detach()


def measure_served(
    served: TeacherTopK, *, student_logp: Tensor, student_p: Tensor, top_k: int = 0
) -> dict[str, Tensor]:
    """What a served top-k allows: values over its outcomes plus one bucket, which are lower bounds; and the
    likeliest `top_k` of its outcomes, as far as it has so many."""
    ids_Rk, valid_Rk, teacher_Rk = _served_set(served, student_logp.dtype)
    student_Rk = student_logp.gather(-1, ids_Rk).masked_fill(~valid_Rk, -torch.inf)
    tail_R = served.tail_mass(vocabulary=student_logp.shape[-1]).to(student_logp.dtype)
    teacher = torch.cat([teacher_Rk, _log_mass(tail_R)[:, None]], -1)
    student = torch.cat([student_Rk, _log_mass(_mass_outside(student_p, ids_Rk, valid_Rk))[:, None]], -1)
    stats = {
        "reverse_kl": divergence.reverse_kl(teacher_logp=teacher, student_logp=student),
        "forward_kl": divergence.forward_kl(teacher_logp=teacher, student_logp=student),
        "teacher_entropy": divergence.entropy(logp=teacher),
    }
    if served.sampled_logp is not None:
        stats["teacher_logp"] = served.sampled_logp.to(student_logp.dtype)
    if top_k:
        logp_Rk, order_Rk = teacher_Rk.topk(min(top_k, teacher_Rk.shape[-1]))
        stats["teacher_top_logp"], stats["teacher_top_ids"] = logp_Rk, ids_Rk.gather(-1, order_Rk)
    return stats


def _on_set(
    objective: Objective, teacher_Rk: Tensor, teacher_tail: Tensor, student_Rk: Tensor, student_tail: Tensor
) -> Tensor:
    if objective.tail == "renormalise":
        return divergence_of(objective, torch.log_softmax(teacher_Rk, -1), torch.log_softmax(student_Rk, -1))
    teacher = torch.cat([teacher_Rk, teacher_tail[:, None]], -1)
    return divergence_of(objective, teacher, torch.cat([student_Rk, student_tail[:, None]], -1))


def _choose(objective: Objective, teacher_RV: Tensor, student_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of the set, and which columns count: in a union an id that both sides chose counts once."""
    assert objective.k is not None, "checked by Objective"
    sides = {"teacher_topk": (teacher_RV,), "student_topk": (student_RV,), "union": (teacher_RV, student_RV)}
    ids_Rk = torch.cat([largest(side, objective.k)[1] for side in sides[objective.support]], -1)
    valid_Rk = torch.ones_like(ids_Rk, dtype=torch.bool)
    if objective.support == "union":
        ids_Rk = ids_Rk.sort(-1).values
        valid_Rk[:, 1:] = ids_Rk[:, 1:] != ids_Rk[:, :-1]
    return ids_Rk, valid_Rk


def _served_set(served: TeacherTopK, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, validity, log-probs. A padded column (−inf) borrows the id of the row's likeliest entry and does
    not count."""
    valid_Rk = ~served.logp.isneginf()
    likeliest = served.ids.gather(-1, served.logp.argmax(-1, keepdim=True))
    return torch.where(valid_Rk, served.ids, likeliest), valid_Rk, served.logp.to(dtype)


def _mass_outside(p_RV: Tensor, ids_Rk: Tensor, valid_Rk: Tensor) -> Tensor:
    """Summed directly: 1 − Σ p over the set would be rounding noise for a confident model. A column that does
    not count has the id of one that does; where none does, all mass is outside."""
    kept_Rk = p_RV.gather(-1, ids_Rk)
    outside = p_RV.scatter_(-1, ids_Rk, 0.0).sum(-1)
    p_RV.scatter_(-1, ids_Rk, kept_Rk)
    return outside.masked_fill_(~valid_Rk.any(-1), 1.0)


def _log_mass(mass_R: Tensor) -> Tensor:
    """Floored at the smallest normal number, so that a tail that underflows on one side gives a large value,
    not inf."""
    return mass_R.clamp_min(torch.finfo(mass_R.dtype).tiny).log()
