"""The step's form of the loss against the float64 reference, and what it measures on the way."""

import itertools
import math

import pytest
import torch

from tests import reference
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


HEADS = {"plain": {}, "full": {"logit_scale": 0.7, "softcap": 3.0, "temperature": 1.7}, "scaled": {"logit_scale": 0.5, "temperature": 2.0}}
OBJECTIVES = [
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jensen_shannon", "beta": 0.3},
    {"kind": "forward_kl", "entry_clip": 0.05},
    {"kind": "reverse_kl", "entry_clip": 0.05},
    {"kind": "jensen_shannon", "beta": 0.8, "entry_clip": 0.02},
    {"kind": "reverse_kl", "token_clip": 1.0},
    *(
        {"kind": kind, "support": support, "k": 3, "tail": tail, **({"beta": 0.3} if kind == "jensen_shannon" else {})}
        for kind, support, tail in itertools.product(
            ["forward_kl", "reverse_kl", "jensen_shannon"], ["teacher_topk", "student_topk", "union"], ["bucket", "renormalise"]
        )
    ),
    {"kind": "reverse_kl", "support": "union", "k": 4, "entry_clip": 0.1, "token_clip": 0.5},
]


def leaves(problem, dtype=torch.float64):
    return [problem[name].to(dtype).clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def run(problem, objective, head_options, *, dtype=torch.float64, chunk_rows=None, **more):
    hidden, weight, bias = leaves(problem, dtype)
    teacher = TeacherHidden(
        hidden=problem["teacher_hidden"].to(dtype),
        head=Head(weight=problem["teacher_weight"].to(dtype), bias=problem["teacher_bias"].to(dtype), **head_options),
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
    z_teacher = reference.logits(problem["teacher_hidden"], problem["teacher_weight"], bias=problem["teacher_bias"], **head_options)
    return z_student, z_teacher


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("head", HEADS)
def test_value_and_gradients_equal_the_reference(problem, options, head):
    tensors = leaves(problem)
    want = reference.weighted_sum(*plain_logits(problem, tensors, HEADS[head]), problem["weights"], 5.0, **options)
    wanted_grads = torch.autograd.grad(want, tensors)
    for chunk_rows in (None, 1, 3):
        result, ours = run(problem, Objective(**options), HEADS[head], chunk_rows=chunk_rows)
        result.loss.backward()
        torch.testing.assert_close(result.loss.detach(), want.detach(), rtol=1e-10, atol=1e-12)
        for a, b in zip(ours, wanted_grads, strict=True):
            torch.testing.assert_close(a.grad, b, rtol=1e-9, atol=1e-11)
