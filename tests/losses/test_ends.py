"""Ends as one outcome: the divergence of the distributions in which they are one, and its gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from onpath.losses import Head, Objective, SparseGuidance, TeacherHidden, TeacherTopK, fused_objective
from onpath.losses import token_stats as stats_of
from tests.losses.kinds import OPTIONS, PURE

N, H, G, V = 6, 5, 4, 9
ENDS = (2, 5, 8)


def problem(softcap: float | None) -> tuple[Tensor, Head, TeacherHidden]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return 1.5 * torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = (t.requires_grad_() for t in (draw(N, H), draw(V, H), draw(V)))
    head = Head(weight=weight, bias=bias, softcap=softcap, logit_scale=0.8)
    return hidden, head, TeacherHidden(hidden=draw(N, G), head=Head(weight=draw(V, G), bias=draw(V)))


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    z = (hidden @ head.weight.T + head.bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def merged(logp_NV: Tensor) -> Tensor:
    """The outcomes that are no end, and one more: written with probabilities, not with logits."""
    p_NV = logp_NV.exp()
    others = [i for i in range(V) if i not in ENDS]
    return torch.cat([p_NV[:, others], p_NV[:, list(ENDS)].sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", OPTIONS)
def test_value_and_gradient(kind: str, softcap: float | None) -> None:
    hidden, head, teacher = problem(softcap)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25], dtype=torch.float64)
    found = fused_objective(
        student_hidden=hidden, student_head=head, teacher=teacher, weights=weights, denominator=3.0,
        objective=Objective(**OPTIONS[kind], ends=ENDS), chunk_rows=4,
    )  # fmt: skip
    leaves = [hidden, head.weight, head.bias]
    gradients = torch.autograd.grad(found.loss, leaves)
    both = [
        merged(plain_logits(h, at).log_softmax(-1))
        for h, at in ((teacher.hidden, teacher.head), (hidden, head))
    ]
    values = PURE[kind](*both)
    expected = (weights * values).sum() / 3.0
    torch.testing.assert_close(found.stats.loss, values.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_which_end_does_not_matter(kind: str) -> None:
    """A teacher that is the student but for the id of its end: told apart, and no divergence as one."""
    weight = torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = weight.clone()
    other[[2, 5]] = weight[[5, 2]]
    hidden = torch.eye(V, dtype=torch.float64)[:N]
    both: dict[str, Any] = {
        "student_hidden": hidden,
        "student_head": Head(weight=weight),
        "teacher": TeacherHidden(hidden=hidden, head=Head(weight=other)),
    }
    apart, one = (stats_of(**both, objective=Objective(kind=kind, ends=e)).loss for e in ((), (2, 5)))
    assert apart.min() > 1e-3
    assert one.abs().max() < 1e-12


def test_a_sampled_end_is_the_end() -> None:
    hidden, head, teacher = problem(None)
    ids = torch.tensor([2, 5, 8, 0, 1, 3])
    found = stats_of(
        student_hidden=hidden, student_head=head, teacher=teacher, sampled_ids=ids,
        objective=Objective(ends=ENDS),
    )  # fmt: skip
    logp = merged(plain_logits(hidden, head).log_softmax(-1)).detach()
    assert found.student_logp is not None
    torch.testing.assert_close(found.student_logp[:3], logp[:3, -1])
    torch.testing.assert_close(found.student_logp[3:], torch.stack([logp[3, 0], logp[4, 1], logp[5, 2]]))


def test_what_cannot_be() -> None:
    hidden, head, teacher = problem(None)
    with pytest.raises(ValueError, match="cross_entropy compares none"):
        Objective(kind="cross_entropy", ends=ENDS)
    served = TeacherTopK(ids=torch.zeros(N, 1, dtype=torch.long), logp=torch.zeros(N, 1))
    no_rows = torch.zeros(0, 1)
    guidance = SparseGuidance(positions=no_rows[:, 0].long(), ids=no_rows.long(), probs=no_rows)
    common: dict[str, Any] = {
        "student_hidden": hidden, "student_head": head, "weights": torch.ones(N), "denominator": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no guidance beside them"):
        fused_objective(teacher=teacher, objective=Objective(ends=ENDS), guidance=guidance, **common)
    with pytest.raises(ValueError, match="both whole distributions"):
        fused_objective(teacher=served, objective=Objective(ends=ENDS, support="teacher_topk", k=1), **common)
    with pytest.raises(ValueError, match="no ids of a vocabulary of 9"):
        fused_objective(teacher=teacher, objective=Objective(ends=(2, 9)), **common)
