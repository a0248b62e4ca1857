"""What only a GPU can show: the loss in half precision, samples, whole steps, resuming, waits for the device.

`python -m pytest -m gpu -W ignore` on a machine with one (benchmarks/gpu.py runs them). With
ONPATH_GPU_TESTS_ON=cpu the same tests run on a CPU, where some of what they show is trivial: so they are
known to work before a GPU is at hand.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from onpath.config.whole import Config
from onpath.data.render import Renderer
from onpath.engines.hf import HFEngine
from onpath.losses import (
    Head,
    Objective,
    SparseGuidance,
    StatsRequest,
    TeacherHidden,
    fused_objective,
    token_stats,
)
from onpath.records import Sampling
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.training import train
from tests.conftest import make_model
from tests.methods.family import ARMS, options_of
from tests.stepping import flat, step_on
from tests.stored import read_trajectories

DEVICE = os.environ.get("ONPATH_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU (ONPATH_GPU_TESTS_ON=cpu)"
    ),
]
Tiny = Callable[..., Config]
N, H, V = 96, 64, 8192  # a vocabulary large enough for the ways that large ones take

OBJECTIVES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"kind": "reverse_kl"},
    "forward_kl": {"kind": "forward_kl"},
    "jensen_shannon": {"kind": "jensen_shannon", "beta": 0.3},
    "entry_clip": {"kind": "forward_kl", "entry_clip": 0.05},
    "token_clip": {"kind": "reverse_kl", "token_clip": 0.2},
    "student_topk": {"kind": "reverse_kl", "support": "student_topk", "k": 16},
    "union": {"kind": "reverse_kl", "support": "union", "k": 16},
    "sampled": {"kind": "sampled"},
    "own": {"kind": lambda t, s: 0.5 * ((t / 2).exp() - (s / 2).exp()).square().sum(-1)},
}
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "capped": {"logit_scale": 0.7, "softcap": 3.0}}


def problem(dtype: torch.dtype, head: dict[str, Any], **objective: Any) -> dict[str, Any]:
    """One call of the loss on the CPU, some weights 0, guidance at some tokens."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(dtype)

    weights = torch.rand(N, generator=g)
    weights[::7] = 0.0
    return {
        "student_hidden": draw(N, H),
        "student_head": Head(weight=draw(V, H, scale=H**-0.5), **head),
        "teacher": TeacherHidden(hidden=draw(N, H), head=Head(weight=draw(V, H, scale=H**-0.5), **head)),
        "objective": Objective(**objective),
        "weights": weights,
        "denominator": float(N),
        "sampled_ids": torch.randint(0, V, (N,), generator=g),
        "guidance": SparseGuidance(
            positions=torch.arange(3, N, 10),
            ids=torch.randint(0, V, (10, 4), generator=g),
            probs=torch.full((10, 4), 0.25),
        ),
        "stats": StatsRequest(top_k=4, mass_ids=torch.tensor([1, 5])),
    }


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Inputs of the loss elsewhere, and in another dtype; what trains asks for gradients."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, Head | TeacherHidden | SparseGuidance | StatsRequest):
        return type(value)(**{k: moved(v, device, dtype) for k, v in vars(value).items()})
    return value


def evaluated(inputs: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    """Loss, gradients and statistics, on the CPU in float64."""
    hidden, head = inputs["student_hidden"].requires_grad_(), inputs["student_head"]
    head.weight.requires_grad_()
    result = fused_objective(**{**inputs, **more})
    result.loss.backward()
    stats = {k: v for k, v in vars(result.stats).items() if v is not None}
    found = {**stats, "sum": result.loss, "hidden": hidden.grad, "weight": head.weight.grad}
    return {k: v.detach().cpu().double() for k, v in found.items()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_that_of_float64(name: str, head: str) -> None:
    given = problem(torch.float32, HEADS[head], **OBJECTIVES[name])
    exact = evaluated({k: moved(v, "cpu", torch.float64) for k, v in given.items()})
    found = evaluated({k: moved(v, DEVICE, torch.float32) for k, v in given.items()}, chunk_rows=40)
    for key, value in exact.items():
        torch.testing.assert_close(
            found[key], value, rtol=2e-3, atol=2e-5 * float(value.abs().max()), msg=key
        )


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "token_clip"])
def test_half_precision_is_near_and_unbiased(name: str) -> None:
    """bfloat16 operands against float64 on the same rounded operands: what is left is the products' own
    rounding of ∂/∂z. Statistics are sums of float32 numbers."""
    given = problem(torch.bfloat16, {}, **OBJECTIVES[name])
    exact = evaluated({k: moved(v, "cpu", torch.float64) for k, v in given.items()})
    half = {k: v if k == "weights" else moved(v, DEVICE, torch.bfloat16) for k, v in given.items()}
    half["weights"] = given["weights"].to(DEVICE)
    half["guidance"] = moved(given["guidance"], DEVICE, torch.float32)
    found = evaluated(half)
    assert float(found["sum"]) == pytest.approx(float(exact["sum"]), rel=1e-3)
    for key in ("hidden", "weight"):
        assert float((found[key] - exact[key]).norm() / exact[key].norm()) < 1e-2, key
    for key in ("reverse_kl", "student_entropy", "teacher_logp"):
        torch.testing.assert_close(found[key], exact[key], rtol=1e-3, atol=1e-3)


def test_autocast_halves_the_products_and_nothing_else() -> None:
    given = problem(torch.float32, {}, **OBJECTIVES["reverse_kl"])
    plain = evaluated({k: moved(v, DEVICE, torch.float32) for k, v in given.items()})
    with torch.autocast(DEVICE, torch.bfloat16):
        half = evaluated({k: moved(v, DEVICE, torch.float32) for k, v in given.items()})
    for key in ("hidden", "weight"):
        off = float((half[key] - plain[key]).norm() / plain[key].norm())
        assert off < 1e-2, key
        if DEVICE == "cuda":
            assert off > 1e-5, "the products were not in half precision"
    torch.testing.assert_close(half["reverse_kl"], plain["reverse_kl"], rtol=2e-2, atol=2e-3)


def test_the_loss_waits_for_the_device_as_often_however_many_chunks() -> None:
    given = problem(torch.float32, {}, **OBJECTIVES["reverse_kl"])
    counts = []
    for rows in (96, 8):
        inputs = {k: moved(v, DEVICE, torch.float32) for k, v in given.items()}
        inputs["student_hidden"].requires_grad_()
        fused_objective(**inputs, chunk_rows=rows)  # what is chosen at the first call waits too
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                fused_objective(**inputs, chunk_rows=rows)
            finally:
                if DEVICE == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        counts.append(len([w for w in said if "synchroniz" in str(w.message)]))
    assert counts[0] == counts[1]
    assert counts[0] <= 8


def test_the_loss_holds_no_logits_of_all_tokens() -> None:
    """Memory beyond its inputs and gradients: some chunks of [C, V], not [N, V]."""
    if DEVICE != "cuda":
        pytest.skip("the allocator's peak is CUDA's")
    tokens, width, vocabulary = 16_384, 256, 65_536
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_objective(
        student_hidden=hidden,
        student_head=Head(weight=weight),
        teacher=TeacherHidden(hidden=hidden.detach(), head=Head(weight=weight.detach().flip(0))),
        objective=Objective(kind="reverse_kl"),
        weights=torch.ones(tokens, device=DEVICE),
        denominator=float(tokens),
    ).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.75 * 4 * tokens * vocabulary


def test_statistics_alone_are_those_of_the_loss() -> None:
    given = problem(torch.float32, {}, **OBJECTIVES["reverse_kl"])
    inputs = {k: moved(v, DEVICE, torch.float32) for k, v in given.items()}
    with_loss = fused_objective(**inputs).stats
    names = ("student_hidden", "student_head", "teacher", "sampled_ids", "stats")
    alone = token_stats(**{k: inputs[k] for k in names}, objective=inputs["objective"])
    for key, value in vars(alone).items():
        if value is not None:
            torch.testing.assert_close(getattr(with_loss, key), value)


def engine_on(device: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> HFEngine:
    return HFEngine(make_model(seed).to(device), Renderer(tokenizer), stop_ids=frozenset({2}))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 20}])
def test_samples_are_those_of_a_cpu(sampling: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """One uniform number per token, so only rounding at the edge of a token could change one."""
    prefixes = [[1, 5 + i % 9, *range(6, 6 + i % 5)] for i in range(24)]
    how = Sampling(max_new_tokens=40, seed=3, **sampling)
    keys = [str(i) for i in range(len(prefixes))]
    here, there = (
        engine_on(device, tokenizer).continue_from(prefixes, how, keys=keys) for device in ("cpu", DEVICE)
    )
    assert len({c.ids for c in here}) > 6
    alike = [a for a, b in zip(here, there, strict=True) if a.ids == b.ids]
    assert len(alike) >= 22
    for a, b in zip(here, there, strict=True):
        if a.ids == b.ids:
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-3)


INTERVENE = ("relay", "relay from the start", "branch", "bridge", "truncate", "topd spliced")
METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "opd_recomputed": {"student__gradient_checkpointing": True},
    "opd_lora": {"student__lora_rank": 4},
    "opd_sampled": {"method__divergence": "sampled"},
    "opsd_lora": {"method__name": "opsd", "student__lora_rank": 4},
    "opsd_ema": {"method__name": "opsd", "method__weights": "ema"},
    "topd": {"method__name": "topd", "method__window": 4, "rollout__max_new_tokens": 24},
    "topd_read_anew": {"method__name": "topd", "method__window": 4, "method__reuse_cache": False},
    "trd": {"method__name": "trd", "method__template": "{problem} {attempt}", "method__gate": False},
    **{name: {**options_of(ARMS[name]), "rollout__max_new_tokens": 24} for name in INTERVENE},
}


def rows_of(config: Config) -> list[dict[str, Any]]:
    return read_lines(Path(config.run.dir) / config.run.name / "metrics.jsonl")


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_are_those_of_a_cpu(name: str, tiny: Tiny) -> None:
    found = []
    for device in ("cpu", DEVICE):
        on = {"student__device": device, "teacher__device": device, "run__name": f"{name}-{len(found)}"}
        config = tiny(data__eval={}, **METHODS[name], **on, run__trajectories_every=1)
        train(config, quiet=True)
        found.append(rows_of(config))
        if name in INTERVENE:
            stored = read_trajectories(Path(config.run.dir) / config.run.name)
            assert {row["edit"] for row in stored} - {"none"}, "it did nothing"
    for mine, other in zip(*found, strict=True):
        for key in ("loss", "reverse_kl_nats", "grad_norm"):
            assert other[key] == pytest.approx(mine[key], rel=2e-2, abs=1e-5), key
        assert other["tokens"] == pytest.approx(mine["tokens"], rel=0.05)


def test_a_step_in_half_precision_is_near(tiny: Tiny) -> None:
    on = {"student__device": DEVICE, "teacher__device": DEVICE, "data__eval": {}, "optim__max_grad_norm": 1e9}
    exact, half = assemble(tiny(**on)), assemble(tiny(**on, optim__bf16=True))
    made = exact.method.prepare(exact.sampler.generate(exact.prompts.pool[:8], exact.sampling), step=0)
    (_, a), (_, b) = (step_on(parts, made.trajectories) for parts in (exact, half))
    one, two = flat(a), flat(b)
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.99
    assert not torch.equal(one, two)


def test_a_killed_run_goes_on_to_the_same_weights(tiny: Tiny) -> None:
    on = {"student__device": DEVICE, "teacher__device": DEVICE, "data__eval": {}, "run__save_every": 2}
    whole = train(tiny(**on, optim__steps=4, optim__schedule="constant", run__name="whole"), quiet=True)
    parted = tiny(**on, optim__steps=2, optim__schedule="constant", run__name="parted")
    train(parted, quiet=True)
    longer = tiny(**on, optim__steps=4, optim__schedule="constant", run__name="parted")
    result = train(longer, quiet=True)
    files = [(r.directory / "model" / "model.safetensors").read_bytes() for r in (whole, result)]
    assert files[0] == files[1]
