"""The step's form of the loss against the float64 reference, and what it measures on the way."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from onpath.divergence import DIVERGENCES
from onpath.losses import (
    Head,
    Objective,
    SparseGuidance,
    StatsRequest,
    TeacherHidden,
    TeacherTopK,
    fused_objective,
    token_stats,
)
from onpath.losses import rows as rows_of_logits
from onpath.losses.topk import evaluate
from tests import reference
from tests.losses.kinds import OPTIONS

N, H, G, V = 7, 5, 6, 11


@pytest.fixture
def problem() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape, scale=1.0: scale * torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "hidden": draw(N, H),
        "weight": draw(V, H),
        "bias": draw(V),
        "teacher_hidden": draw(N, G),
        "teacher_weight": draw(V, G),
        "teacher_bias": draw(V),
        "weights": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 1.0], dtype=torch.float64),
        "ids": torch.tensor([3, 0, 7, 10, 1, 2, 5]),
    }


HEADS = {
    "plain": {},
    "full": {"logit_scale": 0.7, "softcap": 3.0, "temperature": 1.7},
    "scaled": {"logit_scale": 0.5, "temperature": 2.0},
}
OBJECTIVES = [
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jensen_shannon", "beta": 0.3},
    {"kind": "forward_kl", "entry_clip": 0.05},
    {"kind": "reverse_kl", "entry_clip": 0.05},
    {"kind": "jensen_shannon", "beta": 0.8, "entry_clip": 0.02},
    {"kind": "reverse_kl", "token_clip": 1.0},
    *(
        {
            "kind": kind,
            "support": support,
            "k": 3,
            "tail": tail,
            **({"beta": 0.3} if kind == "jensen_shannon" else {}),
        }
        for kind, support, tail in itertools.product(
            ["forward_kl", "reverse_kl", "jensen_shannon"],
            ["teacher_topk", "student_topk", "union"],
            ["bucket", "renormalise"],
        )
    ),
    {"kind": "reverse_kl", "support": "union", "k": 4, "entry_clip": 0.1, "token_clip": 0.5},
    OPTIONS["squared_hellinger"],
    OPTIONS["renyi"] | {"token_clip": 0.5},
    *(
        OPTIONS[kind] | {"support": support, "k": 3, "tail": tail}
        for kind, support, tail in itertools.product(
            ["squared_hellinger", "renyi"], ["teacher_topk", "union"], ["bucket", "renormalise"]
        )
    ),
]


def name_of(options) -> str:
    return "-".join(str(v) if not callable(v) else v.__name__ for v in options.values())


def leaves(problem, dtype=torch.float64):
    return [problem[name].to(dtype).clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def run(problem, objective, head_options, *, dtype=torch.float64, chunk_rows=None, **more):
    hidden, weight, bias = leaves(problem, dtype)
    teacher = TeacherHidden(
        hidden=problem["teacher_hidden"].to(dtype),
        head=Head(
            weight=problem["teacher_weight"].to(dtype), bias=problem["teacher_bias"].to(dtype), **head_options
        ),
    )
    result = fused_objective(
        student_hidden=hidden,
        student_head=Head(weight=weight, bias=bias, **head_options),
        teacher=more.pop("teacher", teacher),
        objective=objective,
        weights=problem["weights"].to(dtype),
        denominator=5.0,
        sampled_ids=problem["ids"],
        chunk_rows=chunk_rows,
        **more,
    )
    return result, (hidden, weight, bias)


def plain_logits(problem, tensors, head_options):
    hidden, weight, bias = tensors
    z_student = reference.logits(hidden, weight, bias=bias, **head_options)
    z_teacher = reference.logits(
        problem["teacher_hidden"], problem["teacher_weight"], bias=problem["teacher_bias"], **head_options
    )
    return z_student, z_teacher


@pytest.mark.parametrize("options", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize("head", HEADS)
def test_value_and_gradients_equal_the_reference(problem, options, head):
    tensors = leaves(problem)
    want = reference.weighted_sum(
        *plain_logits(problem, tensors, HEADS[head]), problem["weights"], 5.0, **options
    )
    wanted_grads = torch.autograd.grad(want, tensors)
    for chunk_rows in (None, 1, 3):
        result, ours = run(problem, Objective(**options), HEADS[head], chunk_rows=chunk_rows)
        result.loss.backward()
        torch.testing.assert_close(result.loss.detach(), want.detach(), rtol=1e-10, atol=1e-12)
        for a, b in zip(ours, wanted_grads, strict=True):
            torch.testing.assert_close(a.grad, b, rtol=1e-9, atol=1e-11)


def targets(problem) -> tuple[dict[int, dict[int, float]], SparseGuidance]:
    """Row 1 of mass 1, row 2 of weight 0, row 5 with mass below 1 and a padded column."""
    rows = {1: {3: 0.25, 4: 0.75}, 2: {0: 1.0}, 5: {9: 0.125}}
    guidance = SparseGuidance(
        positions=torch.tensor([1, 2, 5]),
        ids=torch.tensor([[3, 4], [0, 0], [9, 0]]),
        probs=torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.125, 0.0]], dtype=torch.float64),
        strength=0.7,
    )
    return rows, guidance


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "options",
    [OBJECTIVES[1], OBJECTIVES[6], OBJECTIVES[7], OPTIONS["squared_hellinger"]],
    ids=["full", "token_clip", "topk", "own"],
)
def test_guidance_adds_its_value_and_gradient(problem, options, head):
    rows, guidance = targets(problem)
    tensors = leaves(problem)
    z_student, z_teacher = plain_logits(problem, tensors, HEADS[head])
    objective = reference.weighted_sum(z_student, z_teacher, problem["weights"], 5.0, **options)
    guided = reference.guidance_sum(z_student, problem["weights"], 5.0, rows, 0.7)
    grad_objective = torch.autograd.grad(objective, tensors, retain_graph=True)
    grad_guided = torch.autograd.grad(guided, tensors)
    for chunk_rows in (None, 1, 3):
        result, ours = run(
            problem, Objective(**options), HEADS[head], guidance=guidance, chunk_rows=chunk_rows
        )
        result.loss.backward()
        torch.testing.assert_close(result.objective_sum, objective.detach())
        torch.testing.assert_close(result.guidance_sum, guided.detach())
        torch.testing.assert_close(result.loss.detach(), (objective + guided).detach())
        for a, b, c in zip(ours, grad_objective, grad_guided, strict=True):
            torch.testing.assert_close(a.grad, b + c)


@pytest.mark.parametrize("k", [1, 3])
def test_statistics_come_out_of_the_same_pass(k, problem):
    tensors = leaves(problem)
    z_student, z_teacher = plain_logits(problem, tensors, HEADS["full"])
    q, p = torch.softmax(z_student.detach(), -1), torch.softmax(z_teacher, -1)
    request = StatsRequest(mass_ids=torch.tensor([1, 4]), top_k=k)
    result, _ = run(
        problem, Objective(kind="jensen_shannon", beta=0.4), HEADS["full"], stats=request, chunk_rows=3
    )
    stats = result.stats
    for n in range(N):
        a, b = p[n].numpy(), q[n].numpy()
        assert stats.loss[n].item() == pytest.approx(reference.numpy_jsd(a, b, 0.4))
        assert stats.forward_kl[n].item() == pytest.approx(reference.numpy_kl(a, b))
        assert stats.reverse_kl[n].item() == pytest.approx(reference.numpy_kl(b, a))
        assert stats.teacher_entropy[n].item() == pytest.approx(-sum(x * math.log(x) for x in a))
        assert stats.student_entropy[n].item() == pytest.approx(-sum(x * math.log(x) for x in b))
        y = int(problem["ids"][n])
        assert stats.student_logp[n].item() == pytest.approx(math.log(b[y]))
        assert stats.teacher_logp[n].item() == pytest.approx(math.log(a[y]))
        assert stats.teacher_mass[n].item() == pytest.approx(a[1] + a[4])
        best_t, best_s = a.argsort()[::-1][:k], b.argsort()[::-1][:k]
        assert stats.teacher_top_ids[n].tolist() == best_t.tolist()
        assert stats.student_top_ids[n].tolist() == best_s.tolist()
        assert stats.student_top_logp[n].exp().tolist() == pytest.approx(b[best_s].tolist())
        assert stats.overlap[n].item() == pytest.approx(len(set(best_t) & set(best_s)) / k)
    assert 0 < stats.overlap.mean() < 1
    scored = token_stats(
        student_hidden=problem["hidden"],
        student_head=Head(weight=problem["weight"], bias=problem["bias"], **HEADS["full"]),
        teacher=TeacherHidden(
            hidden=problem["teacher_hidden"],
            head=Head(weight=problem["teacher_weight"], bias=problem["teacher_bias"], **HEADS["full"]),
        ),
        sampled_ids=problem["ids"],
        stats=request,
    )
    for name, value in vars(scored).items():
        if name != "loss":
            torch.testing.assert_close(value, getattr(stats, name))


def served(problem, k: int, pad: int = 0) -> TeacherTopK:
    z = reference.logits(problem["teacher_hidden"], problem["teacher_weight"], bias=problem["teacher_bias"])
    logp = torch.log_softmax(z, -1)
    best = logp.topk(k)
    ids = torch.cat([best.indices, torch.zeros(N, pad, dtype=torch.long)], -1)
    values = torch.cat([best.values, torch.full((N, pad), -torch.inf, dtype=torch.float64)], -1)
    return TeacherTopK(
        ids=ids, logp=values, sampled_logp=logp.gather(-1, problem["ids"][:, None]).squeeze(-1)
    )


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_served_scores_give_the_same_loss_as_the_teacher_itself(problem, kind, tail, pad):
    objective = Objective(**OPTIONS[kind], support="teacher_topk", k=4, tail=tail)
    want, want_tensors = run(problem, objective, {})
    got, got_tensors = run(problem, objective, {}, teacher=served(problem, 4, pad))
    for result in (want, got):
        result.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    for a, b in zip(got_tensors, want_tensors, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(got.stats.teacher_logp, want.stats.teacher_logp)
    assert (got.stats.reverse_kl <= want.stats.reverse_kl + 1e-9).all()
    assert (got.stats.reverse_kl > 0).all()


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_served_row_without_an_entry_is_one_outcome_on_both_sides(problem, kind):
    """Its columns borrowed an id whose mass the student's bucket then lacked: a KL below 0."""
    few, empty = served(problem, 2), torch.arange(N) % 3 == 0
    teacher = replace(
        few, ids=few.ids.masked_fill(empty[:, None], 0), logp=few.logp.masked_fill(empty[:, None], -torch.inf)
    )
    objective = Objective(**OPTIONS[kind], support="teacher_topk", k=2)
    alone, tensors = run({**problem, "weights": empty.double()}, objective, {}, teacher=teacher)
    alone.loss.backward()
    assert abs(alone.loss.item()) < 1e-12
    assert all(t.grad.abs().max() < 1e-12 for t in tensors)
    weights = problem["weights"].masked_fill(empty, 0.0)
    want, want_tensors = run({**problem, "weights": weights}, objective, {}, teacher=few)
    got, got_tensors = run(problem, objective, {}, teacher=teacher)
    for result in (want, got):
        result.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    for a, b in zip(got_tensors, want_tensors, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_mask_that_a_softcap_would_lift_is_refused():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    assert Head(weight=torch.eye(3), bias=bias).masks()
    with pytest.raises(ValueError, match="−softcap"):
        Head(weight=torch.eye(3), bias=bias, softcap=5.0)


def test_a_confident_served_teacher_has_no_tail_of_rounding_noise():
    """1 − Σ p of float32 log-probs is noise below a millionth, often 0: a loss of seven times its value."""
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, k = 300, 20_000, 20
    z = 1.5 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    student = torch.log_softmax(0.5 * z, -1)
    z[:, 7] += torch.linspace(10, 40, rows, dtype=torch.float64)
    exact = torch.log_softmax(z, -1)
    best = exact.float().topk(k)
    outside = torch.ones_like(z).scatter(-1, best.indices, 0.0)
    tail, of_student = (exact.exp() * outside).sum(-1), (student.exp() * outside).sum(-1)
    told = TeacherTopK(ids=best.indices, logp=best.values).tail_mass(vocabulary=vocabulary).double()
    assert tail.min() < 1e-12
    assert (tail > 1e-4).sum() > 20
    seen = tail > 1e-4
    torch.testing.assert_close(told[seen], tail[seen], rtol=0.01, atol=0.0)
    assert (told >= tail - 3e-7).all()  # never surer than the teacher is, beyond what float32 tells
    assert (told[~seen] <= tail[~seen].clamp_min(1e-6) + 3e-7).all()
    objective = Objective(kind="reverse_kl", support="teacher_topk", k=k, tail="bucket")
    served = evaluate(
        objective, student.float(), None, student.exp().float(), torch.empty(0), TeacherTopK(
            ids=best.indices, logp=best.values
        ), False,
    ).double()  # fmt: skip
    inside = student.gather(-1, best.indices)
    kl = (inside.exp() * (inside - exact.gather(-1, best.indices))).sum(-1)
    right = kl + of_student * (of_student / tail).log()
    assert (served <= right + 1e-3).all()
    assert (served >= right - of_student * (1.3e-6 / tail).log().clamp_min(0.01) - 1e-3).all()


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk", "union"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_k_of_everything_is_exact(problem, support, tail):
    full, full_tensors = run(problem, Objective(kind="reverse_kl"), {})
    topk, topk_tensors = run(problem, Objective(kind="reverse_kl", support=support, k=V, tail=tail), {})
    everything, served_tensors = run(
        problem,
        Objective(kind="reverse_kl", support="teacher_topk", k=V, tail=tail),
        {},
        teacher=served(problem, V),
    )
    for result in (full, topk, everything):
        result.loss.backward()
    assert topk.loss.item() == full.loss.item()
    assert everything.loss.item() == pytest.approx(full.loss.item())
    for a, b, c in zip(full_tensors, topk_tensors, served_tensors, strict=True):
        assert torch.equal(a.grad, b.grad)
        torch.testing.assert_close(a.grad, c.grad)


@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), *(OPTIONS[kind] | {"entry_clip": 0.05} for kind in DIVERGENCES)],
    ids=name_of,
)
def test_masked_vocabulary_is_as_if_it_were_absent(problem, options):
    """−inf in both biases at two outcomes: same loss and gradients as with those rows removed, nothing for
    the rows."""
    objective = Objective(**options)
    kept = [0, 1, 2, 3, 4, 5, 7, 8, 10]
    masked = {**problem, "bias": problem["bias"].clone(), "teacher_bias": problem["teacher_bias"].clone()}
    for name in ("bias", "teacher_bias"):
        masked[name][[6, 9]] = -torch.inf
    small = {
        n: problem[n][kept] if n in ("weight", "bias", "teacher_weight", "teacher_bias") else problem[n]
        for n in problem
    }
    small["ids"] = problem["ids"].clamp(max=8)
    masked["ids"] = torch.tensor(kept)[small["ids"]]
    want, want_tensors = run(small, objective, {})
    got, got_tensors = run(masked, objective, {}, chunk_rows=2)
    for result in (want, got):
        result.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.stats.student_entropy, want.stats.student_entropy)
    torch.testing.assert_close(got_tensors[0].grad, want_tensors[0].grad)
    torch.testing.assert_close(got_tensors[1].grad[kept], want_tensors[1].grad)
    assert torch.equal(got_tensors[1].grad[[6, 9]], torch.zeros(2, H, dtype=torch.float64))


@pytest.mark.parametrize("head", ["plain", "full"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", rows_of_logits.FAST)
def test_a_gradient_made_by_hand_is_that_of_autograd(problem, kind, clip, head, monkeypatch):
    """A built-in divergence without one in `FAST` goes through its pure function alone."""
    objective = Objective(**OPTIONS[kind], entry_clip=clip)
    want, want_tensors = run(problem, objective, HEADS[head], chunk_rows=3)
    for name in ("FAST", "FAST_CLIPPED"):
        monkeypatch.setattr(rows_of_logits, name, {})
    got, got_tensors = run(problem, objective, HEADS[head], chunk_rows=3)
    for result in (want, got):
        result.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    for a, b in zip(got_tensors, want_tensors, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_padding_rows_of_a_head_take_no_part(problem):
    """`tokens` on both sides, with different numbers of rows: as if the rows were not there."""
    problem = {**problem, "ids": problem["ids"].clamp(max=V - 3)}
    result, tensors = run(problem, Objective(kind="reverse_kl"), {"tokens": V - 2})
    wider = {
        **problem,
        "teacher_weight": torch.cat([problem["teacher_weight"], torch.ones(3, G, dtype=torch.float64)]),
    }
    wider["teacher_bias"] = torch.cat([problem["teacher_bias"], torch.ones(3, dtype=torch.float64)])
    other, _ = run(wider, Objective(kind="reverse_kl"), {"tokens": V - 2})
    result.loss.backward()
    want = reference.weighted_sum(
        *(z[:, : V - 2] for z in plain_logits(problem, leaves(problem), {})),
        problem["weights"],
        5.0,
        kind="reverse_kl",
    )
    torch.testing.assert_close(result.loss.detach(), want.detach())
    torch.testing.assert_close(other.loss, result.loss)
    assert torch.equal(tensors[1].grad[-2:], torch.zeros(2, H, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"Head\.tokens"):
        run(wider, Objective(kind="reverse_kl"), {})


@pytest.mark.parametrize(
    "options",
    [
        OBJECTIVES[0],
        OBJECTIVES[7],
        OPTIONS["squared_hellinger"],
        {"kind": "sampled"},
        {"kind": "cross_entropy"},
    ],
    ids=name_of,
)
def test_all_weights_zero_gives_exactly_zero_whatever_the_logits(problem, options):
    broken = {**problem, "weights": torch.zeros(N, dtype=torch.float64), "hidden": problem["hidden"].clone()}
    broken["hidden"][2] = torch.inf
    result, tensors = run(broken, Objective(**options), {})
    result.loss.backward()
    assert result.loss.item() == 0.0
    for tensor in tensors:
        grad = tensor.grad if tensor is not tensors[1] else tensor.grad[:, :0]
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("with_guidance", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_dead_token_with_a_broken_hidden_state_leaves_the_head_alone(problem, bad, with_guidance):
    """Row 2, of weight 0; its guidance has that weight too."""
    found = []
    for value in (0.0, bad):
        given = {**problem, "hidden": problem["hidden"].index_fill(0, torch.tensor([2]), value)}
        guidance = targets(problem)[1] if with_guidance else None
        result, tensors = run(given, Objective(kind="reverse_kl"), {}, guidance=guidance, chunk_rows=4)
        result.loss.backward()
        found.append((result.loss.detach(), *(t.grad for t in tensors)))
    for whole, broken in zip(*found, strict=True):
        assert broken.equal(whole)


def test_a_dead_token_with_an_infinite_loss_leaves_the_rest_alone(problem):
    """Weight 0 where the teacher excludes what the student allows: the others are untouched."""
    teacher_topk = served(problem, V)
    teacher_topk.logp[2, 0] = -torch.inf
    objective = Objective(kind="forward_kl", support="teacher_topk", k=V, tail="renormalise")
    want, want_tensors = run(problem, objective, {}, teacher=served(problem, V))
    got, got_tensors = run(problem, objective, {}, teacher=teacher_topk)
    for result in (want, got):
        result.loss.backward()
    assert got.loss.item() == want.loss.item()
    for a, b in zip(got_tensors, want_tensors, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_one_token_and_no_token(problem):
    one = {n: t[:1] if n in ("hidden", "teacher_hidden", "weights", "ids") else t for n, t in problem.items()}
    result, tensors = run(one, Objective(kind="reverse_kl"), {})
    result.loss.backward()
    want = reference.weighted_sum(*plain_logits(one, leaves(one), {}), one["weights"], 5.0, kind="reverse_kl")
    torch.testing.assert_close(result.loss.detach(), want.detach())
    none = {
        n: t[:0] if n in ("hidden", "teacher_hidden", "weights", "ids") else t for n, t in problem.items()
    }
    result, tensors = run(none, Objective(kind="reverse_kl"), {})
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert torch.equal(tensors[1].grad, torch.zeros_like(tensors[1]))


def test_the_loss_may_be_scaled_but_not_differentiated_twice(problem):
    plain, plain_tensors = run(problem, Objective(kind="reverse_kl"), {})
    plain.loss.backward()
    scaled, scaled_tensors = run(problem, Objective(kind="reverse_kl"), {})
    (3.0 * scaled.loss + 1.0).backward(retain_graph=True)
    for a, b in zip(scaled_tensors, plain_tensors, strict=True):
        torch.testing.assert_close(a.grad, 3.0 * b.grad)
    with pytest.raises(RuntimeError, match="only once"):
        scaled.loss.backward()


def test_frozen_parts_get_no_gradient_and_change_no_other(problem):
    want, want_tensors = run(problem, Objective(kind="reverse_kl"), {})
    want.loss.backward()
    hidden = problem["hidden"].clone().requires_grad_()
    teacher = TeacherHidden(
        hidden=problem["teacher_hidden"],
        head=Head(weight=problem["teacher_weight"], bias=problem["teacher_bias"]),
    )
    options = {
        "teacher": teacher,
        "objective": Objective(kind="reverse_kl"),
        "weights": problem["weights"],
        "denominator": 5.0,
    }
    frozen = Head(weight=problem["weight"], bias=problem["bias"])
    result = fused_objective(student_hidden=hidden, student_head=frozen, **options)
    result.loss.backward()
    torch.testing.assert_close(hidden.grad, want_tensors[0].grad)
    with torch.no_grad():
        silent = fused_objective(student_hidden=hidden, student_head=frozen, **options)
    assert not silent.loss.requires_grad
    assert silent.loss.item() == want.loss.item()


def test_tied_embeddings_add_both_gradients(problem):
    """The head is the embedding: its gradient has the input's part and the output's part."""
    teacher = TeacherHidden(hidden=problem["teacher_hidden"], head=Head(weight=problem["teacher_weight"]))
    grads = []
    for fused in (True, False):
        embedding = problem["weight"].clone().requires_grad_()
        hidden = torch.tanh(embedding[problem["ids"]])
        if fused:
            loss = fused_objective(
                student_hidden=hidden,
                student_head=Head(weight=embedding),
                teacher=teacher,
                objective=Objective(kind="forward_kl"),
                weights=problem["weights"],
                denominator=5.0,
            ).loss
        else:
            z_teacher = reference.logits(teacher.hidden, teacher.head.weight)
            loss = reference.weighted_sum(
                hidden @ embedding.t(), z_teacher, problem["weights"], 5.0, kind="forward_kl"
            )
        loss.backward()
        grads.append(embedding.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_a_teacher_that_is_the_student_gives_zero_everywhere(problem):
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = leaves(problem, dtype)
        result = fused_objective(
            student_hidden=hidden,
            student_head=Head(weight=weight, bias=bias),
            teacher=TeacherHidden(hidden=hidden, head=Head(weight=weight, bias=bias)),
            objective=Objective(kind="reverse_kl"),
            weights=problem["weights"].to(dtype),
            denominator=5.0,
        )
        result.loss.backward()
        assert result.stats.reverse_kl.abs().max() == 0.0
        assert hidden.grad.abs().max() == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", OBJECTIVES[:4], ids=name_of)
def test_lower_precision_stays_within_its_tolerance(problem, options, dtype, tolerance):
    """Against float64 on the same rounded inputs, as a share of the largest gradient: what remains is our
    arithmetic and the rounding of the result itself (bfloat16 has 8 bits)."""
    rounded = {n: t if n == "ids" else t.to(dtype).double() for n, t in problem.items()}
    want, want_tensors = run(rounded, Objective(**options), HEADS["full"])
    got, got_tensors = run(problem, Objective(**options), HEADS["full"], dtype=dtype)
    for result in (want, got):
        result.loss.backward()
    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    for a, b in zip(got_tensors, want_tensors, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad.double() - b.grad).abs().max() <= tolerance * b.grad.abs().max()


@pytest.mark.parametrize("rows", [17, 3])
@pytest.mark.parametrize("tokens", [11, 9, 2])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_half_precision_head_gets_its_gradient_in_blocks(rows, tokens, scale):
    """The same sums as for a float32 head of the same numbers, rounded once; none for padded rows."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, rows, 6).bfloat16()
    weight, teacher_weight = torch.randn(2, 11, 6).bfloat16()
    grads = []
    for dtype, factor in ((torch.float32, 1.0), (torch.bfloat16, scale)):
        head = weight.to(dtype).requires_grad_()
        loss = fused_objective(
            student_hidden=hidden.to(dtype),
            student_head=Head(weight=head, tokens=tokens),
            teacher=TeacherHidden(
                hidden=teacher_hidden.to(dtype), head=Head(weight=teacher_weight.to(dtype), tokens=tokens)
            ),
            objective=Objective(kind="reverse_kl"),
            weights=torch.ones(rows),
            denominator=float(rows),
            chunk_rows=4,
        ).loss
        (factor * loss).backward()
        grads.append(head.grad)
    assert grads[1].dtype == torch.bfloat16
    assert (grads[1][tokens:] == 0).all()
    assert (grads[1][:tokens] != 0).all()
    torch.testing.assert_close(grads[1], (scale * grads[0]).bfloat16(), rtol=2**-7, atol=1e-6)


CHANGES = [
    ({"kind": "reverse_kl"}, {"kind": "forward_kl"}),
    (OPTIONS["squared_hellinger"], OPTIONS["renyi"]),
    ({"kind": "jensen_shannon", "beta": 0.3}, {"kind": "jensen_shannon", "beta": 0.4}),
    ({"kind": "reverse_kl"}, {"kind": "reverse_kl", "entry_clip": 0.05}),
    ({"kind": "reverse_kl"}, {"kind": "reverse_kl", "token_clip": 1.0}),
    *(
        (
            {"kind": "reverse_kl", "support": a, "k": 2, "tail": "bucket"},
            {"kind": "reverse_kl", "support": b, "k": 2, "tail": "bucket"},
        )
        for a, b in itertools.combinations(["teacher_topk", "student_topk", "union"], 2)
    ),
    ({"kind": "reverse_kl"}, {"kind": "reverse_kl", "support": "union", "k": 3}),
    (
        {"kind": "reverse_kl", "support": "union", "k": 3, "tail": "bucket"},
        {"kind": "reverse_kl", "support": "union", "k": 3, "tail": "renormalise"},
    ),
    ({"kind": "reverse_kl", "support": "union", "k": 3}, {"kind": "reverse_kl", "support": "union", "k": 2}),
    ({"kind": "sampled"}, {"kind": "cross_entropy"}),
    ({"kind": "sampled"}, {"kind": "sampled", "discount": 0.5}),
    ({"kind": "sampled"}, {"kind": "sampled", "ppo_clip": 0.2}),
    ({"kind": "negative_advantage"}, {"kind": "negative_advantage", "advantage": -2.0}),
    ({"kind": "negative_advantage"}, {"kind": "negative_advantage", "below_logp": -3.0}),
]


@pytest.mark.parametrize("pair", CHANGES, ids=lambda pair: f"{name_of(pair[0])} to {name_of(pair[1])}")
def test_every_parameter_changes_loss_and_gradient(problem, pair):
    found = []
    for options in pair:
        more = {"sequence_ids": torch.tensor([0, 0, 0, 0, 1, 1, 1])} if options.get("discount") else {}
        if pair[1].get("ppo_clip"):
            more["behaviour_logp"] = torch.full((N,), -2.0, dtype=torch.float64)
        result, tensors = run(problem, Objective(**options), {}, **more)
        result.loss.backward()
        found.append((result.loss.item(), tensors[0].grad))
    assert found[0][0] != pytest.approx(found[1][0], rel=1e-6)
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-6)


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "temperature"])
def test_every_head_parameter_changes_the_loss(problem, name):
    base, _ = run(problem, Objective(kind="reverse_kl"), {})
    other, _ = run(problem, Objective(kind="reverse_kl"), {name: 2.0})
    assert base.loss.item() != pytest.approx(other.loss.item(), rel=1e-3)


def test_guidance_may_have_weights_of_its_own(problem):
    """A token of weight 0 in the objective is guided all the same, and the other way round."""
    rows, guidance = targets(problem)
    own = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    tensors = leaves(problem)
    z_student, z_teacher = plain_logits(problem, tensors, {})
    spread = torch.zeros(N, dtype=torch.float64).index_copy(0, guidance.positions, own)
    want = reference.weighted_sum(z_student, z_teacher, problem["weights"], 5.0, kind="reverse_kl")
    guided = reference.guidance_sum(z_student, spread, 5.0, rows, 0.7)
    result, ours = run(
        problem,
        Objective(kind="reverse_kl"),
        {},
        guidance=SparseGuidance(**{**vars(guidance), "weights": own}),
    )
    result.loss.backward()
    torch.testing.assert_close(result.guidance_sum, guided.detach())
    for a, b in zip(ours, torch.autograd.grad(want + guided, tensors), strict=True):
        torch.testing.assert_close(a.grad, b)
    assert problem["weights"][2] == 0.0 != own[1]


def sharpened(problem: dict[str, torch.Tensor], *, temperature: float, divide: float, **options):
    """Loss and gradients with τ in the objective, or with the teacher's head divided by it."""
    hidden, weight = (problem[k].clone().requires_grad_() for k in ("hidden", "weight"))
    teacher = Head(weight=problem["teacher_weight"] / divide, bias=problem["teacher_bias"] / divide)
    found = fused_objective(
        student_hidden=hidden, student_head=Head(weight=weight, bias=problem["bias"]),
        teacher=TeacherHidden(hidden=problem["teacher_hidden"], head=teacher),
        objective=Objective(**options, teacher_temperature=temperature), weights=problem["weights"],
        denominator=3.0, sampled_ids=problem["ids"], chunk_rows=3,
    )  # fmt: skip
    found.loss.backward()
    return found, hidden.grad, weight.grad


@pytest.mark.parametrize("options", OBJECTIVES, ids=name_of)
def test_a_teachers_temperature_is_that_of_its_logits(problem, options):
    tempered, plain = (
        sharpened(problem, temperature=t, divide=d, **options) for t, d in ((0.4, 1.0), (1.0, 0.4))
    )
    torch.testing.assert_close(tempered[0].loss, plain[0].loss)
    for mine, theirs in zip(tempered[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine, theirs)
    untempered = sharpened(problem, temperature=1.0, divide=1.0, **options)[0]
    assert not torch.isclose(tempered[0].loss, untempered.loss)
    for name in ("reverse_kl", "forward_kl", "teacher_entropy", "teacher_logp"):
        torch.testing.assert_close(getattr(tempered[0].stats, name), getattr(untempered.stats, name))


def test_sharpened_reverse_kl_is_opd_with_another_entropy_bonus(problem):
    """KL(p_S ‖ p_T^(1/τ)/Z) = (E_pS[−log p_T] − τ·H(p_S))/τ + log Z; not least at p_S = p_T."""
    tau = 0.25
    found = sharpened(problem, temperature=tau, divide=1.0, kind="reverse_kl")[0].stats.loss
    s = (problem["hidden"] @ problem["weight"].T + problem["bias"]).log_softmax(-1)
    t = (problem["teacher_hidden"] @ problem["teacher_weight"].T + problem["teacher_bias"]).log_softmax(-1)
    cross, entropy, log_z = -(s.exp() * t).sum(-1), -(s.exp() * s).sum(-1), torch.logsumexp(t / tau, -1)
    torch.testing.assert_close(found, (cross - tau * entropy) / tau + log_z)
    head = Head(weight=problem["weight"], bias=problem["bias"])
    for temperature in (1.0, tau):
        hidden = problem["hidden"].clone().requires_grad_()
        fused_objective(
            student_hidden=hidden, student_head=head,
            teacher=TeacherHidden(hidden=problem["hidden"], head=head),
            objective=Objective(kind="reverse_kl", teacher_temperature=temperature),
            weights=problem["weights"], denominator=1.0,
        ).loss.backward()  # fmt: skip
        assert hidden.grad is not None
        assert (float(hidden.grad.abs().max()) > 1e-3) is (temperature != 1.0)


def test_masked_vocabulary_stays_masked_under_a_temperature(problem):
    bias = problem["teacher_bias"].clone()
    bias[4] = problem["bias"][4] = -torch.inf
    problem["teacher_bias"] = bias
    pairs = ((0.4, 1.0), (1.0, 0.4))
    results = [sharpened(problem, temperature=t, divide=d, kind="reverse_kl") for t, d in pairs]
    for mine, theirs in zip(*(r[1:] for r in results), strict=True):
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(mine, theirs)
