"""The promised form, a value per token, recomputed by chunk in backward: against plain autograd and TRL."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpath import divergence
from onpath.losses import Head, Objective, TeacherHidden, chunked_divergence, fused_objective
from tests.losses.kinds import OPTIONS, PURE, built_in


def random(
    n: int, h: int, g: int, v: int, seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "student_hidden": (n, h),
        "student_head": (v, h),
        "teacher_hidden": (n, g),
        "teacher_head": (v, g),
    }
    return {name: torch.randn(*shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}


def plain(p: dict[str, torch.Tensor], kind: str, entry_clip: float | None) -> torch.Tensor:
    pure = PURE[kind] if entry_clip is None else built_in(kind, entry_clip)
    return pure(
        torch.log_softmax(p["teacher_hidden"] @ p["teacher_head"].t(), -1),
        torch.log_softmax(p["student_hidden"] @ p["student_head"].t(), -1),
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    h=st.integers(1, 6),
    g=st.integers(1, 6),
    v=st.integers(1, 20),
    rows=st.one_of(st.none(), st.integers(1, 10)),
    which=st.one_of(
        st.tuples(st.sampled_from([*OPTIONS]), st.none()),
        st.tuples(st.sampled_from([*divergence.DIVERGENCES]), st.just(0.05)),
    ),
    seed=st.integers(0, 2**16),
)
def test_equals_plain_autograd_at_any_shape(n, h, g, v, rows, which, seed):
    """Weights arrive only in backward, some of them zero or negative."""
    kind, clip = which
    above = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    above[0] = 0.0
    found = []
    for chunked in (True, False):
        p = random(n, h, g, v, seed)
        leaves = [p["student_hidden"].requires_grad_(), p["student_head"].requires_grad_()]
        if chunked:
            value = chunked_divergence(**p, **OPTIONS[kind], entry_clip=clip, chunk_rows=rows)
        else:
            value = plain(p, kind, clip)
        found.append((value.detach(), *torch.autograd.grad(value, leaves, above)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", OPTIONS)
def test_gradient_check(kind):
    p = random(3, 2, 4, 5, seed=0)
    leaves = p["student_hidden"].requires_grad_(), p["student_head"].requires_grad_()

    def value(hidden, head):
        rest = {"teacher_hidden": p["teacher_hidden"], "teacher_head": p["teacher_head"]}
        return chunked_divergence(
            student_hidden=hidden, student_head=head, chunk_rows=2, **rest, **OPTIONS[kind]
        )

    assert torch.autograd.gradcheck(value, leaves)


def test_heads_may_be_records_with_bias_scale_and_softcap():
    p = random(4, 3, 3, 7, seed=1)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    value = chunked_divergence(
        student_hidden=p["student_hidden"],
        student_head=Head(weight=p["student_head"], bias=bias, softcap=2.0),
        teacher_hidden=p["teacher_hidden"],
        teacher_head=Head(weight=p["teacher_head"], logit_scale=0.5),
        kind="reverse_kl",
    )
    z = torch.tanh((p["student_hidden"] @ p["student_head"].t() + bias) / 2) * 2
    want = divergence.reverse_kl(
        teacher_logp=torch.log_softmax(0.5 * p["teacher_hidden"] @ p["teacher_head"].t(), -1),
        student_logp=torch.log_softmax(z, -1),
    )
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), bias)[0] for x in (value, want)))


def test_the_teacher_never_receives_a_gradient():
    p = {name: t.requires_grad_() for name, t in random(3, 2, 2, 5, seed=2).items()}
    chunked_divergence(**p, kind="forward_kl").sum().backward()
    assert p["teacher_hidden"].grad is None
    assert p["teacher_head"].grad is None
    assert p["student_head"].grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "kind"),
        ({"beta": 0.5}, "beta"),
        ({"kind": lambda t, s: (t - s).sum()}, "lambda. gave shape"),
        ({"kind": "jensen_shannon"}, "beta"),
        ({"kind": "jensen_shannon", "beta": 1.0}, "zero everywhere"),
        ({"teacher_head": torch.zeros(6, 2, dtype=torch.float64)}, "vocabular|outcomes|V"),
        ({"teacher_hidden": torch.zeros(2, 2, dtype=torch.float64)}, "aligned|N"),
    ],
    ids=[
        "unknown kind",
        "stray beta",
        "no divergence",
        "no beta",
        "beta at its end",
        "vocabularies",
        "lengths",
    ],
)
def test_wrong_calls_say_why(change, message):
    with pytest.raises(Exception, match=message):
        chunked_divergence(**{**random(3, 2, 2, 5, seed=3), "kind": "reverse_kl", **change})


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_trl(beta, dtype):
    """TRL's per-token divergence, weighted by a mask and divided by a global count, and its student
    gradients.

    TRL's β = 0 is our forward_kl and its β = 1 our reverse_kl; inside (0, 1) the two definitions agree.
    """
    trl = pytest.importorskip("trl.trainer.distillation_trainer")
    kind, ours_beta = {0.0: ("forward_kl", None), 1.0: ("reverse_kl", None)}.get(
        beta, ("jensen_shannon", beta)
    )
    n, scale = 37, {"logit_scale": 0.7, "softcap": 4.0, "temperature": 1.5}
    mask = (torch.arange(n) % 5 != 0).view(1, n)
    found = []
    for library in ("trl", "onpath"):
        p = random(n, 16, 24, 211, seed=4, dtype=torch.float64)
        p = {name: t.to(dtype) for name, t in p.items()}
        leaves = [p["student_hidden"].requires_grad_(), p["student_head"].requires_grad_()]
        if library == "trl":
            loss, entropy, _ = trl._chunked_divergence_loss(
                p["student_hidden"][None],
                p["teacher_hidden"][None],
                p["student_head"],
                p["teacher_head"],
                mask,
                beta,
                num_items_in_batch=50,
                student_logit_scale=scale["logit_scale"],
                teacher_logit_scale=scale["logit_scale"],
                student_final_logit_softcapping=scale["softcap"],
                teacher_final_logit_softcapping=scale["softcap"],
                temperature=scale["temperature"],
            )
        else:
            result = fused_objective(
                student_hidden=p["student_hidden"],
                student_head=Head(weight=p["student_head"], **scale),
                teacher=TeacherHidden(
                    hidden=p["teacher_hidden"], head=Head(weight=p["teacher_head"], **scale)
                ),
                objective=Objective(kind=kind, beta=ours_beta),
                weights=mask[0].to(dtype),
                denominator=50.0,
                chunk_rows=16,
            )
            loss, entropy = result.loss, (result.stats.student_entropy * mask[0]).sum()
        found.append((loss.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*found, strict=True):
        # TRL works in float32 throughout, whatever its inputs.
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-6)
    assert found[0][0] > 0.01
