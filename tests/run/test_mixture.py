"""Mixtures of teachers: one distribution, Σ w·p at each token."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.commands.doctor.command import run_doctor
from onpath.commands.report.run import gather_run
from onpath.config.whole import Config
from onpath.losses import Head, Objective, TeacherHidden, TeacherMixture, fused_objective
from onpath.losses.pure import divergence_of
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.sampling import sample
from onpath.system.errors import UserError
from onpath.training import train
from tests.methods.family import ARMS, options_of
from tests.run.test_golden import TRD
from tests.run.test_routed import weights
from tests.system.test_two_processes import COLUMNS, in_ranks

Tiny = Callable[..., Config]
Options = dict[str, Any]
KINDS = ["reverse_kl", "forward_kl", "jensen_shannon"]


def random_teacher(seed: int, *, width: int, tokens: int = 7, vocabulary: int = 11) -> TeacherHidden:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=draw, dtype=torch.float64)
    bias[seed] = -math.inf  # each knows one token less
    hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    return TeacherHidden(hidden=hidden, head=Head(weight=weight, bias=bias))


def logits(one: TeacherHidden) -> torch.Tensor:
    assert one.head.bias is not None
    return one.hidden @ one.head.weight.t() + one.head.bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["full", "teacher_topk"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_loss_and_gradient_are_those_of_the_mixtures_own_logits(
    kind: Any, support: Any, temperature: float
) -> None:
    """Against autograd over the logarithm of Σ w·p, formed by hand in float64."""
    members = (random_teacher(1, width=5), random_teacher(2, width=3), random_teacher(3, width=4))
    shares = (0.5, 0.2, 0.3)
    draw = torch.Generator().manual_seed(9)
    hidden = torch.randn(7, 6, generator=draw, dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 6, generator=draw, dtype=torch.float64).requires_grad_()
    objective = Objective(
        kind=kind,
        beta=0.3 if kind == "jensen_shannon" else None,
        support=support,
        k=4 if support != "full" else None,
        teacher_temperature=temperature,
    )
    found = fused_objective(
        student_hidden=hidden,
        student_head=Head(weight=head),
        teacher=TeacherMixture(members=members, weights=shares),
        objective=objective,
        weights=torch.arange(1.0, 8.0),
        denominator=3.0,
        chunk_rows=2,
    )
    found.loss.backward()
    each = [w * logits(one).softmax(-1) for w, one in zip(shares, members, strict=True)]
    whole = torch.stack(each).sum(0).log()
    assert not whole.isneginf().any()
    as_one = TeacherHidden(hidden=torch.eye(7, dtype=torch.float64), head=Head(weight=whole.t().contiguous()))
    expected = fused_objective(
        student_hidden=(h := hidden.detach().requires_grad_()),
        student_head=Head(weight=(w := head.detach().requires_grad_())),
        teacher=as_one,
        objective=objective,
        weights=torch.arange(1.0, 8.0),
        denominator=3.0,
    )
    expected.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for one, another in ((hidden, h), (head, w)):
        assert one.grad is not None
        assert torch.allclose(one.grad, another.grad, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    if support == "full" and temperature == 1.0:
        student = (hidden.detach() @ head.detach().t()).log_softmax(-1)
        by_hand = divergence_of(objective, whole, student)
        assert torch.allclose(found.stats.loss, by_hand, rtol=1e-10)


def test_weights_must_be_shares() -> None:
    one = random_teacher(1, width=5)
    for shares in ((0.5,), (0.5, 0.6), (1.0, 0.0), ()):
        with pytest.raises(ValueError, match="weights"):
            TeacherMixture(members=(one, one), weights=shares)


@pytest.fixture
def mixed(two: Options) -> Options:
    """Rows that name nobody: all are taught by the mixture."""
    rest = {key: value for key, value in two.items() if key.startswith("teachers__")}
    return {**rest, "teachers__default": {"mixture": {"math": 3, "code": 1}}}


LEARNS: dict[str, Options] = {
    "opd": {},
    "opd, sampled": {"method__divergence": "sampled"},
    "trd": {**TRD, "method__rewriter": "code"},
    **{name: options_of(ARMS[name]) for name in ("branch", "truncate")},
}


@pytest.mark.parametrize("method", LEARNS)
def test_methods_in_which_it_scores_learn_from_it(method: str, tiny: Tiny, mixed: Options) -> None:
    run = train(tiny(**{**mixed, **LEARNS[method]}, optim__steps=2), quiet=True).directory
    rows = read_lines(run / "metrics.jsonl")
    assert all(row["teachers"]["default"]["tokens"] == row["tokens"] > 0 for row in rows)
    assert all(row["teachers"]["math"]["tokens"] == 0 for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_it_measures_what_its_teachers_do_together(tiny: Tiny, mixed: Options) -> None:
    """The probabilities of the sampled tokens are 3/4 of one's and 1/4 of the other's."""
    parts = assemble(tiny(**mixed))
    rollouts = sample(parts, 0)
    contexts, responses = [r.context for r in rollouts], [r.ids for r in rollouts]
    engines = {name: parts.generators.teacher.of(name) for name in ("math", "code", "default")}
    scored = {name: engine.score(contexts, responses) for name, engine in engines.items()}
    for math_row, code_row, both in zip(*scored.values(), strict=True):
        for a, b, c in zip(math_row, code_row, both, strict=True):
            assert math.exp(c) == pytest.approx(0.75 * math.exp(a) + 0.25 * math.exp(b), rel=1e-5)
    with pytest.raises(UserError, match="scores and writes nothing"):
        engines["default"].generate(parts.prompts.pool[:1], parts.sampling)


def test_twice_the_same_model_is_that_model(tiny: Tiny, mixed: Options, model_dirs: dict[str, Path]) -> None:
    same = {**mixed, "teachers__code": mixed["teachers__math"]}
    twice = train(tiny(**same, run__name="twice"), quiet=True).directory
    once = train(
        tiny(teacher__model=str(model_dirs["teacher"]), data__train=str(tiny().data.train)), quiet=True
    )
    rows = [read_lines(run / "metrics.jsonl") for run in (twice, once.directory)]
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=1e-4, abs=1e-6)


def test_rows_may_name_it_beside_its_teachers(tiny: Tiny, two: Options, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(two["data__train"]).read_text().splitlines()]
    path = tmp_path / "rows.jsonl"
    named = [{**row, "of": ("math", "both")[i % 2]} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    options = {**two, "data__train": str(path), "teachers__both": {"mixture": {"math": 0.5, "code": 0.5}}}
    run = train(tiny(**options, run__trajectories_every=1), quiet=True).directory
    for row in read_lines(run / "metrics.jsonl"):
        tokens = {name: found["tokens"] for name, found in row["teachers"].items()}
        assert tokens["math"] > 0 < tokens["both"]
        assert tokens["code"] == 0
        assert 0 < row["teachers"]["both"]["overlap"] < 1
    assert "both: {'math': 0.5, 'code': 0.5}" in json.dumps(gather_run(run))


def alone_and_by_two(tiny: Tiny, options: Options, tmp_path: Path, *, shard: str) -> list[tuple[Any, Any]]:
    """The lines of metrics of one process and of two, side by side, which must be the same."""
    options = {**options, "optim__steps": 3, "optim__eps": 1e-4, "rollout__prompts": 5}
    for name in ("math", "code"):
        options[f"teachers__{name}"] = {**options[f"teachers__{name}"], "device": "auto"}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    both = in_ranks(tiny(**options, run__name="two", parallel__shard=shard), tmp_path, processes=2)
    pairs = list(zip(*(read_lines(run / "metrics.jsonl") for run in (one, both)), strict=True))
    for a, b in pairs:
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=1e-4, abs=1e-6)
    return pairs


def test_two_processes_are_one(tiny: Tiny, mixed: Options, tmp_path: Path) -> None:
    for pair in alone_and_by_two(tiny, mixed, tmp_path, shard="layer"):
        one, two = ({k: v for k, v in r["teachers"]["default"].items() if v is not None} for r in pair)
        assert one == pytest.approx(two, rel=1e-4)


def test_its_teachers_scores_are_kept(tiny: Tiny, mixed: Options, tmp_path: Path) -> None:
    kept = dict(mixed)
    for name in ("math", "code"):
        kept[f"teachers__{name}"] = {
            **mixed[f"teachers__{name}"], "cache": str(tmp_path / "kept"), "cache_dtype": "float32"
        }  # fmt: skip
    plain = train(tiny(**mixed, run__name="plain"), quiet=True).directory
    first, again = (train(tiny(**kept, run__name=n), quiet=True).directory for n in ("first", "again"))
    assert weights(plain) == weights(first) == weights(again)
    totals = [
        [sum(row[key] for row in read_lines(run / "metrics.jsonl")) for run in (first, again)]
        for key in ("teacher_tokens_scored", "teacher_tokens_from_cache")
    ]
    assert totals[0][1] == 0 < totals[0][0] == totals[1][1]


def test_the_doctor_looks_at_it(tiny: Tiny, mixed: Options) -> None:
    report = run_doctor(tiny(**mixed))
    found = {f.name: f for f in report.findings if f.values.get("teacher") == "default"}
    assert report.status != "fail", [f for f in report.findings if f.status == "fail"]
    assert found["teacher_itself"].status == "ok"
    assert found["alignment"].status == "skipped"


MIXTURE = {"mixture": {"math": 1, "code": 1}}
BY_FORK = {"method__minimal_edit": True, "method__locate": "fork"}
REFUSED: list[tuple[Options, str]] = [
    ({"teachers__both": {"mixture": {"math": 1, "law": 1}}}, r"mixture names 'law'; .* math, code"),
    ({"teachers__both": {"mixture": {"math": 1}}}, r"two teachers or more"),
    ({"teachers__both": {"mixture": {"math": 1, "code": 0}}}, r"a weight above 0"),
    ({"teachers__both": {"mixture": {"math": 0, "code": 0}}}, r"a weight above 0"),
    ({"teachers__both": {"mixture": {"math": -1, "code": 1}}}, r"a weight above 0"),
    ({"teachers__both": {"mixture": {"math": -1, "code": -1}}}, r"a weight above 0"),
    ({"teachers__both": {"mixture": {"math": 1, "code": math.inf}}}, r"input should be a finite number"),
    ({"teachers__both": {**MIXTURE, "dtype": "bfloat16"}}, r"a mixture has no options of its own"),
    ({"teachers__both": MIXTURE, "teachers__all": {"mixture": {"both": 1, "math": 1}}}, r"names 'both'"),
    ({"teachers__both": MIXTURE, "parallel__teacher": "offload"}, r"use same or copy"),
    ({"teachers__both": MIXTURE, "method__name": "topd"}, r"the teacher writes, and a mixture only scores"),
    ({"teachers__both": MIXTURE, **TRD}, r"trd with method\.rewriter"),
    ({"teachers__both": MIXTURE, **TRD, "method__rewriter": "both"}, r"method\.rewriter is 'both'"),
    (
        {"teachers__both": MIXTURE, **TRD, "method__rewriter": "math", **BY_FORK},
        r"the teacher writes, .* trd with method\.rewriter and no method\.locate: fork",
    ),
    ({"teachers__both": MIXTURE, "method__writer": "teacher"}, r"the teacher writes"),
    ({"teachers__both": MIXTURE, "method__name": "truncate", "method__stop_when": "fork"}, r"only scores"),
    ({"teachers__both": {"mixture": {}}}, r"two teachers or more"),
    ({"teachers__both": {"mixture": {"math": 1e308, "code": 1e308}}}, r"a weight above 0"),
    ({"teachers__both": {"mixture": {"math": 1e300, "code": 1e-300}}}, r"a weight above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_cannot_be_is_said(options: Options, says: str, tiny: Tiny, two: Options) -> None:
    with pytest.raises(UserError, match=says):
        tiny(**{**two, **options})


def test_the_only_teacher_is_no_mixture(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"teacher\.mixture is of several teachers"):
        tiny(teacher__mixture={"math": 1, "code": 1})


def test_one_that_nobody_names_is_said(tiny: Tiny, two: Options) -> None:
    with pytest.raises(UserError, match=r"teachers\.both: none of the 40 rows"):
        train(tiny(**two, teachers__both=MIXTURE), quiet=True)
