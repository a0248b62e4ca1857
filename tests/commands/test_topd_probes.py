"""Probes of near futures: areas, correlations, detection by hand; both probes on tiny models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onpath.commands.probes import futures as divergence
from onpath.commands.probes import local_correction
from onpath.commands.probes.futures import summarise
from onpath.commands.probes.place import Place
from onpath.commands.probes.separation import area, auc, correlations, detections
from onpath.config.methods.topd import TOPDOptions
from onpath.config.whole import Config
from onpath.methods.topd import candidates, decide
from onpath.methods.topd.candidates import Fork
from onpath.run.assemble import assemble
from onpath.system.errors import UserError

Tiny = Callable[..., Config]


def place(position: int, **known: object) -> Place:
    numbers = {"reverse_kl": 1.0, "sampled_gap": 0.0, "distance": 0.1, "noise": None}
    start = {"prompt_id": "p", "token": "x", "groups": (), "label": None, **numbers}
    start |= {"student_text": "", "teacher_text": ""}
    return Place(**{**start, "position": position, **known})  # type: ignore[arg-type]


def test_area_counts_ties_half() -> None:
    scores, positive = np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False])
    assert area(scores, positive) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert area(scores, np.array([True] * 4)) is None
    assert auc(scores, np.array([False] * 4), np.array(["a"] * 4)) is None


def test_an_area_over_few_claims_no_certainty() -> None:
    """One error above twenty others: every resample that has both says 1."""
    scores = np.arange(21.0)
    owners = np.array([str(i) for i in range(21)])
    assert auc(scores, scores == 20, owners) == {"auc": 1.0, "ci95": None}
    assert auc(scores, scores > 10, owners) == {"auc": 1.0, "ci95": None}  # they agree, but on what else?
    mixed = auc(scores, np.isin(scores, (3, 9, 14, 18, 19, 20)), owners)
    assert mixed is not None
    low, high = mixed["ci95"]
    assert low < mixed["auc"] < high


def test_correlations_by_hand() -> None:
    found = correlations([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0])
    assert found["pearson"] == pytest.approx(0.8)
    assert found["spearman"] == pytest.approx(0.8)
    assert correlations([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])["pearson"] is None


def test_detection_by_hand() -> None:
    """Two rollouts of five tokens, whose two loudest are candidates; the quiet ones' D reaches 0.2."""
    columns = {
        "owner": np.array(["a"] * 5 + ["b"] * 5),
        "reverse_kl": np.array([9.0, 8, 1, 0.5, 0.4, 3, 2, 1, 0.5, 0.4]),
        "distance": np.array([0.1, 0.5, 0.9, 0.2, 0.2, 0.7, 0.3, 0.0, 0.2, 0.2]),
        "sampled_gap": np.array([5.0, 0, 6, 0, 0, 4, 0, 0, 0, 0]),
        "error": np.array([False, True, True, False, False, True, False, False, False, False]),
        "habit": np.array([True, False, False, False, False, False, False, False, False, False]),
    }
    options = TOPDOptions(top_share=0.4, drop_share=0.3, decide="quantile")
    found = {d.rule: d for d in detections(columns, options)}
    assert found["all candidates by loss"].flagged == 4
    ours = found["D above the quiet tokens' upper quartile (TOPD)"]
    assert (ours.flagged, ours.precision, ours.habits) == (3, pytest.approx(2 / 3), 0)  # 0.5, 0.7, 0.3
    dropped = found["without the lowest 30% by D (`quantile`)"]  # 0.28 is the candidates' own quantile
    assert (dropped.flagged, dropped.recall) == (3, pytest.approx(2 / 3))
    assert {d.flagged for name, d in found.items() if "alone" in name or "log-ratio" in name} == {3}
    assert found["loss alone"].precision == pytest.approx(2 / 3)  # 9, 8, 3
    assert found["loss alone"].habits == pytest.approx(1 / 3)
    assert found["distance alone"].recall == 1  # 0.9, 0.7, 0.5
    assert found["candidates by sampled log-ratio"].precision == pytest.approx(2 / 3)  # 5, 4, the first 0
    assert found["sampled log-ratio alone"].precision == pytest.approx(2 / 3)  # 6, 5, 4


@pytest.mark.parametrize("rule", ["quantile", "upper_quartile_of_low_loss"])
def test_detection_flags_what_the_method_flags(rule: str) -> None:
    """Candidates of each rollout, not of all tokens together; thresholds by all quiet tokens."""
    rng = np.random.default_rng(4)
    owners = np.repeat(np.arange(30), rng.integers(20, 90, 30))
    size = len(owners)
    columns = {
        "owner": owners,
        "reverse_kl": rng.gamma(0.2, size=size) * np.repeat(rng.gamma(1.0, size=30), np.bincount(owners)),
        "distance": rng.random(size),
        "sampled_gap": rng.normal(size=size),
        "error": rng.random(size) < 0.3,
        "habit": rng.random(size) < 0.3,
    }
    options = TOPDOptions(decide=rule, top_share=0.05, drop_share=0.4, quantile_decay=0.0)
    found: list[Fork] = []
    for row in range(30):
        mine = np.flatnonzero(owners == row)
        values = {"reverse_kl": columns["reverse_kl"][mine].tolist()}
        values |= {name: np.zeros(len(mine)).tolist() for name in ("student_logp", "teacher_logp")}
        (count,) = candidates.candidate_counts([len(mine)], options)
        for f in candidates.select(
            values, row=row, count=count, key=f"{row}", options=options, seed=0, references=len(mine)
        ):
            found.append(replace(f, distance=float(columns["distance"][mine[f.position]])))
    threshold = decide.quantile_of(found, options)
    assert threshold is not None
    forks = [f for f in decide.decided(found, options, threshold) if f.decision == "fork"]
    starts = np.searchsorted(owners, np.arange(30))
    flagged = np.array([starts[f.row] + f.position for f in forks])
    name = {"quantile": "without the lowest 40%"}.get(rule, "D above the quiet")
    (one,) = (d for d in detections(columns, options) if d.rule.startswith(name))
    assert 5 < one.flagged == len(forks)
    assert one.precision == pytest.approx(columns["error"][flagged].mean())
    assert one.recall == pytest.approx(columns["error"][flagged].sum() / columns["error"].sum())
    assert one.habits == pytest.approx(columns["habit"][flagged].mean())


def test_summary_by_hand() -> None:
    distances = [0.0, 0.1, 0.2, 0.3, 0.4]
    low = [place(i, prompt_id=f"l{i}", groups=("low",), distance=d) for i, d in enumerate(distances)]
    high = [
        place(9, prompt_id="a", groups=("high",), distance=0.3, noise=0.2),
        place(9, prompt_id="b", groups=("high",), distance=0.31, noise=0.0),
        place(9, prompt_id="c", groups=("high", "random"), distance=0.9),
    ]
    summary = summarise([*low, *high])
    assert summary["low_divergence_threshold"] == pytest.approx(0.3)  # the upper quartile of low
    assert summary["low_divergence_share_of_high_loss"]["share"] == pytest.approx(1 / 3)
    assert summary["distance"]["high"]["quartiles"][1] == pytest.approx(0.31)
    assert summary["noise_floor"]["mean"] == pytest.approx(0.1)
    assert "error_against_habit" not in summary


@pytest.mark.parametrize("source", ["file", "gym"])
def test_the_divergence_probe_writes_its_files(source: str, tiny: Tiny, tmp_path: Path) -> None:
    gym = {"student__model": "gym:student", "teacher__model": "gym:teacher", "data__train": "gym:train",
           "data__eval": {}, "rollout__max_new_tokens": 30}  # fmt: skip
    parts = assemble(tiny(**(gym if source == "gym" else {})))
    path = divergence.run_probe(parts, rollouts=6, out=tmp_path / "probes", window=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    summary = json.loads(path.with_suffix(".json").read_text())
    assert path.with_suffix(".png").stat().st_size > 1000
    assert {g for row in rows for g in row["groups"]} == {"high", "random", "low"}
    assert summary["distance"]["high"]["n"] == 6
    for row in rows:
        assert 0 <= row["distance"] <= 2
        assert (row["noise"] is not None) == bool(row["groups"])
    if source == "gym":
        assert {row["label"] for row in rows} >= {"habit", "copied"}
        by_prompt = {row["prompt_id"] for row in rows}
        assert len(rows) > 20 * len(by_prompt)  # every position
    else:
        assert len(rows) <= 18
    again = divergence.run_probe(parts, rollouts=6, out=tmp_path / "again", window=5)
    assert again.read_text() == path.read_text()


def test_the_loudest_positions_are_the_high_group(tiny: Tiny) -> None:
    parts = assemble(tiny())
    found = divergence.probe(parts, rollouts=4, window=5, each=2)
    for prompt in {p.prompt_id for p in found}:
        mine = [p for p in found if p.prompt_id == prompt]
        least = min(p.reverse_kl for p in mine if "high" in p.groups)
        assert all(p.reverse_kl <= least for p in mine if "high" not in p.groups)
        assert max(p.reverse_kl for p in mine if "low" in p.groups) < least


def test_local_correction_brings_the_student_nearer_and_leaves_it_alone(tiny: Tiny, tmp_path: Path) -> None:
    parts = assemble(tiny())
    weights = [p.clone() for p in parts.models.student.parameters()]
    path = local_correction.run_probe(
        parts, prefixes=2, out=tmp_path, updates=6, samples=8, lr=1e-2, window=5
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    summary = json.loads(path.with_suffix(".json").read_text())
    assert len(rows) == summary["prefixes"] == 2
    assert path.with_suffix(".png").stat().st_size > 1000
    for row in rows:
        assert row["topd"] < row["before"]
        assert row["topd"] != row["opd"]
    mean = np.mean([row["opd"] - row["topd"] for row in rows])
    assert summary["opd_minus_topd"]["mean"] == pytest.approx(mean)
    assert all(torch.equal(a, b) for a, b in zip(weights, parts.models.student.parameters(), strict=True))


@pytest.mark.parametrize(
    "number", [{"rollouts": 0}, {"rollouts": 2, "each": 0}, {"rollouts": 2, "window": 0}]
)
def test_numbers_below_one_are_refused(number: dict[str, int], tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        divergence.run_probe(assemble(tiny()), **{"out": tmp_path, **number})
