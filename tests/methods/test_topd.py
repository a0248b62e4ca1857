"""TOPD: a worked example by hand, every option, and what must not matter: batches, caches, ranks."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onpath import config as configuration
from onpath.config.methods.topd import TOPDOptions
from onpath.config.whole import Config
from onpath.data.batch import collate, micro_batches
from onpath.engines.forward import Graph, Kept, forward, student_key
from onpath.losses import Head, Objective, TeacherHidden, fused_objective
from onpath.methods import make_method
from onpath.methods.base import Prepared, own_response
from onpath.methods.topd import guide, pairs
from onpath.methods.topd.candidates import Fork, candidate_counts, reference_counts
from onpath.methods.topd.futures import teacher_futures, until_stop
from onpath.methods.topd.method import TOPD
from onpath.records import Completion, Guidance, Prompt, Rollout, Sampling, Trajectory, token_count
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.loss import Step, sparse_guidance
from onpath.run.parts import Parts
from onpath.run.weights import shaped
from onpath.system.errors import UserError
from onpath.training import sample, train
from onpath.transport.plans import window_divergence
from tests.forks import done_by_two
from tests.methods.family import logps_along
from tests.stepping import step_on
from tests.stored import read_trajectories

Tiny = Callable[..., Config]
CPU = torch.device("cpu")


def of_method(options: dict[str, Any]) -> dict[str, Any]:
    """As the keywords of `tiny`."""
    return {f"method__{key}": value for key, value in options.items()}


@pytest.fixture
def topd(tiny: Tiny) -> Callable[..., Parts]:
    """Parts of a TOPD run over the tiny models; keyword options of the method."""

    def build(**method: Any) -> Parts:
        section = {"name": "topd", "window": 6, "top_share": 0.1, **method}
        return assemble(tiny(**of_method(section), rollout__max_new_tokens=20))

    return build


def prepared(parts: Parts, step: int = 0) -> Prepared:
    return parts.method.prepare(sample(parts, step), step=step)


def found_in(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    return [f for t in trajectories for f in t.edit.detail.get("forks", [])]


def essence(done: Prepared) -> list[Any]:
    """Everything that training depends on."""

    def row(t: Trajectory) -> Any:
        targets = [(g.start, [dict(target) for target in g.targets]) for g in t.guidance]
        known = ("position", "decision", "distance", "teacher_window")
        return t.response, t.token_weights, targets, [[f[k] for k in known] for f in found_in([t])]

    order = sorted(done.trajectories, key=lambda t: (t.origin is None, t.student_context, t.response))
    return [row(t) for t in order]


def same(a: Any, b: Any) -> None:
    """Equal but for the last digits."""
    if isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    elif isinstance(a, dict):
        same(sorted(a.items()), sorted(b.items()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


# The worked example: S = (0 1), T = (1 2), e0 ⟂ e1, e2 between them.
EMBEDDING = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [-1.0, 0.5]])
COST = [[1.0, 1 - 0.5**0.5], [0.0, 1 - 0.5**0.5]]
SHARE = exp(-1.0) / (1 + exp(-1.0))  # of the diagonal, at ε = 1/2: a/(½−a) = exp(−(c00+c11−c01−c10)/2ε)


def test_a_window_ends_with_the_stop_string_that_began_before_it(topd: Callable[..., Parts]) -> None:
    parts = topd()
    token = parts.text.renderer.text_ids
    before, window = token("so 1"), token("3 14")
    assert until_stop(before, window, parts.tools) == (window, False)
    parts.generators.student.stop_strings = ("13",)
    assert until_stop(before, window, parts.tools) == (window[:1], True)


def test_worked_example_distance_plan_and_targets() -> None:
    ids = {"student_ids": torch.tensor([0, 1]), "teacher_ids": torch.tensor([1, 2]), "embedding": EMBEDDING}
    distance, plan = window_divergence(**ids)
    assert distance.item() == pytest.approx((COST[0][1] + COST[1][0]) / 2)  # 0 ↔ 2, 1 ↔ 1: 0.1464
    assert plan.tolist() == [[0.0, 0.5], [0.5, 0.0]]
    _, smooth = window_divergence(**ids, epsilon=0.5)
    assert smooth.tolist() == [pytest.approx([SHARE / 2, (1 - SHARE) / 2], abs=1e-5),
                               pytest.approx([(1 - SHARE) / 2, SHARE / 2], abs=1e-5)]  # fmt: skip
    fork = Fork(row=0, position=1, loss=1.0, gap=0.0, draw=0.5, student=(0, 1), teacher=(1, 2))
    (guidance,) = guide.guidance_of([fork], [smooth.double().numpy()], [3], TOPDOptions(mass="row"))[0]
    assert guidance.start == 1
    assert guidance.targets[0] == pytest.approx({1: 0.26894, 2: 0.73106}, abs=1e-4)
    assert guidance.targets[1] == pytest.approx({1: 0.73106, 2: 0.26894}, abs=1e-4)


@pytest.mark.parametrize(("mass", "strength", "expected"), [("row", 2.0, 1.07209), ("literal", 1.0, None)])
def test_worked_example_loss(mass: Any, strength: float, expected: float | None) -> None:
    """A uniform student over four tokens, three response tokens, two of them guided; L_OPD is 0."""
    plan = np.array([[SHARE / 2, (1 - SHARE) / 2], [(1 - SHARE) / 2, SHARE / 2]])
    fork = Fork(row=0, position=1, loss=1.0, gap=0.0, draw=0.5, student=(0, 1), teacher=(1, 2))
    guidance = guide.guidance_of([fork], [plan], [3], TOPDOptions(mass=mass))[0]
    trajectory = Trajectory(
        student_context=(1,),
        teacher_context=(1,),
        response=(3, 0, 1),
        guidance=guidance,
        weights=(1.0, 0.5, 1.0),
    )
    batch = collate([trajectory])
    uniform = torch.zeros(3, 2)
    head = Head(weight=EMBEDDING)
    result = fused_objective(
        student_hidden=uniform, student_head=head, teacher=TeacherHidden(hidden=uniform, head=head),
        objective=Objective(kind="reverse_kl"), weights=batch.weight_N, denominator=token_count([trajectory]),
        sampled_ids=batch.token_N, guidance=sparse_guidance(batch, strength=strength),
    )  # fmt: skip
    entropy = -SHARE * log(SHARE) - (1 - SHARE) * log(1 - SHARE)
    row = 2 * (log(4) - entropy)  # two rows
    by_hand = {"row": 2.0 * row / 3, "literal": 0.5 * (row + 2 * log(0.5)) / 3}[
        mass
    ]  # three tokens, one capped
    assert result.loss.item() == pytest.approx(by_hand, abs=1e-5)
    if expected is not None:
        assert by_hand == pytest.approx(expected, abs=1e-4)


def test_a_step_against_a_plain_recomputation(topd: Callable[..., Parts]) -> None:
    """ℓ from full logits, windows from `generate`, D by trying all assignments' optimum with scipy."""
    from scipy.optimize import linear_sum_assignment

    parts = topd(decide="quantile", drop_share=0.0, top_share=0.05)
    rollouts = sample(parts, 0)
    done = parts.method.prepare(rollouts, step=0)
    table = torch.nn.functional.normalize(parts.models.student.get_input_embeddings().weight.detach(), dim=-1)
    teacher: Any = parts.models.teacher
    compared = 0
    for r, t in zip(rollouts, done.trajectories, strict=True):
        ids = torch.tensor([r.context + r.ids])
        span = slice(len(r.context) - 1, len(r.context) + len(r.ids) - 1)
        with torch.no_grad():
            s, q = (
                m(input_ids=ids).logits[0, span].log_softmax(-1)
                for m in (parts.models.student, teacher.model)
            )
        kl = (s.exp() * (s - q)).sum(-1)
        (fork,) = found_in([t])
        assert fork["position"] == int(kl.argmax())
        assert fork["loss"] == pytest.approx(float(kl.max()), rel=1e-4)
        prefix = torch.tensor([r.context + r.ids[: fork["position"]]])
        mask = torch.ones_like(prefix)
        written = teacher.model.generate(
            input_ids=prefix, attention_mask=mask, max_new_tokens=6, do_sample=False
        )
        window = written[0, prefix.shape[1] :].tolist()
        if r.finish_reason == "length":
            window = window[: len(r.ids) - fork["position"]]
        assert fork["teacher_window"] == window
        assert fork["student_window"] == list(r.ids[fork["position"] :][:6])
        if len(window) == len(fork["student_window"]):
            cost = (1 - table[fork["student_window"]] @ table[window].T).numpy()
            assert fork["distance"] == pytest.approx(cost[linear_sum_assignment(cost)].mean(), abs=1e-5)
            compared += 1
    assert compared >= 3


def test_forks_guide_the_rows_from_their_position_on(topd: Callable[..., Parts]) -> None:
    done = prepared(topd(decide="all_high_loss"))
    for t in done.trajectories:
        guided = {g.start + i for g in t.guidance for i in range(len(g.targets))}
        expected = {
            f["position"] + i for f in found_in([t]) for i in range(6) if f["position"] + i < len(t.response)
        }
        assert guided == expected
        for g in t.guidance:
            for i, row in enumerate(g.targets, start=g.start):
                here = [f for f in found_in([t]) if 0 <= i - f["position"] < len(f["student_window"])]
                literal = sum(1 / len(f["student_window"]) for f in here)
                assert sum(row.values()) == pytest.approx(literal, rel=5e-3)  # Sinkhorn's tolerance
            allowed = {i for f in found_in([t]) for i in f["teacher_window"]}
            assert all(set(row) <= allowed for row in g.targets)


CHANGES: list[dict[str, Any]] = [
    {"candidates": "teacher_nll"},
    {"candidates": "sampled_gap"},
    {"top_share": 0.2},
    {"min_gap": 4, "top_share": 0.3},
    {"max_per_rollout": 1},
    {"max_per_step": 24, "top_share": 0.3},
    {"window": 3},
    {"window_temperature": 1.0},
    {"student_window": "regenerate"},
    {"embedding": "teacher"},
    {"embedding": "student_layer"},
    {"embedding": "student_layer", "embedding_layer": 1},
    {"decide": "threshold", "threshold": 0.97},
    {"decide": "quantile"},
    {"decide": "sampled_gap"},
    {"decide": "random_positions"},
    {"decide": "all_high_loss"},
    {"decide": "quantile", "drop_share": 0.7},
    {"plan": "shuffled"},
    {"plan": "positional"},
    {"plan": "teacher_window_ce"},
    {"epsilon": 0.5},
    {"mass": "row"},
    {"overlap": "average", "top_share": 0.3},
    {"overlap": "suppress", "top_share": 0.3},
    {"plan": "spliced"},
    {"plan": "spliced", "splice": "end"},
    {"references": 2},
    {"guide": False, "suppress": "low"},
    {"guide": False, "suppress": "high"},
    {"suppress": "low"},
    {"first_tokens": 9},
]


def test_every_option_changes_what_is_trained_on(topd: Callable[..., Parts]) -> None:
    base = topd()
    rollouts = sample(base, 0)
    outcomes = [essence(base.method.prepare(rollouts, step=0))]
    for change in CHANGES:
        method = TOPDOptions(**{"window": 6, "top_share": 0.1, **change})
        outcomes.append(essence(make_method(method, base.tools).prepare(rollouts, step=0)))
    seen: dict[str, Any] = {}
    for change, outcome in zip([{}, *CHANGES], outcomes, strict=True):
        assert seen.setdefault(repr(outcome), change) is change


@pytest.mark.parametrize("change", [{"window_temperature": 0.7}, {"student_window": "regenerate"}])
def test_what_is_drawn_is_drawn_by_seed_and_step(change: Any, topd: Callable[..., Parts]) -> None:
    parts = topd(**change)
    rollouts = sample(parts, 0)
    first, again, later = (
        essence(make_method(parts.config.method, parts.tools).prepare(rollouts, step=step))
        for step in (0, 0, 1)
    )
    assert first == again
    assert first != later


def test_guidance_is_as_long_as_the_rollouts_window(topd: Callable[..., Parts]) -> None:
    """Whatever the fresh sample's length, which only the distance sees; and what is stored beside a plan are
    the tokens that its rows are."""
    parts = topd(decide="quantile", student_window="regenerate", window=8, top_share=1.0)
    rollouts, tokens = sample(parts, 0), parts.text.renderer.tokens
    made = parts.method.prepare(rollouts, step=0).trajectories
    shorter = 0
    for r, t in zip(rollouts, made, strict=True):
        guided = {g.start + i for g in t.guidance for i in range(len(g.targets))}
        expected: set[int] = set()
        for fork in t.edit.detail.get("forks", []):
            if fork["decision"] == "fork":
                own = r.ids[fork["position"] :][:8]
                shorter += len(fork.get("regenerated_text", "".join(tokens(own)))) < len("".join(tokens(own)))
                assert fork["student_window"] == list(own)
                assert all(fork["student_tokens"][int(i)] == tokens(own)[int(i)] for i, _, _ in fork["plan"])
                expected |= set(range(fork["position"], fork["position"] + len(own)))
        assert guided == expected
    assert shorter, "a fresh sample ends earlier"


def test_a_layer_that_the_student_lacks_is_refused_at_the_start(topd: Callable[..., Parts]) -> None:
    topd(embedding_layer=99)  # nothing reads it
    for layer in (2, -3):
        parts = topd(embedding="student_layer", embedding_layer=layer)
        parts.method.prepare(sample(parts, 0), step=0)
    for layer in (3, -4, 99):
        with pytest.raises(UserError, match=f"embedding_layer is {layer}; .* states 0 to 2, or -3 to -1"):
            topd(embedding="student_layer", embedding_layer=layer)


def test_distances_are_taken_without_dropout(
    topd: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = topd(embedding="student_layer")
    seen = []
    real = pairs.decoder_of
    monkeypatch.setattr(pairs, "decoder_of", lambda model: seen.append(model.training) or real(model))
    parts.models.student.train()
    parts.method.prepare(sample(parts, 0), step=0)
    assert seen
    assert not any(seen)


def test_neither_cache_nor_batches_matter(topd: Callable[..., Parts]) -> None:
    parts = topd()
    rollouts = sample(parts, 0)
    whole = essence(parts.method.prepare(rollouts, step=0))
    for reuse in (True, False):
        for max_tokens in (40, 110, 16_384):
            tools = replace(parts.tools, models=replace(parts.models, max_tokens=max_tokens))
            method = make_method(parts.config.method.model_copy(update={"reuse_cache": reuse}), tools)
            same(essence(method.prepare(rollouts, step=0)), whole)


@pytest.mark.parametrize("busy", [2048, 1], ids=["one pass", "a pass per length"])
def test_branches_write_what_a_fresh_prefix_would(
    busy: int, topd: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, several places per row, several passes into one cache, windows that end early."""
    monkeypatch.setattr("onpath.data.batch._BUSY_TOKENS", busy)
    parts = topd()
    rollouts = sample(parts, 0)
    places = [
        Fork(row=row, position=t, loss=0, gap=0, draw=0)
        for row, r in enumerate(rollouts) for t in range(0, len(r.ids), 2 + row % 3)
    ]  # fmt: skip
    keys = [f"{f.row}/{f.position}" for f in places]
    passes: list[int] = []
    for max_tokens in (16_384, 64):
        models = replace(parts.tools.models, max_tokens=max_tokens)
        for temperature in (0.0, 1.0):
            sampling = Sampling(temperature=temperature, max_new_tokens=30, seed=3)
            for one in forward(models, [own_response(r) for r in rollouts], past=True):
                passes.append(len(one.batches))
                here = [t.place for t in one.trajectories]
                mine = [i for i, f in enumerate(places) if f.row in here]
                args = ([places[i] for i in mine], rollouts, parts.tools, sampling, [keys[i] for i in mine])
                ours, plain = teacher_futures(*args, one), teacher_futures(*args, None)
                assert [c.ids for c in ours] == [c.ids for c in plain]
                assert [c.finish_reason for c in ours] == [c.finish_reason for c in plain]
                for a, b in zip(ours, plain, strict=True):
                    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert (max(passes) > 1) is (busy == 1)


def test_the_loss_reads_nothing_twice(topd: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass of each model per step, and the same loss and gradients as with passes of its own."""
    from onpath.run.loss import loss_of, teacher_states

    parts = topd()
    done = prepared(parts)
    gradients = []
    for kept in (done.kept, Kept()):
        total = 0.0
        for micro in micro_batches(done.trajectories, max_tokens=16_384, device=CPU):
            batch = collate(micro)
            known = replace(done, kept=kept)
            result = loss_of(
                parts.models,
                batch,
                teacher_states(parts.models, batch, known),
                whole_step(parts, known, 100.0),
            )
            result.loss.backward()
            total += result.loss.item()
        gradients.append(
            (total, [p.grad.clone() for p in parts.models.student.parameters() if p.grad is not None])
        )
        parts.models.student.zero_grad()
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert done.kept.student == []  # handed over, once
    calls = {"student": 0, "teacher": 0}
    for name, model in (("student", parts.models.student), ("teacher", parts.tools.models.teacher.model)):
        decoder = model.get_decoder()
        count = lambda *_, who=name: calls.__setitem__(who, calls[who] + 1)  # noqa: E731
        decoder.register_forward_hook(count)
    rollouts = sample(parts, 0)
    calls |= {"student": 0, "teacher": 0}
    monkeypatch.setattr(
        "onpath.methods.topd.futures.teacher_futures", lambda found, *_: [_silence()] * len(found)
    )
    again = parts.method.prepare(rollouts, step=0)
    (batch,) = (collate(m) for m in micro_batches(again.trajectories, max_tokens=16_384, device=CPU))
    teacher = teacher_states(parts.models, batch, again)
    loss_of(parts.models, batch, teacher, whole_step(parts, again, 100.0))
    assert calls == {"student": 1, "teacher": 1}


def whole_step(parts: Parts, done: Prepared, denominator: float) -> Step:
    """As the story makes it."""
    guided = any(t.guidance for t in done.trajectories)
    return Step(prepared=done, objective=parts.objective, denominator=denominator, guided=guided)


def _silence() -> Completion:
    return Completion(ids=(2,), logprobs=(0.0,), finish_reason="stop")


def test_kept_states_give_each_graph_once() -> None:
    def trajectory(token: int) -> Trajectory:
        return Trajectory(student_context=(1,), teacher_context=(1,), response=(token,))

    rows = {student_key(trajectory(t)): torch.full((1, 2), float(t)) for t in (3, 4, 5)}
    split = [
        {k: v for k, v in rows.items() if last is (k == student_key(trajectory(5)))} for last in (False, True)
    ]
    kept = Kept(student=[Graph(rows=part, tokens=len(part)) for part in split])
    assert kept.student_hidden(collate([trajectory(3), trajectory(9)])) is None
    found = kept.student_hidden(collate([trajectory(4)]))
    assert found is not None
    assert found.tolist() == [[4.0, 4.0]]
    assert kept.student_hidden(collate([trajectory(3)])) is None  # its graph went with 4's
    assert kept.student_hidden(collate([trajectory(5)])) is not None


def test_suppressed_weights_scale_the_loss_and_not_the_count(topd: Callable[..., Parts]) -> None:
    done = prepared(topd(suppress="low", top_share=0.2))
    lowered = [(f["weight"], f["decision"]) for f in found_in(done.trajectories) if f["weight"] < 1]
    assert lowered
    assert {decision for _, decision in lowered} == {"surface"}
    assert token_count(done.trajectories) == sum(len(t.response) for t in done.trajectories)
    for t in done.trajectories:
        for f in found_in([t]):
            assert t.token_weights[f["position"]] == f["weight"]


def test_teacher_window_ce_is_spliced_after_the_prefix(topd: Callable[..., Parts]) -> None:
    parts = topd(plan="teacher_window_ce")
    done = prepared(parts)
    extra = [t for t in done.trajectories if t.edit.kind == "teacher_window"]
    real = [f for f in found_in(done.trajectories) if f["decision"] == "fork"]
    assert len(extra) == len(real) > 0
    for t in extra:
        position = t.edit.detail["position"]
        assert t.origin is not None
        assert t.student_context == t.origin.context + t.origin.ids[:position]
        assert set(t.token_weights) == {0.0}
        assert [dict(row) for row in t.guidance[0].targets] == [{i: 1.0} for i in t.response]
    assert token_count(done.trajectories) == sum(len(t.response) for t in done.trajectories if t not in extra)
    batch = collate(extra)
    with torch.no_grad():
        logits = parts.models.student(input_ids=batch.student_ids_BS).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[batch.student_at_N], batch.token_N, reduction="sum"
        )
    from onpath.run.loss import loss_of, teacher_states

    teacher = teacher_states(parts.models, batch, done)
    result = loss_of(parts.models, batch, teacher, whole_step(parts, done, 10.0))
    assert result.loss.item() == pytest.approx(nll.item() / 10, rel=1e-5)


@pytest.mark.parametrize("splice", ["window", "end"])
def test_spliced_is_the_objective_along_the_teachers_window(splice: str, topd: Callable[..., Parts]) -> None:
    """An extra trajectory y_<t + window, scored by the teacher there; one count over all tokens; no guidance.
    Against full logits, one row at a time."""
    parts = topd(plan="spliced", splice=splice)
    done = prepared(parts)
    extra = [t for t in done.trajectories if t.edit.kind == "teacher_window"]
    real = [f for f in found_in(done.trajectories) if f["decision"] == "fork"]
    assert len(extra) == len(real) > 0
    assert not any(t.guidance for t in done.trajectories)
    longer = 0
    for t, f in zip(extra, real, strict=True):
        assert t.origin is not None
        assert t.student_context == t.teacher_context == t.origin.prefix(f["position"])
        window = tuple(f["teacher_window"])
        assert t.response[: len(window)] == window
        assert set(t.written_by) == {"teacher"}
        if len(t.response) > len(window):
            longer += 1
            ended = f["position"] + len(t.response) == parts.sampling.max_new_tokens
            assert ended or t.response[-1] in parts.stops.ids
            likeliest = logps_along(parts.models.teacher.model, t).argmax(-1)
            assert t.response == tuple(likeliest.tolist()), "greedy"
    assert bool(longer) is (splice == "end")
    meter, _ = step_on(parts, shaped(parts, done).trajectories)
    total, count = 0.0, 0
    for t in done.trajectories:
        s, q = (logps_along(m, t) for m in (parts.models.student, parts.models.teacher.model))
        total += float((s.exp() * (s - q)).sum())
        count += len(t.response)
    row = meter.row(parts.models.device)
    assert row["tokens"] == count
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)
    assert row["tokens_written_by"]["teacher"] == sum(len(t.response) for t in extra)


def test_targets_that_meet_are_summed() -> None:
    """By the formula's letter: the gradient of a sum of KLs is that of the summed target."""
    forks = [
        Fork(row=0, position=p, loss=1.0, gap=0.0, draw=0.5, student=(0, 1), teacher=(1, 2)) for p in (0, 1)
    ]
    plans = [np.array([[0.1, 0.4], [0.3, 0.2]]), np.array([[0.25, 0.25], [0.5, 0.0]])]
    (g,) = guide.guidance_of(forks, plans, [3], TOPDOptions())[0]
    assert [dict(t) for t in g.targets] == [
        pytest.approx({1: 0.1, 2: 0.4}), pytest.approx({1: 0.55, 2: 0.45}), pytest.approx({1: 0.5}),
    ]  # fmt: skip
    (mean,) = guide.guidance_of(forks, plans, [3], TOPDOptions(overlap="average"))[0]
    assert dict(mean.targets[1]) == pytest.approx({1: 0.275, 2: 0.225})
    z = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    parts = torch.tensor([[0.0, 0.3, 0.2, 0.0], [0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    separate = (torch.special.xlogy(parts, parts) - parts * z.log_softmax(-1)).sum()
    (wanted,) = torch.autograd.grad(separate, z)
    hidden, head = z.detach()[None], Head(weight=torch.eye(4, dtype=torch.float64))
    found = hidden.clone().requires_grad_()
    batch = collate([Trajectory(student_context=(1,), teacher_context=(1,), response=(0,), guidance=(
        Guidance(start=0, targets=({1: 0.55, 2: 0.45},)),
    ))])  # fmt: skip
    fused_objective(
        student_hidden=found, student_head=head, teacher=TeacherHidden(hidden=hidden, head=head),
        objective=Objective(kind="reverse_kl"), weights=batch.weight_N, denominator=1.0,
        guidance=sparse_guidance(batch, strength=1.0),
    ).loss.backward()  # fmt: skip
    assert found.grad is not None
    torch.testing.assert_close(found.grad[0], wanted, rtol=1e-6, atol=1e-7)


def test_a_served_teacher_has_no_embeddings(tiny: Callable[..., Config]) -> None:
    """Said before a model is loaded, not in the first step."""
    options = {"method__name": "topd", "method__embedding": "teacher", "method__support": "teacher_topk"}
    with pytest.raises(UserError, match=r"teacher\.engine is vllm; use student"):
        tiny(**options, teacher__engine="vllm", teacher__url="http://localhost:1")


def test_what_predicts_harm_is_measured(topd: Callable[..., Parts]) -> None:
    """Against full logits: the share of each target on the teacher's likeliest token where the student is."""
    parts = topd(top_share=0.2)
    done = prepared(parts)
    on_teacher, own, entropy = [], [], []
    for t in done.trajectories:
        likeliest = logps_along(parts.models.teacher.model, t).argmax(-1).tolist()
        for g in t.guidance:
            for i, target in enumerate(g.targets, start=g.start):
                p = {v: m / sum(target.values()) for v, m in target.items()}
                on_teacher.append(p.get(likeliest[i], 0.0))
                own.append(p.get(t.response[i], 0.0))
                entropy.append(-sum(x * log(x) for x in p.values()))
    means = {k: total / count for k, (total, count) in done.means.items() if count}
    assert means["target_teacher_share"] == pytest.approx(np.mean(on_teacher))
    assert means["target_own_share"] == pytest.approx(np.mean(own))
    assert means["target_entropy_nats"] == pytest.approx(np.mean(entropy))
    assert 0 < means["target_teacher_share"] < 1
    assert means["target_own_share"] != means["target_teacher_share"]


def test_few_references_tell_the_papers_rule(topd: Callable[..., Parts]) -> None:
    parts = topd(decide="upper_quartile_of_low_loss", references=3)
    rollouts = sample(parts, 0)
    for step in (0, 1):
        found = found_in(parts.method.prepare(rollouts, step=step).trajectories)
        assert sum(f["decision"] == "reference" for f in found) == 3
    found = found_in(prepared(topd(decide="upper_quartile_of_low_loss", references=None)).trajectories)
    references = sum(f["decision"] == "reference" for f in found)
    assert references == len(found) - references > 3


@pytest.mark.parametrize(
    ("lengths", "wanted"), [([40] * 64, 4), ([40] * 65, 5), ([40] * 8, 4), ([4], 1), ([8000] * 64, 16)]
)
def test_references_are_few_where_candidates_are(lengths: list[int], wanted: int) -> None:
    options = TOPDOptions()
    counts, keys = candidate_counts(lengths, options), [f"r{i}" for i in range(len(lengths))]
    assert sum(reference_counts(counts, keys, options, seed=0)) == wanted


@pytest.mark.parametrize(
    ("options", "warned"), [({}, False), ({"mass": "row"}, True), ({"mass": "row", "plan": "spliced"}, False)]
)
def test_row_mass_is_warned_of(options: Any, warned: bool, topd: Callable[..., Parts]) -> None:
    warnings = topd(**options).warnings
    said = [w for w in warnings if "method.mass: row" in w]
    assert len(said) == warned
    assert not warned or "literal" in said[0]
    assert sum("method.mass has no effect" in w for w in warnings) == ("plan" in options)


def test_first_tokens_cut_candidates_and_guidance(topd: Callable[..., Parts]) -> None:
    done = prepared(topd(first_tokens=8, top_share=0.3))
    for t in done.trajectories:
        assert len(t.response) <= 8
        assert all(f["position"] < 8 for f in found_in([t]))
    assert any(len(f["student_window"]) == 6 for f in found_in(done.trajectories) if f["position"] > 3)


def test_the_moving_quantile_and_the_auto_weight(topd: Callable[..., Parts]) -> None:
    method = topd(guidance_weight="auto", quantile_decay=0.5).method
    assert isinstance(method, TOPD)
    method.follow(0.4)
    assert float(method.threshold) == pytest.approx(0.4)  # nothing before it
    method.follow(0.8)
    assert float(method.threshold) == pytest.approx(0.6)
    method.follow(None)
    method.after_step({"guidance_grad_ratio": 1.0})
    assert float(method.guidance_weight) == pytest.approx(0.5)
    method.after_step({"guidance_grad_ratio": 0.01})  # at most four times as much in one step
    assert float(method.guidance_weight) == pytest.approx(2.0)
    method.after_step({})
    assert float(method.guidance_weight) == pytest.approx(2.0)


def test_the_ratio_is_that_of_the_gradients_of_the_weights(topd: Callable[..., Parts]) -> None:
    """By the model's own logits in float64, parameter by parameter; split into micro-batches or not."""
    parts = topd(guidance_weight=2.0)
    done = shaped(parts, prepared(parts))
    student, teacher = (copy.deepcopy(m).double() for m in (parts.models.student, parts.models.teacher.model))
    kl, guided, count = 0.0, 0.0, token_count(done.trajectories)
    for t in done.trajectories:
        ids = torch.tensor([[*t.student_context, *t.response]])
        at = slice(len(t.student_context) - 1, ids.shape[1] - 1)
        ours = student(input_ids=ids).logits[0, at].log_softmax(-1)
        theirs = teacher(input_ids=ids).logits[0, at].detach().log_softmax(-1)
        kl = kl + (ours.exp() * (ours - theirs)).sum() / count
        for g in t.guidance:
            for i, target in enumerate(g.targets):
                guided = guided - 2.0 * sum(p * ours[g.start + i, v] for v, p in target.items()) / count
    norms = []
    for value in (guided, kl):
        found = torch.autograd.grad(value, list(student.parameters()), retain_graph=True)
        norms.append(sum(float(g.square().sum()) for g in found) ** 0.5)
    for budget in (10_000, 60):
        meter, gradients = step_on(parts, done.trajectories, micro_batch_tokens=budget, guidance_weight=2.0)
        row = meter.row(parts.models.device)
        assert row["guidance_grad_ratio"] == pytest.approx(norms[0] / norms[1], rel=1e-4)
        whole = torch.autograd.grad(guided + kl, list(student.parameters()), retain_graph=True)
        size = sum(float(g.square().sum()) for g in whole) ** 0.5
        assert row["grad_norm"] == pytest.approx(size, rel=1e-4), "measuring changes nothing"
        assert gradients


def test_the_ratio_is_measured_when_it_is_due(tiny: Tiny) -> None:
    method = {"name": "topd", "window": 6, "top_share": 0.1, "decide": "quantile", "ratio_every": 2}
    rows = read_lines(
        train(tiny(**of_method(method), optim__steps=3), quiet=True).directory / "metrics.jsonl"
    )
    assert ["guidance_grad_ratio" in r for r in rows] == [True, False, True]
    assert all("guidance" in r for r in rows)
    with pytest.raises(UserError, match="ratio_every: 0"):
        configuration.build({"method": {**method, "ratio_every": 0, "guidance_weight": "auto"}})


def test_a_cap_is_counted(topd: Callable[..., Parts]) -> None:
    free, capped = (prepared(topd(top_share=0.5, max_per_step=cap)) for cap in (None, 8))
    assert free.totals["fork_candidates_dropped"] == 0
    assert capped.totals["fork_candidates"] <= 8
    both = [d.totals["fork_candidates"] + d.totals["fork_candidates_dropped"] for d in (free, capped)]
    assert both[0] == both[1]


def test_draws_depend_on_seed_and_step_apart(topd: Callable[..., Parts]) -> None:
    """Seed 1 at step 3 shares no noise with seed 0 at step 4."""
    parts = topd(decide="random_positions", window_temperature=1.0)
    rollouts = sample(parts, 0)

    def drawn(seed: int, step: int) -> list[Any]:
        tools = replace(parts.tools, sampling=replace(parts.sampling, seed=seed))
        done = TOPD(parts.method.options, tools).prepare(rollouts, step=step)
        return [(f["position"], f["teacher_window"]) for f in found_in(done.trajectories)]

    assert drawn(0, 4) == drawn(0, 4)
    assert len({str(drawn(*place)) for place in ((0, 4), (1, 3), (2, 2), (0, 3))}) == 4


def test_auto_holds_the_ratio_of_gradients(tiny: Tiny) -> None:
    method = {"name": "topd", "window": 6, "guidance_weight": "auto", "auto_ratio": 0.25, "top_share": 0.1}
    method |= {"mass": "row"}  # far enough from the target at first
    config = tiny(**of_method(method), optim__steps=6, run__name="auto")
    rows = read_lines(train(config, quiet=True).directory / "metrics.jsonl")
    assert rows[0]["guidance_weight"] == 1.0
    assert rows[0]["guidance_grad_ratio"] > 0.5
    assert np.mean([r["guidance_grad_ratio"] for r in rows[2:]]) == pytest.approx(0.25, rel=0.35)


def test_a_resumed_run_is_the_same_run(tiny: Tiny, tmp_path: Path) -> None:
    """The moving quantile and λ are in the checkpoint."""
    method = {"name": "topd", "window": 6, "guidance_weight": "auto", "top_share": 0.1}
    options = {**of_method(method), "run__save_every": 2, "optim__schedule": "constant"}
    whole = train(tiny(**options, optim__steps=4, run__name="whole"), quiet=True)
    half = train(tiny(**options, optim__steps=2, run__name="half"), quiet=True)
    (half.directory / "config.yaml").unlink()
    import shutil

    shutil.rmtree(half.model)
    rest = train(tiny(**options, optim__steps=4, run__name="half"), quiet=True)
    ignored = ("seconds", "topd_seconds", "lr")
    rows = [
        [{k: v for k, v in row.items() if k not in ignored} for row in read_lines(d / "metrics.jsonl")]
        for d in (whole.directory, rest.directory)
    ]
    assert rows[0] == rows[1]


def test_forks_are_stored_and_metrics_logged(tiny: Tiny) -> None:
    method = of_method({"name": "topd", "window": 6, "top_share": 0.1})
    config = tiny(**method, optim__steps=1, run__trajectories_every=1)
    done = train(config, quiet=True)
    (row,) = read_lines(done.directory / "metrics.jsonl")
    stored = read_trajectories(done.directory)
    found = [f for r in stored for f in json.loads(r["detail"]).get("forks", [])]
    looked_at = [f for f in found if f["decision"] != "reference"]
    assert len(found) > len(looked_at) == row["fork_candidates"] > 0
    assert sum(f["decision"] == "fork" for f in found) == row["forks"]
    assert row["fork_share"] == pytest.approx(row["forks"] / row["fork_candidates"])
    assert row["candidate_distance"] == pytest.approx(np.mean([f["distance"] for f in looked_at]))
    assert 0 < sum(len(f["teacher_window"]) for f in found) <= row["teacher_tokens_generated"], (
        "before the cut"
    )
    assert row["guidance_grad_ratio"] > 0
    assert row["guidance"] > 0
    assert set(row["topd_seconds"]) == {"read", "windows", "transport", "targets"}
    kept = [f for f in found if f["decision"] == "fork"]
    assert all(f["plan"] for f in kept)
    assert all("".join(f["teacher_tokens"]) == f["teacher_text"] for f in kept)


@pytest.mark.slow
def test_two_processes_are_one(tiny: Tiny, tmp_path: Path) -> None:
    method = {"name": "topd", "window": 6, "guidance_weight": "auto", "suppress": "high", "top_share": 0.1}
    options = {**of_method(method), "rollout__prompts": 5, "optim__steps": 2}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    config = tiny(**options, run__name="two")
    done_by_two(lambda _: train(config, quiet=True), tmp_path)
    names = (
        "loss", "tokens", "grad_norm", "forks", "fork_candidates", "candidate_distance", "fork_threshold",
        "guidance", "guidance_grad_ratio", "guidance_weight", "suppressed_tokens", "teacher_tokens_generated",
    )  # fmt: skip
    rows = [read_lines(d / "metrics.jsonl") for d in (one, Path(config.run.dir) / "two")]
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in names} == pytest.approx({k: b[k] for k in names}, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guide": False}, "changes nothing"),
        ({"splice": "end"}, "plan spliced"),
        ({"guidance_weight": -1.0}, "at least 0"),
        ({"decide": "loss"}, "method.decide"),
        ({"plan": "emd"}, "method.plan"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration.build({"method": {"name": "topd", **changes}})


def test_nothing_to_do_is_done(topd: Callable[..., Parts]) -> None:
    parts = topd()
    assert parts.method.prepare([], step=0).trajectories == []
    empty = Rollout(
        prompt=Prompt(id="p", text="?"), ids=(), logprobs=(), finish_reason="length", policy_version=0,
        sampling=Sampling(), context=(1, 9),
    )  # fmt: skip
    (only,) = parts.method.prepare([empty], step=0).trajectories
    assert only.response == ()
    assert only.edit.kind == "none"


def test_a_plan_that_is_not_followed_forbids_nothing() -> None:
    """Without guidance no window is trained on, so that all tokens are the student's own."""
    options = {"name": "topd", "plan": "spliced", "suppress": "low", "divergence": "sampled"}
    assert not configuration.build({"method": {**options, "guide": False}}).method.others_write
    with pytest.raises(UserError, match="divergence sampled takes every token for the student's own"):
        configuration.build({"method": options})
