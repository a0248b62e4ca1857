"""Float64 references, written another way than the library: row by row, outcome by outcome, from
probabilities.

Nothing here is shared with `onpath.divergence` or `onpath.losses`, and nothing is clever: a set is a Python
set, a sum is a loop, a Jensen-Shannon divergence is a difference of entropies. Gradients come from autograd
through plain logits.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import rel_entr
from torch import Tensor


def numpy_kl(p: np.ndarray, q: np.ndarray) -> float:
    """Σ p·log(p/q) with scipy's conventions for zeros."""
    return float(rel_entr(p.astype(np.float64), q.astype(np.float64)).sum())


def numpy_jsd(p_teacher: np.ndarray, p_student: np.ndarray, beta: float) -> float:
    """H(m) − β·H(p_T) − (1−β)·H(p_S)."""

    def entropy(p: np.ndarray) -> float:
        return -sum(float(x) * math.log(float(x)) for x in p.astype(np.float64) if x > 0)

    mixture = beta * p_teacher.astype(np.float64) + (1 - beta) * p_student.astype(np.float64)
    return entropy(mixture) - beta * entropy(p_teacher) - (1 - beta) * entropy(p_student)


def numpy_divergence(kind: str, p_teacher: np.ndarray, p_student: np.ndarray) -> float:
    """By name; β = 0.3, Rényi's order 0.3."""
    p, q = p_teacher.astype(np.float64), p_student.astype(np.float64)
    if kind == "forward_kl":
        return numpy_kl(p, q)
    if kind == "reverse_kl":
        return numpy_kl(q, p)
    if kind == "jensen_shannon":
        return numpy_jsd(p, q, 0.3)
    if kind == "squared_hellinger":
        return 0.5 * float(((p**0.5 - q**0.5) ** 2).sum())
    assert kind == "renyi"
    overlap = float((p**0.3 * q**0.7).sum())
    return math.log(overlap) / (0.3 - 1) if overlap else math.inf


def logits(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
           softcap: float | None = None, temperature: float = 1.0) -> Tensor:  # fmt: skip
    """The output layer in the order in which the models apply it."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return z / temperature


def row_terms(kind: str, p: list[Tensor], q: list[Tensor], beta: float | None) -> list[Tensor]:
    """Contribution of each outcome; p teacher, q student (probabilities, scalars)."""
    terms = []
    for a, b in zip(p, q, strict=True):
        if kind == "forward_kl":
            terms.append(a * torch.log(a / b) if a > 0 else 0 * b)
        elif kind == "reverse_kl":
            terms.append(b * torch.log(b / a) if b > 0 else 0 * b)
        elif kind == "squared_hellinger":
            terms.append(0.5 * (a**0.5 - b**0.5) ** 2 if b > 0 else 0.5 * a + 0 * b)
        else:
            assert beta is not None
            m = beta * a + (1 - beta) * b
            term = 0 * b
            if a > 0:
                term = term + beta * a * torch.log(a / m)
            if b > 0:
                term = term + (1 - beta) * b * torch.log(b / m)
            terms.append(term)
    return terms


def token_divergence(z_student: Tensor, z_teacher: Tensor, *, kind: str | Callable[..., Tensor],
                     beta: float | None = None, support: str = "full", k: int | None = None,
                     tail: str = "bucket", entry_clip: float | None = None,
                     token_clip: float | None = None) -> Tensor:  # fmt: skip
    """One token's divergence from two rows of logits; a function stands for the equation of its name."""
    q, p = torch.softmax(z_student, 0), torch.softmax(z_teacher, 0)
    chosen = _chosen(p, q, support, k)
    p_set, q_set = [p[i] for i in chosen], [q[i] for i in chosen]
    if support != "full":
        rest = [i for i in range(len(p)) if i not in chosen]
        if tail == "bucket":
            p_set.append(sum((p[i] for i in rest), torch.zeros((), dtype=p.dtype)))
            q_set.append(sum((q[i] for i in rest), 0 * q.sum()))
        else:
            p_total, q_total = sum(p_set), sum(q_set)
            p_set, q_set = [a / p_total for a in p_set], [b / q_total for b in q_set]
    name = kind if isinstance(kind, str) else kind.__name__
    if name == "renyi":
        value = torch.log(sum(a**0.3 * b**0.7 for a, b in zip(p_set, q_set, strict=True))) / (0.3 - 1)
    else:
        terms = row_terms(name, p_set, q_set, beta)
        if entry_clip is not None:
            terms = [t if t <= entry_clip else 0 * t + entry_clip for t in terms]
        value = sum(terms[1:], terms[0])
    if token_clip is not None and value > token_clip:
        value = 0 * value + token_clip
    return value


def _chosen(p: Tensor, q: Tensor, support: str, k: int | None) -> list[int]:
    if support == "full":
        return list(range(len(p)))
    assert k is not None
    teacher, student = p.tolist(), q.tolist()
    best_teacher = sorted(range(len(teacher)), key=lambda i: -teacher[i])[:k]
    best_student = sorted(range(len(student)), key=lambda i: -student[i])[:k]
    return {
        "teacher_topk": sorted(best_teacher),
        "student_topk": sorted(best_student),
        "union": sorted(set(best_teacher) | set(best_student)),
    }[support]


def weighted_sum(
    z_student: Tensor, z_teacher: Tensor, weights: Tensor, denominator: float, **options: object
) -> Tensor:
    """Σ_n w_n·D_n / denominator, tokens of weight 0 left out."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t, w in zip(z_student, z_teacher, weights, strict=True):
        if w != 0:
            total = total + w * token_divergence(s, t, **options)  # type: ignore[arg-type]
    return total / denominator


def guidance_sum(z_student: Tensor, weights: Tensor, denominator: float, targets: dict[int, dict[int, float]],
                 strength: float) -> Tensor:  # fmt: skip
    """λ·Σ_n w_n·Σ_m y·(log y − log p_S(m)) / denominator from dictionaries of targets."""
    total = torch.zeros((), dtype=torch.float64)
    for n, row in targets.items():
        q = torch.softmax(z_student[n], 0)
        for token, y in row.items():
            if y > 0:
                total = total + weights[n] * y * (math.log(y) - torch.log(q[token]))
    return strength * total / denominator
