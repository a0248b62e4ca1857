"""Objectives of the sampled token through the fused pass: policy gradient, cross-entropy, the control."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpath import divergence
from onpath.losses import Head, Objective, TeacherHidden, TeacherTopK, fused_objective
from onpath.losses.fused import discounted_future_sum
from tests import reference

H, V = 4, 6


@pytest.fixture
def enumerated() -> dict[str, torch.Tensor]:
    """One hidden state, to be repeated for every token of the vocabulary."""
    g = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"hidden": draw(H), "weight": draw(V, H), "teacher_hidden": draw(H), "teacher_weight": draw(V, H)}


def fused(e, objective, weights, *, weight=None, ids=None, **more):
    weight = e["weight"].clone().requires_grad_() if weight is None else weight
    hidden = e["hidden"].expand(V, H).clone().requires_grad_()
    teacher = TeacherHidden(hidden=e["teacher_hidden"].expand(V, H), head=Head(weight=e["teacher_weight"]))
    result = fused_objective(
        student_hidden=hidden,
        student_head=Head(weight=weight),
        teacher=more.pop("teacher", teacher),
        objective=objective,
        weights=weights,
        denominator=1.0,
        sampled_ids=torch.arange(V) if ids is None else ids,
        chunk_rows=4,
        **more,
    )
    result.loss.backward()
    return result, hidden.grad.sum(0), weight.grad


def exact(e):
    hidden, weight = e["hidden"].clone().requires_grad_(), e["weight"].clone().requires_grad_()
    student = torch.log_softmax(weight @ hidden, -1)
    teacher = torch.log_softmax(e["teacher_weight"] @ e["teacher_hidden"], -1)
    value = divergence.reverse_kl(teacher_logp=teacher, student_logp=student)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight)), student.detach(), teacher


def test_expectation_over_the_vocabulary_is_the_exact_kl_and_its_gradient(enumerated):
    value, grad_hidden, grad_weight, student, _ = exact(enumerated)
    result, got_hidden, got_weight = fused(enumerated, Objective(kind="sampled"), student.exp())
    torch.testing.assert_close(result.loss.detach(), value)
    torch.testing.assert_close(got_hidden, grad_hidden)
    torch.testing.assert_close(got_weight, grad_weight)


def test_expectation_under_an_older_policy(enumerated):
    value, grad_hidden, grad_weight, student, _ = exact(enumerated)
    behaviour = torch.log_softmax(0.5 * student.flip(0), -1)
    result, got_hidden, got_weight = fused(
        enumerated, Objective(kind="sampled"), behaviour.exp(), behaviour_logp=behaviour
    )
    torch.testing.assert_close(result.loss.detach(), value)
    torch.testing.assert_close(got_hidden, grad_hidden)
    torch.testing.assert_close(got_weight, grad_weight)


def test_ppo_clip_equals_the_pure_function(enumerated):
    *_, student, teacher = exact(enumerated)
    behaviour = student + torch.linspace(-0.5, 0.5, V, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    losses = divergence.sampled_reverse_kl_loss(
        teacher_logp=teacher, student_logp=leaf, behaviour_logp=behaviour, ppo_clip=0.2
    )
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    assert 0 < int((slope == 0).sum()) < V
    result, _, got = fused(
        enumerated,
        Objective(kind="sampled", ppo_clip=0.2),
        torch.ones(V, dtype=torch.float64),
        behaviour_logp=behaviour,
    )
    torch.testing.assert_close(result.stats.loss, losses.detach())
    grad_z = torch.diag(slope) - slope[:, None] * student.exp()
    torch.testing.assert_close(got, grad_z.sum(0)[:, None] * enumerated["hidden"])


def test_discount_sums_the_advantages_that_follow(enumerated):
    *_, student, teacher = exact(enumerated)
    ids = torch.tensor([3, 1, 1, 0, 5, 2])
    sequence_ids = torch.tensor([0, 0, 0, 7, 7, 7])
    gain = (teacher - student)[ids].tolist()
    want = [gain[0] + 0.5 * (gain[1] + 0.5 * gain[2]), gain[1] + 0.5 * gain[2], gain[2]]
    want += [gain[3] + 0.5 * (gain[4] + 0.5 * gain[5]), gain[4] + 0.5 * gain[5], gain[5]]
    result, _, _ = fused(
        enumerated,
        Objective(kind="sampled", discount=0.5),
        torch.ones(V, dtype=torch.float64),
        ids=ids,
        sequence_ids=sequence_ids,
    )
    assert result.stats.loss.tolist() == pytest.approx([-x for x in want])
    with pytest.raises(ValueError, match="sequence_ids"):
        fused(enumerated, Objective(kind="sampled", discount=0.5), torch.ones(V, dtype=torch.float64))


def test_no_tokens_have_no_loss_and_every_statistic(enumerated):
    none, nothing = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.float64)
    result = fused_objective(
        student_hidden=enumerated["hidden"].expand(0, H),
        student_head=Head(weight=enumerated["weight"]),
        teacher=TeacherHidden(
            hidden=enumerated["teacher_hidden"].expand(0, H), head=Head(weight=enumerated["teacher_weight"])
        ),
        objective=Objective(kind="sampled", discount=0.5),
        weights=nothing,
        denominator=1.0,
        sampled_ids=none,
        sequence_ids=none,
    )
    assert result.loss.item() == 0
    for name in ("student_logp", "teacher_logp", "reverse_kl", "forward_kl", "teacher_entropy"):
        assert getattr(result.stats, name).shape == (0,)


def test_served_log_probs_of_the_sampled_tokens_are_enough(enumerated):
    value, grad_hidden, grad_weight, student, teacher = exact(enumerated)
    served = TeacherTopK(
        ids=teacher.topk(2).indices.expand(V, 2),
        logp=teacher.topk(2).values.expand(V, 2),
        sampled_logp=teacher,
    )
    result, got_hidden, got_weight = fused(
        enumerated, Objective(kind="sampled"), student.exp(), teacher=served
    )
    torch.testing.assert_close(result.loss.detach(), value)
    torch.testing.assert_close(got_hidden, grad_hidden)
    torch.testing.assert_close(got_weight, grad_weight)


def test_cross_entropy_is_torchs_and_needs_no_teacher(enumerated):
    weight = enumerated["weight"].clone().requires_grad_()
    ids = torch.tensor([3, 1, 1, 0, 5, 2])
    z = reference.logits(enumerated["hidden"].expand(V, H), weight)
    want = torch.nn.functional.cross_entropy(z, ids, reduction="sum")
    (grad,) = torch.autograd.grad(want, weight)
    weights = torch.ones(V, dtype=torch.float64)
    result, _, got = fused(enumerated, Objective(kind="cross_entropy"), weights, ids=ids, teacher=None)
    torch.testing.assert_close(result.loss.detach(), want.detach())
    torch.testing.assert_close(got, grad)
    assert result.stats.reverse_kl is None
    assert result.stats.student_entropy.min() > 0


def test_negative_advantage_pushes_unlikely_tokens_down_and_no_other(enumerated):
    *_, student, _ = exact(enumerated)
    threshold = student.sort().values[1:3].mean().item()
    low = student < threshold
    assert 0 < int(low.sum()) < V
    objective = Objective(kind="negative_advantage", advantage=-0.5, below_logp=threshold)
    result, _, got = fused(enumerated, objective, torch.ones(V, dtype=torch.float64), teacher=None)
    torch.testing.assert_close(result.stats.loss, torch.where(low, 0.5 * student, 0.0))
    slope = torch.where(low, 0.5, 0.0).double()
    grad_z = torch.diag(slope) - slope[:, None] * student.exp()
    torch.testing.assert_close(got, grad_z.sum(0)[:, None] * enumerated["hidden"])
    stepped = torch.log_softmax((enumerated["weight"] - 0.01 * got) @ enumerated["hidden"], -1)
    assert (stepped[low] < student[low]).all()


WRONG_CALLS = [
    (Objective(kind="sampled"), {"ids": None, "sampled_ids": None}, "sampled_ids"),
    (Objective(kind="reverse_kl"), {"teacher": None}, "needs a teacher"),
    (Objective(kind="reverse_kl"), {"advantage": torch.ones(V)}, "reverse_kl would not read it"),
    (Objective(kind="sampled", ppo_clip=0.2), {}, "never clips"),
]


@pytest.mark.parametrize(("objective", "change", "message"), WRONG_CALLS, ids=lambda x: str(x)[:40])
def test_calls_that_cannot_work_say_why(enumerated, objective, change, message):
    options = {
        "student_hidden": enumerated["hidden"].expand(V, H),
        "student_head": Head(weight=enumerated["weight"]),
        "teacher": TeacherHidden(
            hidden=enumerated["teacher_hidden"].expand(V, H), head=Head(weight=enumerated["teacher_weight"])
        ),
        "objective": objective,
        "weights": torch.ones(V, dtype=torch.float64),
        "denominator": 1.0,
        "sampled_ids": torch.arange(V),
    }
    options |= {k: v for k, v in change.items() if k != "ids"}
    with pytest.raises(ValueError, match=message):
        fused_objective(**options)


def test_a_served_teacher_refuses_what_it_cannot_know(enumerated):
    weights = torch.ones(V, dtype=torch.float64)
    served = TeacherTopK(
        ids=torch.zeros(V, 1, dtype=torch.long), logp=torch.full((V, 1), -0.1, dtype=torch.float64)
    )
    for support, more in (("full", {}), ("student_topk", {"k": 2}), ("union", {"k": 2})):
        with pytest.raises(ValueError, match="does not send"):
            fused(enumerated, Objective(kind="reverse_kl", support=support, **more), weights, teacher=served)
    with pytest.raises(ValueError, match="sampled_logp is None"):
        fused(enumerated, Objective(kind="sampled"), weights, teacher=served)


def test_two_temperatures_are_refused(enumerated):
    options = {
        "student_hidden": enumerated["hidden"][None],
        "student_head": Head(weight=enumerated["weight"], temperature=2.0),
        "objective": Objective(kind="forward_kl"),
        "weights": torch.ones(1, dtype=torch.float64),
        "denominator": 1.0,
    }
    teacher = TeacherHidden(
        hidden=enumerated["teacher_hidden"][None], head=Head(weight=enumerated["teacher_weight"])
    )
    with pytest.raises(ValueError, match="temperature"):
        fused_objective(teacher=teacher, **options)
    served = TeacherTopK(ids=torch.tensor([[1]]), logp=torch.tensor([[-0.1]], dtype=torch.float64))
    options["objective"] = Objective(kind="forward_kl", support="teacher_topk", k=1)
    with pytest.raises(ValueError, match="temperature"):
        fused_objective(teacher=served, **options)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    discount=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_discounted_future_sum_against_a_loop(lengths, discount, seed):
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = torch.cat([torch.full((n,), 10 - i) for i, n in enumerate(lengths)])
    want, start = [], 0
    for n in lengths:
        row = values[start : start + n].tolist()
        want += [sum(discount ** (u - t) * row[u] for u in range(t, n)) for t in range(n)]
        start += n
    got = discounted_future_sum(values, sequence_ids=ids, discount=discount)
    assert got.tolist() == pytest.approx(want)
