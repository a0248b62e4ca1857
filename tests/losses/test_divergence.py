"""Pure divergences against numpy references, at their edges, and the sampled estimator in expectation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpath import divergence
from tests import reference
from tests.losses.kinds import PURE, built_in


def logp(*p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


@st.composite
def distributions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two distributions over 1-9 outcomes, some of them impossible on one side or on both."""
    size = draw(st.integers(1, 9))
    pair = []
    for _ in range(2):
        masses = [draw(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 3.0, 1e3])) for _ in range(size)]
        if sum(masses) == 0:
            masses[draw(st.integers(0, size - 1))] = 1.0
        p = torch.tensor(masses, dtype=torch.float64)
        pair.append((p / p.sum()).log())
    return pair[0], pair[1]


@pytest.mark.parametrize("kind", PURE)
@settings(max_examples=150, deadline=None)
@given(pair=distributions())
def test_equals_the_numpy_reference(kind, pair):
    teacher, student = pair
    want = reference.numpy_divergence(kind, teacher.exp().numpy(), student.exp().numpy())
    got = PURE[kind](teacher, student).item()
    assert got == want if math.isinf(want) else math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-12)


def test_hand_values():
    """p_T = (3/4, 1/4), p_S = (1/2, 1/2): asymmetric, so a swapped direction shows."""
    t, s = logp(0.75, 0.25), logp(0.5, 0.5)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert PURE["forward_kl"](t, s).item() == pytest.approx(forward, rel=1e-12)
    assert PURE["reverse_kl"](t, s).item() == pytest.approx(reverse, rel=1e-12)
    assert abs(forward - reverse) > 0.01
    m = (0.2 * 0.75 + 0.8 * 0.5, 0.2 * 0.25 + 0.8 * 0.5)
    want = 0.2 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1])) + 0.8 * (
        0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    )
    got = divergence.jensen_shannon(teacher_logp=t, student_logp=s, beta=0.2)
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", PURE)
def test_zero_at_equality_with_zero_gradient(kind):
    z = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    value = PURE[kind](torch.log_softmax(z, -1).detach(), torch.log_softmax(z, -1))
    assert value.abs().max() < 1e-14
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.9])
def test_swapping_the_sides_mirrors_beta(beta):
    t, s = logp(0.7, 0.2, 0.1), logp(0.1, 0.3, 0.6)
    js = lambda a, b, x: divergence.jensen_shannon(teacher_logp=a, student_logp=b, beta=x).item()  # noqa: E731
    assert js(t, s, beta) == pytest.approx(js(s, t, 1 - beta), rel=1e-12)
    if beta != 0.5:
        assert js(t, s, beta) != pytest.approx(js(s, t, beta), rel=1e-3)
    forward = divergence.forward_kl(teacher_logp=t, student_logp=s)
    torch.testing.assert_close(forward, divergence.reverse_kl(teacher_logp=s, student_logp=t))


def test_jensen_shannon_is_bounded_and_tends_to_the_kls():
    t, s = logp(1.0, 0.0), logp(0.0, 1.0)
    for beta in (0.2, 0.5):
        limit = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert divergence.jensen_shannon(teacher_logp=t, student_logp=s, beta=beta).item() == pytest.approx(
            limit
        )
    t, s = logp(0.7, 0.3), logp(0.4, 0.6)
    near = 1e-6
    js = lambda beta: divergence.jensen_shannon(teacher_logp=t, student_logp=s, beta=beta).item()  # noqa: E731
    assert js(near) / near == pytest.approx(PURE["forward_kl"](t, s).item(), rel=1e-4)
    assert js(1 - near) / near == pytest.approx(PURE["reverse_kl"](t, s).item(), rel=1e-4)
    assert js(0.0) == 0.0
    assert js(1.0) == 0.0


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_outside_the_unit_interval_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        divergence.jensen_shannon(teacher_logp=logp(1.0), student_logp=logp(1.0), beta=beta)


CLIPPED = {f"{name}, clipped": built_in(name, entry_clip=0.05) for name in divergence.DIVERGENCES}


@pytest.mark.parametrize("kind", PURE | CLIPPED)
def test_gradient_check(kind):
    z = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def value(z_t: torch.Tensor, z_s: torch.Tensor) -> torch.Tensor:
        return (PURE | CLIPPED)[kind](torch.log_softmax(z_t, -1), torch.log_softmax(z_s, -1))

    assert torch.autograd.gradcheck(value, (z[0].clone().requires_grad_(), z[1].clone().requires_grad_()))


@pytest.mark.parametrize("kind", PURE)
def test_masked_outcomes_change_neither_value_nor_gradient(kind):
    """Appending outcomes that both sides exclude is the same as not having them."""
    g = torch.Generator().manual_seed(3)
    z_t, z_s = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    masked = torch.full((3, 2), -torch.inf, dtype=torch.float64)

    def value_and_grad(extra: bool):
        leaf = z_s.clone().requires_grad_()
        t, s = (torch.cat([z, masked], -1) if extra else z for z in (z_t, leaf))
        value = PURE[kind](torch.log_softmax(t, -1), torch.log_softmax(s, -1))
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    for a, b in zip(value_and_grad(True), value_and_grad(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_impossible_outcomes_on_one_side():
    """p_T > 0 = p_S: forward is infinite, reverse is not; and the other way round."""
    t, s = logp(0.5, 0.5, 0.0), logp(0.5, 0.0, 0.5)
    assert PURE["forward_kl"](t, s).isposinf()
    assert PURE["reverse_kl"](t, s).isposinf()
    t, s = logp(0.5, 0.5), logp(1.0, 0.0)
    assert PURE["forward_kl"](t, s).isposinf()
    s = s.requires_grad_()
    value = PURE["reverse_kl"](t, s)
    assert value.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(value, s)
    assert grad.tolist() == pytest.approx([math.log(2) + 1, 0.0])


def test_what_one_side_excludes_is_infinite_however_unlikely_the_other_has_it():
    """exp(−200) is 0 in float32, and 0·inf no number."""
    p, q = torch.tensor([0.0, -200.0]), torch.tensor([0.0, -torch.inf])
    assert divergence.reverse_kl(teacher_logp=q, student_logp=p).isposinf()
    assert divergence.forward_kl(teacher_logp=p, student_logp=q).isposinf()
    leaf = p.clone().requires_grad_()
    capped = divergence.reverse_kl(teacher_logp=q, student_logp=leaf, entry_clip=0.05)
    assert capped.item() == pytest.approx(0.05)
    (grad,) = torch.autograd.grad(capped, leaf)
    assert grad.tolist() == [1.0, 0.0]


def test_all_masked_gives_exactly_zero():
    nothing = torch.full((2, 3), -torch.inf, dtype=torch.float64, requires_grad=True)
    for kind in divergence.DIVERGENCES:
        value = PURE[kind](nothing.detach(), nothing)
        assert torch.equal(value, torch.zeros(2, dtype=torch.float64))
        (grad,) = torch.autograd.grad(value.sum(), nothing)
        assert torch.equal(grad, torch.zeros_like(grad))


def test_half_precision_inputs_are_computed_in_float32():
    g = torch.Generator().manual_seed(4)
    t, s = (torch.log_softmax(torch.randn(6, 1000, generator=g), -1) for _ in range(2))
    for kind in divergence.DIVERGENCES:
        exact = PURE[kind](t.bfloat16().double(), s.bfloat16().double())
        half = PURE[kind](t.bfloat16(), s.bfloat16())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-6)


def test_entry_clip_caps_each_contribution():
    t, s = logp(0.9, 0.1), logp(0.1, 0.9)
    terms = [0.9 * math.log(9), 0.1 * math.log(1 / 9)]
    both = {"teacher_logp": t, "student_logp": s}
    assert divergence.forward_kl(**both, entry_clip=0.05).item() == pytest.approx(0.05 + terms[1])
    assert divergence.forward_kl(**both, entry_clip=10.0).item() == pytest.approx(sum(terms))
    leaf = s.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        divergence.forward_kl(teacher_logp=t, student_logp=leaf, entry_clip=0.05), leaf
    )
    assert grad.tolist() == pytest.approx([0.0, -0.1])


def test_entropy_and_cross_entropy():
    p = logp(0.5, 0.25, 0.25, 0.0)
    assert divergence.entropy(logp=p).item() == pytest.approx(1.5 * math.log(2))
    y = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert divergence.cross_entropy(target_p=y, student_logp=p).item() == pytest.approx(0.5 * math.log(2))
    want = 0.5 * math.log(0.5) - 0.5 * math.log(0.5)
    assert divergence.sparse_forward_kl(target_p=y, student_logp=p).item() == pytest.approx(want)


@pytest.fixture
def enumerable() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.log_softmax(torch.randn(6, generator=g, dtype=torch.float64), -1), torch.randn(
        6, generator=g, dtype=torch.float64
    )


def test_sampled_loss_has_the_exact_expectation_and_gradient(enumerable):
    """Σ_y p_S(y)·loss(y) = KL(p_S‖p_T), and Σ_y p_S(y)·∇loss(y) = ∇KL(p_S‖p_T)."""
    teacher, z = enumerable
    z = z.clone().requires_grad_()
    exact = divergence.reverse_kl(teacher_logp=teacher, student_logp=torch.log_softmax(z, -1))
    (want,) = torch.autograd.grad(exact, z)
    student = torch.log_softmax(z, -1)
    losses = divergence.sampled_reverse_kl_loss(teacher_logp=teacher, student_logp=student)
    p = student.detach().exp()
    torch.testing.assert_close((p * losses).sum().detach(), exact.detach())
    (got,) = torch.autograd.grad((p * losses).sum(), z)
    torch.testing.assert_close(got, want)
    # The fixture can tell: the log-ratio back-propagated directly has no gradient in expectation.
    student = torch.log_softmax(z, -1)
    (direct,) = torch.autograd.grad((p * (student - teacher)).sum(), z)
    assert direct.abs().max() < 1e-12 < want.abs().max() / 1e6


def test_sampled_loss_corrects_for_an_older_policy(enumerable):
    teacher, z = enumerable
    behaviour = torch.log_softmax(z.flip(0) * 0.5, -1)
    z = z.clone().requires_grad_()
    exact = divergence.reverse_kl(teacher_logp=teacher, student_logp=torch.log_softmax(z, -1))
    (want,) = torch.autograd.grad(exact, z)
    losses = divergence.sampled_reverse_kl_loss(
        teacher_logp=teacher, student_logp=torch.log_softmax(z, -1), behaviour_logp=behaviour
    )
    expected = (behaviour.exp() * losses).sum()
    torch.testing.assert_close(expected.detach(), exact.detach())
    (got,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("gap", "ratio", "flows"),
    [
        (1.0, 1.3, False),
        (1.0, 0.7, True),
        (-1.0, 1.3, True),
        (-1.0, 0.7, False),
        (1.0, 1.1, True),
        (-1.0, 0.9, True),
    ],
)
def test_ppo_clip_stops_tokens_that_have_moved_far_enough(gap, ratio, flows):
    """Advantage `gap` = log p_T − log p_S; at ε = 0.2 the gradient stops beyond 1.2 upwards, below 0.8
    downwards."""
    student = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss = divergence.sampled_reverse_kl_loss(
        teacher_logp=torch.tensor([-1.0 + gap], dtype=torch.float64),
        student_logp=student,
        behaviour_logp=torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64),
        ppo_clip=0.2,
    )
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.item() == pytest.approx(-gap * ratio if flows else 0.0)


def test_sampled_advantage_override_and_impossible_token():
    s = torch.tensor([-0.5, -torch.inf], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    loss = divergence.sampled_reverse_kl_loss(teacher_logp=t, student_logp=s)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    assert loss.tolist() == pytest.approx([0.5, 0.0])
    assert grad.tolist() == pytest.approx([0.5, 0.0])
    loss = divergence.sampled_reverse_kl_loss(
        teacher_logp=t, student_logp=s, advantage=torch.tensor([2.0, 2.0], dtype=torch.float64)
    )
    assert loss.tolist() == pytest.approx([-2.0, 0.0])
