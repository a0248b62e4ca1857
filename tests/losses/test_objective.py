"""Objectives that are known to be wrong cannot be built, and what docs/objectives.md refuses is wrong."""

import re
from functools import partial
from typing import get_args

import pytest
import torch

from onpath import divergence
from onpath.losses import Head, Objective, SparseGuidance, TeacherHidden, fused_objective
from onpath.losses.objective import KINDS, Divergence, TokenLoss
from tests.losses.kinds import OPTIONS, renyi, squared_hellinger

REFUSED = [
    ({"kind": "sampled", "support": "teacher_topk", "k": 8}, "zero expected gradient"),
    ({"kind": "reverse_kl", "support": "teacher_topk", "k": 1, "tail": "renormalise"}, "zero"),
    ({"kind": "reverse_kl", "support": "teacher_topk"}, "needs k"),
    ({"kind": "reverse_kl", "k": 8}, "support is full"),
    ({"kind": "cross_entropy", "support": "teacher_topk", "k": 8}, "sampled token alone"),
    ({"kind": "jensen_shannon"}, "beta"),
    ({"kind": "jensen_shannon", "beta": 0.0}, "zero everywhere"),
    ({"kind": "jensen_shannon", "beta": 1.0}, "zero everywhere"),
    ({"kind": "reverse_kl", "beta": 0.5}, "beta"),
    ({"kind": "sampled", "entry_clip": 0.1}, "entry_clip"),
    ({"kind": "sampled", "token_clip": 0.1}, "ppo_clip"),
    ({"kind": "reverse_kl", "ppo_clip": 0.1}, "belong to kind sampled"),
    ({"kind": "reverse_kl", "discount": 0.1}, "belong to kind sampled"),
    ({"kind": "sampled", "discount": 1.5}, "discount"),
    ({"kind": "reverse_kl", "entry_clip": 0.0}, "above 0"),
    ({"kind": "negative_advantage", "advantage": 1.0}, "below 0"),
    ({"kind": "negative_advantage", "advantage": float("nan")}, "below 0"),
    ({"kind": "negative_advantage", "advantage": -float("inf")}, "below 0"),
    ({"kind": "reverse_kl", "teacher_temperature": 0.0}, "above 0"),
    ({"kind": "reverse_kl", "teacher_temperature": float("inf")}, "above 0"),
    ({"kind": "reverse_kl", "ends": (2, 1, 2)}, "each of whose ids counts once"),
    ({"kind": "sampled", "teacher_temperature": 0.5}, "use reverse_kl"),
    ({"kind": renyi, "beta": 0.3}, "beta belongs to jensen_shannon and only to it: kind is renyi"),
    ({"kind": renyi, "entry_clip": 0.1}, "renyi sums its own"),
    ({"kind": renyi, "discount": 0.1}, "belong to kind sampled, not to renyi"),
    ({"kind": lambda logp: logp.sum(-1)}, r"called as f\(teacher_logp, student_logp\), and <lambda>\(logp\)"),
    ({"kind": divergence.jensen_shannon}, "jensen_shannon.* cannot be"),
]


def _words(value: object) -> str:
    """The same in every process: no addresses."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=_words)
def test_wrong_combinations_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as refused:
        Objective(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"kind": "kl"}, {"support": "top"}, {"tail": "drop"}], ids=str)
def test_an_unknown_name_is_refused(change):
    """By us, or under these tests already by the type checker."""
    with pytest.raises(Exception, match=next(iter(change))):
        Objective(**change)


def test_the_names_are_those_of_the_divergences_and_of_the_losses_without_one():
    assert set(get_args(Divergence)) == set(divergence.DIVERGENCES)
    assert set(KINDS) == {*divergence.DIVERGENCES, *get_args(TokenLoss)}
    assert {k for k in KINDS if Objective(**OPTIONS.get(k, {"kind": k})).is_divergence} == set(
        divergence.DIVERGENCES
    )


def loss_of(kind, teacher_bias: float = 0.0, **options):
    """Value and gradient at two tokens with three outcomes; at the second the two models agree."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.3, 0.1], [-0.5, 0.4], [0.2, 0.9]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, teacher_bias], dtype=torch.float64)
    teacher = TeacherHidden(hidden=hidden.detach(), head=Head(weight=2 * weight, bias=bias))
    result = fused_objective(
        student_hidden=hidden,
        student_head=Head(weight=weight),
        teacher=teacher,
        objective=Objective(kind=kind, **options),
        weights=torch.ones(2, dtype=torch.float64),
        denominator=2.0,
    )
    result.loss.backward()
    return result.loss.detach(), hidden.grad


def other_way_round(student_logp, teacher_logp):
    return divergence.reverse_kl(teacher_logp=teacher_logp, student_logp=student_logp)


def forward_kl(teacher_logp, student_logp):
    """Has the name of another."""
    return divergence.reverse_kl(teacher_logp=teacher_logp, student_logp=student_logp)


class Callable:
    __hash__ = None

    def __call__(self, *, student_logp, teacher_logp):
        return divergence.reverse_kl(teacher_logp=teacher_logp, student_logp=student_logp)


OWN = {
    "by name": divergence.reverse_kl,
    "by position": lambda t, s: divergence.reverse_kl(teacher_logp=t, student_logp=s),
    "names in the other order": other_way_round,
    "the name of a built-in one": forward_kl,
    "a callable that has no hash": Callable(),
    "a partial": partial(forward_kl),
    "a formula without masks": lambda t, s: (s.exp() * (s - t)).sum(-1),
}


@pytest.mark.parametrize("options", [{}, {"support": "union", "k": 2}], ids=["full", "union"])
@pytest.mark.parametrize("name", OWN)
def test_a_function_is_called_with_the_teacher_and_the_student_in_their_places(name, options):
    """In a union both sides choose the same two here: the columns that count for nothing are −inf on both."""
    for found, want in zip(loss_of(OWN[name], **options), loss_of("reverse_kl", **options), strict=True):
        torch.testing.assert_close(found, want)
    assert loss_of("reverse_kl")[0] != pytest.approx(loss_of("forward_kl")[0].item(), rel=0.01)


def test_an_objective_names_its_function():
    assert [Objective(kind=k).name for k in ("sampled", renyi, partial(renyi), Callable())] == [
        "sampled",
        "renyi",
        "renyi",
        "Callable",
    ]
    assert Objective(kind=squared_hellinger).needs_teacher


def by_quotients(t, s):
    return (t.exp() * (t.exp() / s.exp()).log()).sum(-1)


def root(t, s):
    """Hellinger's distance without the square: no slope where both agree."""
    return (0.5 * ((t / 2).exp() - (s / 2).exp()).square().sum(-1)).sqrt()


WRONG = {
    "a sum over all": (lambda t, s: (s.exp() * (s - t)).sum(), r"gave shape \[\].*\[2\] would be right"),
    "no sum": (lambda t, s: s.exp() * (s - t), r"gave shape \[2, \d\].*\[2\] would be right"),
    "no tensor": (lambda t, s: (s - t).sum().item(), r"gave float.*\[2\] would be right"),
    "detached": (lambda t, s: divergence.reverse_kl(teacher_logp=t, student_logp=s.detach()), "no gradient"),
    "another's gradient": (lambda t, s: t.sum(-1) * torch.ones((), requires_grad=True), "no gradient"),
    "underflow": (by_quotients, "by_quotients is not finite where all log-probs are"),
    "no slope": (root, "root has a gradient that is not finite"),
    "no mask": (lambda t, s: (t.exp() * (t - s)).sum(-1), "excludes an outcome"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("support", ["full", "union"])
def test_a_function_that_is_no_divergence_is_refused_in_one_sentence(name, support):
    function, message = WRONG[name]
    bias = {"underflow": -800.0, "no mask": -torch.inf}.get(name, 0.0)
    options = {} if support == "full" else {"support": support, "k": 2, "tail": "renormalise"}
    with pytest.raises(ValueError, match=message) as refused:
        loss_of(function, bias, **options)
    assert "\n" not in str(refused.value)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.log_softmax(torch.randn(8, generator=g, dtype=torch.float64), -1), torch.randn(
        8, generator=g, dtype=torch.float64
    )


def test_why_k1_is_no_loss(pair):
    """Its expected gradient is zero, and each sample's gradient is the same for every teacher."""
    teacher, z = pair
    z = z.requires_grad_()
    p = torch.softmax(z, -1).detach()
    (expected,) = torch.autograd.grad((p * (torch.log_softmax(z, -1) - teacher)).sum(), z)
    assert expected.abs().max() < 1e-14


def test_why_k3_is_no_loss(pair):
    """E[∇(r − 1 − log r)], r = p_T/p_S, is the gradient of the forward KL."""
    teacher, z = pair
    z = z.requires_grad_()
    p = torch.softmax(z, -1).detach()
    gap = teacher - torch.log_softmax(z, -1)
    (k3,) = torch.autograd.grad((p * (gap.exp() - 1 - gap)).sum(), z)
    student = lambda: torch.log_softmax(z, -1)  # noqa: E731
    (forward,) = torch.autograd.grad(divergence.forward_kl(teacher_logp=teacher, student_logp=student()), z)
    (reverse,) = torch.autograd.grad(divergence.reverse_kl(teacher_logp=teacher, student_logp=student()), z)
    torch.testing.assert_close(k3, forward)
    assert not torch.allclose(k3, reverse, rtol=1e-2)


def test_why_a_top_k_advantage_is_refused(pair):
    """The same number for every token that could be drawn: Σ_y p(y)·A·∇log p(y) = 0."""
    teacher, z = pair
    z = z.requires_grad_()
    ids = teacher.topk(3).indices
    p = torch.softmax(z, -1).detach()
    advantage = -(p[ids] * (p[ids].log() - teacher[ids])).sum()
    (expected,) = torch.autograd.grad((p * advantage * torch.log_softmax(z, -1)).sum(), z)
    assert expected.abs().max() < 1e-14 < advantage.abs()


def test_why_a_reverse_kl_needs_the_tail(pair):
    """Descending it moves the student's mass out of the set, away from a teacher that it matched; with a
    bucket not."""
    teacher, _ = pair
    ids = teacher.topk(3).indices
    z = teacher.clone().requires_grad_()
    for _ in range(50):
        s = torch.log_softmax(z, -1)
        (grad,) = torch.autograd.grad((s[ids].exp() * (s[ids] - teacher[ids])).sum(), z)
        z = (z - grad).detach().requires_grad_()
    mass = torch.softmax(z, -1)[ids].sum().item()
    assert mass < 0.5 * teacher[ids].exp().sum().item()
    reverse = divergence.reverse_kl(teacher_logp=teacher, student_logp=torch.log_softmax(z, -1))
    assert reverse.item() > 0.1


def test_why_a_forward_kl_needs_the_tail(pair):
    """It is negative for a student that puts more mass on the set, so p_S = p_T is not its minimum."""
    teacher, _ = pair
    ids = teacher.topk(3).indices
    p = teacher[ids].exp()
    student_logp = (p / p.sum()).log()
    assert (p * (teacher[ids] - student_logp)).sum().item() < -0.05


@pytest.mark.parametrize(
    "change",
    [
        {"positions": torch.tensor([2, 1])},
        {"positions": torch.tensor([1, 1])},
        {"probs": torch.tensor([[torch.nan, 0.7], [1.0, 0.0]])},
        {"probs": torch.tensor([[-0.1, 0.7], [1.0, 0.0]])},
        {"ids": torch.tensor([[1, 2]])},
    ],
    ids=str,
)
def test_wrong_guidance_is_refused(change):
    right = {
        "positions": torch.tensor([1, 2]),
        "ids": torch.tensor([[1, 2], [3, 0]]),
        "probs": torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
    }
    SparseGuidance(**right)
    with pytest.raises(Exception, match=r"guidance|probs|Type-check"):
        SparseGuidance(**{**right, **change})


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"softcap": 0.0}, {"tokens": 0}, {"tokens": 4}], ids=str
)
def test_wrong_heads_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Head(weight=torch.eye(3), **change)
