"""Ratios of two policies: against their definition, of rollouts that are stale and of those that are not."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.config.whole import Config
from onpath.data.batch import collate
from onpath.losses import TokenStats, token_stats
from onpath.records import Trajectory
from onpath.run import importance
from onpath.run.assemble import assemble
from onpath.run.importance import Importance, log_ratios
from onpath.run.log import read_lines
from onpath.run.sampling import prepare, sample
from onpath.system.errors import UserError
from onpath.training import train
from tests.engines.test_hf import reference_logps
from tests.stepping import flat, step_on

Tiny = Callable[..., Config]


def drawn(gaps: list[list[float] | None], parts: object) -> list[Trajectory]:
    """Responses whose tokens the student finds so many nats likelier than when they were drawn."""
    found = []
    for place, gap in enumerate(gaps):
        context, response = (1, 5 + place, 9), tuple(4 + (3 * place + j) % 12 for j in range(4))
        t = Trajectory(student_context=context, teacher_context=context, response=response, place=place)
        now = reference_logps(parts.models.student, context, response)  # type: ignore[attr-defined]
        then = None if gap is None else tuple(p - g for p, g in zip(now, gap, strict=True))
        found.append(replace(t, behaviour_logprobs=then))
    return found


GAPS = [[0.2, -0.5, 3.0, 0.0], [-0.1, -0.2, -0.3, 0.1], None]


@pytest.mark.parametrize(
    ("kind", "weights", "capped"),
    [
        ("none", [[1.0] * 4] * 3, 1 / 8),
        ("token", [[1.2214, 0.6065, 2.0, 1.0], [0.9048, 0.8187, 0.7408, 1.1052], [1.0] * 4], 1 / 8),
        ("sequence", [[2.0] * 4, [0.6065] * 4, [1.0] * 4], 4 / 8),  # e^2.7: every token of the first
    ],
)
def test_weights_are_capped_ratios(kind: str, weights: list[list[float]], capped: float, tiny: Tiny) -> None:
    """The gradient is that of tokens weighted so by hand, over the same count; what others wrote weighs 1."""
    parts = assemble(tiny(method__importance=kind, optim__max_grad_norm=1e9))
    by_hand = assemble(tiny(optim__max_grad_norm=1e9))
    given = drawn(GAPS, parts)
    meter, found = step_on(parts, given)
    weighted = [
        replace(t, behaviour_logprobs=None).reweighted(w) for t, w in zip(given, weights, strict=True)
    ]
    other, expected = step_on(by_hand, weighted)
    assert torch.allclose(flat(found), flat(expected), rtol=1e-3, atol=1e-6)
    assert meter.step.denominator == other.step.denominator == 12
    row = meter.row(parts.models.device)
    ratios = torch.tensor(GAPS[:2]).exp()
    assert row["importance_ratio"] == pytest.approx(float(ratios.mean()), rel=1e-4)
    assert row["importance_capped"] == pytest.approx(capped)
    assert "importance_ratio" not in other.row(parts.models.device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_without_staleness_nothing_changes(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """On-policy ratios are 1 up to rounding, so that any cap from 1 on leaves the run as it was."""
    options = {"data__eval": {}, "optim__lr": 1e-2, "optim__eps": 1e-4}
    plain = train(tiny(**options, run__name="plain"), quiet=True).directory
    weighed = tiny(**options, run__name=kind, method__importance=kind, method__importance_cap=1.0)
    rows = [read_lines(run / "metrics.jsonl") for run in (plain, train(weighed, quiet=True).directory)]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["importance_ratio"] == pytest.approx(1, abs=1e-5)
    stale = train(tiny(**options, run__name="stale", rollout__overlap=True), quiet=True).directory
    last = read_lines(stale / "metrics.jsonl")[-1]
    assert last["staleness"] == 1
    assert abs(last["importance_ratio"] - 1) > 1e-4


@pytest.mark.parametrize("older", [{"rollout__overlap": True}, {"rollout__refresh": {"every": 2}}])
def test_tokens_of_older_weights_are_corrected_where_they_are_the_gradient(
    older: dict[str, Any], tiny: Tiny
) -> None:
    """Of a sampled divergence the ratio is what makes them the student's own; without it they are refused."""
    options = {**older, "method__divergence": "sampled", "data__eval": {}, "optim__lr": 1e-2}
    with pytest.raises(UserError, match=r"set method\.ppo_clip or method\.importance"):
        tiny(**options)
    run = train(tiny(**options, method__importance="token", optim__steps=2), quiet=True).directory
    rows = read_lines(run / "metrics.jsonl")
    assert rows[-1]["staleness"] == 1
    assert abs(rows[-1]["importance_ratio"] - 1) > 1e-4


def test_ratios_are_formed_under_autocast(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the head then multiplies as it does in the loss; on a CPU its numbers are the same."""
    seen = []

    def spy(**inputs: Any) -> TokenStats:
        seen.append(torch.is_autocast_enabled("cpu"))
        return token_stats(**inputs)

    monkeypatch.setattr(importance, "token_stats", spy)
    for half in (False, True):
        parts = assemble(tiny(method__importance="token", optim__bf16=half))
        step_on(parts, drawn(GAPS, parts))
    assert seen == [False, True]


def test_one_correction_is_enough(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"method\.importance: token and method\.ppo_clip both weigh"):
        tiny(method__divergence="sampled", method__ppo_clip=0.2, method__importance="token")


WRITTEN_BY_OTHERS = {
    "relay": {"method__delta": 0.5},
    "branch": {"method__failed_only": False},
    "bridge": {"method__distance": 0.0, "method__failed_only": False, "method__keep": "all"},
    "topd": {"method__plan": "spliced", "method__decide": "threshold", "method__threshold": 0.0},
}


@pytest.mark.parametrize("method", WRITTEN_BY_OTHERS)
def test_what_others_put_into_a_rollout_weighs_one(method: str, tiny: Tiny) -> None:
    """Nobody drew it from the student; of the student's tokens the weights have not moved."""
    options = {**WRITTEN_BY_OTHERS[method], "method__window": 6} if method in ("bridge", "topd") else {}
    options = options or WRITTEN_BY_OTHERS[method]
    parts = assemble(tiny(method__name=method, method__importance="token", data__eval={}, **options))
    made = prepare(parts, sample(parts, 0), 0).trajectories
    assert any(who != "student" for t in made for who in t.written_by)
    batch = collate([t for t in made if t.response])
    with torch.no_grad():
        hidden = parts.models.student_states(batch)
    weights = Importance(kind="token", cap=2.0).weights(batch, hidden, parts.models)
    assert torch.allclose(weights, torch.ones_like(weights), atol=1e-4)
    log_N = log_ratios(batch, torch.zeros(len(weights)))
    others = [who != "student" for t in batch.trajectories for who in t.written_by]
    assert log_N.isnan().tolist() == others


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_small_cap_leaves_what_others_wrote_alone(kind: str, tiny: Tiny) -> None:
    parts = assemble(tiny())
    batch = collate(drawn([[0.0] * 4, None], parts))
    with torch.no_grad():
        hidden = parts.models.student_states(batch)
    weights = Importance(kind=kind, cap=0.5).weights(batch, hidden, parts.models)
    assert weights.tolist() == [0.5] * 4 + [1.0] * 4


@pytest.mark.parametrize("cap", [0.9, 1.1, 100.0])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_ratios_are_those_of_float64(kind: str, cap: float, tiny: Tiny) -> None:
    """Of responses of 48 tokens, whose products of ratios are taken one factor after the other."""
    parts = assemble(tiny())
    double = copy.deepcopy(parts.models.student).double()
    drawing = torch.Generator().manual_seed(0)
    given, expected = [], []
    for place in range(6):
        context, response = (1, 5 + place, 9), tuple(torch.randint(4, 16, (48,), generator=drawing).tolist())
        with torch.no_grad():
            logits_TV = double(input_ids=torch.tensor([[*context, *response]])).logits[0]
        assert logits_TV.dtype == torch.float64
        now = logits_TV.log_softmax(-1)[2:-1].gather(1, torch.tensor(response)[:, None])[:, 0]
        then = now + 0.1 * torch.randn(48, generator=drawing, dtype=torch.float64)
        ratios = (now.exp() / then.exp()).tolist()
        expected += [min(r, cap) for r in (ratios if kind == "token" else [math.prod(ratios)] * 48)]
        t = Trajectory(student_context=context, teacher_context=context, response=response, place=place)
        given.append(replace(t, behaviour_logprobs=tuple(then.tolist())))
    assert cap == 100.0 or min(expected) < cap == max(expected)
    batch = collate(given)
    with torch.no_grad():
        hidden = parts.models.student_states(batch)
    weights = Importance(kind=kind, cap=cap).weights(batch, hidden, parts.models)
    torch.testing.assert_close(weights.double(), torch.tensor(expected).double(), rtol=2e-5, atol=0)


def test_ends_that_are_one_leave_the_measured_ratio_alone(tiny: Tiny) -> None:
    """What was drawn is one of them, and what is known is the log-prob of all."""
    for ends in ("apart", "one"):
        parts = assemble(tiny(method__ends=ends, rollout__stop_ids=[5, 7, 9, 11]))
        assert len(parts.stops.ids) > 1
        made = prepare(parts, sample(parts, 0), 0)
        assert any(t.response[-1] in parts.stops.ids for t in made.trajectories)
        meter, _ = step_on(parts, made.trajectories)
        assert meter.row(parts.models.device)["importance_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ends", ["apart", "one"])
def test_a_stop_token_s_ratio_is_in_its_response_s_product(ends: str, tiny: Tiny) -> None:
    """It is in the weights', whatever the divergence makes of stop tokens."""
    options = {"method__ends": ends, "method__importance": "sequence", "rollout__stop_ids": [7, 9, 11]}
    parts = assemble(tiny(**options))
    assert {7, 9} < parts.stops.ids
    meter, _ = step_on(parts, drawn([[0.1, -0.1, 0.1, 3.0]], parts))  # the last of 4, 5, 6, 7
    assert meter.row(parts.models.device)["importance_capped"] == 1
