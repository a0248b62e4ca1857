"""`onpath study`: intervals proved by simulation, a study killed and continued, budgets, tuning, refusals."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import product
from math import comb
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from rich.console import Console
from scipy import stats

from onpath.commands.cli import main
from onpath.commands.study import command as study
from onpath.commands.study import fork_server as forked
from onpath.commands.study import jobs as study_jobs
from onpath.commands.study import plan, reevaluate, results, sources, worker
from onpath.commands.study.budget import Used, missed, steps_of
from onpath.commands.study.config import Parallel, nested
from onpath.commands.study.intervals import crossed_variance, difference, estimate, holm, p_value
from onpath.commands.study.jobs import Progress, Slots, locked, run_jobs, slots_for
from onpath.commands.study.plan import Job
from onpath.commands.study.run import run_study
from onpath.commands.study.tables import sentences
from onpath.run.log import read_lines
from onpath.system.errors import UserError, guarded
from onpath.training import train
from tests.conftest import CHARACTERS, make_model, make_tokenizer
from tests.forks import begun

RECIPE = Path(__file__).parents[2] / "recipes" / "gym-study" / "config.yaml"

Make = Callable[..., Path]


# The statistics.


def by_sums_of_squares(x: np.ndarray) -> tuple[float, float]:
    """Variance of the mean and Satterthwaite's degrees of freedom, the textbook's way: sums, then means."""
    rows, columns = x.shape
    total = sum(float(v) for v in x.ravel())
    correction = total**2 / (rows * columns)
    whole = sum(float(v) ** 2 for v in x.ravel()) - correction
    of_rows = sum(float(sum(row)) ** 2 for row in x) / columns - correction
    of_columns = sum(float(sum(column)) ** 2 for column in x.T) / rows - correction
    a, b = of_rows / (rows - 1), of_columns / (columns - 1)
    c = (whole - of_rows - of_columns) / ((rows - 1) * (columns - 1))
    freedom = (a + b - c) ** 2 / (
        a**2 / (rows - 1) + b**2 / (columns - 1) + c**2 / ((rows - 1) * (columns - 1))
    )
    return (a + b - c) / (rows * columns), freedom


def by_two_seeds(x: np.ndarray) -> float:
    """Half the width of the interval of few seeds: each mean square with a t of its own."""
    rows, columns = x.shape
    a = columns * x.mean(axis=1).var(ddof=1)
    b = rows * x.mean(axis=0).var(ddof=1)
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean()
    c = (rest**2).sum() / ((rows - 1) * (columns - 1))
    t_rows, t_columns = stats.t(rows - 1).ppf(0.975), stats.t(columns - 1).ppf(0.975)
    square = max(t_rows**2 * a + t_columns**2 * max(0, b - c), t_columns**2 * max(b, c))
    return float((square / (rows * columns)) ** 0.5)


def simulated(rng: np.random.Generator, runs: int, problems: int, *sigmas: float) -> np.ndarray:
    by_seed, by_problem, by_both = sigmas
    return (
        0.1
        + by_seed * rng.standard_normal((runs, 1))
        + by_problem * rng.standard_normal((1, problems))
        + by_both * rng.standard_normal((runs, problems))
    )


def test_variance_equals_the_textbook_sums_of_squares() -> None:
    x = simulated(np.random.default_rng(0), 4, 30, 0.1, 0.2, 0.1)
    variance, freedom = crossed_variance(x)
    expected, expected_freedom = by_sums_of_squares(x)
    assert variance == pytest.approx(expected, rel=1e-9)
    assert freedom == pytest.approx(expected_freedom, rel=1e-9)
    found = difference(x)
    half = stats.t(expected_freedom).ppf(0.975) * expected**0.5
    assert found.ci95 == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-9)
    assert found.p_value == pytest.approx(2 * stats.t(expected_freedom).sf(abs(x.mean()) / expected**0.5))
    assert found.over == "problems and seeds"


@pytest.mark.parametrize(
    ("runs", "sigmas"),
    [
        (5, (0.05, 0.3, 0.2)),
        (5, (0.1, 0.05, 0.1)),
        *((runs, (by_seed, 0.3, 0.15)) for runs in (2, 3) for by_seed in (0.0, 0.05, 0.1, 0.3)),
    ],
)
def test_intervals_cover_the_truth(runs: int, sigmas: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(1)
    hits = [
        low <= 0.1 <= high
        for low, high in (difference(simulated(rng, runs, 50, *sigmas)).ci95 for _ in range(1500))
    ]
    assert 0.937 <= np.mean(hits) <= 0.995


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_the_p_value_is_the_level_at_which_the_interval_ends_at_zero(runs: int) -> None:
    """And under the null it is below 5% no more often than that."""
    rng, low = np.random.default_rng(3), []
    for _ in range(300):
        x = simulated(rng, runs, 40, 0.1 if runs > 1 else 0.0, 0.3, 0.15) - 0.1
        found = difference(x)
        if runs > 1:
            assert (found.p_value < 0.05) == (not found.ci95[0] <= 0 <= found.ci95[1])
        low.append(p_value(x) < 0.05)
    assert np.mean(low) <= 0.085


def test_a_bootstrap_over_five_seeds_would_not_cover() -> None:
    """Why intervals.py does not resample: the fixture tells the two apart."""
    rng = np.random.default_rng(2)
    hits = []
    for _ in range(300):
        means = simulated(rng, 5, 50, 0.1, 0.0, 0.05).mean(axis=1)
        low, high = np.quantile(means[rng.integers(0, 5, (400, 5))].mean(axis=1), [0.025, 0.975])
        hits.append(low <= 0.1 <= high)
    assert np.mean(hits) < 0.9


def test_one_run_says_problems_only_and_sureness_is_never_free() -> None:
    one = np.array([[0.0, 0.5, 1.0, 0.5, 0.25]])
    assert estimate(one).over == difference(one).over == "problems only"
    low, high = estimate(np.ones((3, 20))).ci95
    assert low < 0.9
    assert high == 1
    nothing = difference(np.zeros((3, 20)))
    assert nothing.p_value == 1
    assert nothing.ci95 == pytest.approx((-0.161, 0.161), abs=1e-3), "twenty problems do not tell of others"
    assert difference(np.zeros((1, 20))).ci95 == nothing.ci95
    always = difference(np.ones((2, 20)))
    assert always.ci95 == pytest.approx((1 - 2 * 0.161, 1), abs=1e-3)
    assert 0 < p_value(np.full((2, 4), 0.5)) == 0.125
    assert difference(np.full((2, 1), 0.3)).ci95 == (-1, 1)
    assert estimate(np.array([[0.99, 1, 1], [1, 0.9, 1]])).ci95[1] == 1
    assert p_value(one) == pytest.approx(stats.ttest_1samp(one[0], 0).pvalue)


def test_holm_against_its_definition() -> None:
    values = [0.02, 0.5, 0.001, 0.04, 0.012]
    for level in np.linspace(0.001, 1, 300):
        rejected: set[int] = set()
        for rank, i in enumerate(np.argsort(values)):
            if values[i] > level / (len(values) - rank):
                break
            rejected.add(int(i))
        assert rejected == {i for i, p in enumerate(holm(values)) if p <= level + 1e-12}


# A study on tiny models.


@pytest.fixture(scope="session")
def study_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a data file for each use; the answer is the student's likeliest first token, so that some
    samples are right."""
    root = tmp_path_factory.mktemp("study")
    tokenizer, student = make_tokenizer(), make_model(0)
    for name, model in {"student": student, "teacher": make_model(1, hidden=48)}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for offset, name in ((0, "train"), (100, "test"), (200, "held")):
        rows = []
        for i in range(offset, offset + 24):
            text = f"{i}+{7 * i}=?"
            ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"], 3]])
            likely = int(student(ids).logits[0, -1, 4:].argmax()) + 4
            rows.append({"id": str(i), "prompt": text, "answer": CHARACTERS[likely]})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def make(study_files: Path, tmp_path: Path) -> Make:
    """Writes a study's YAML; keywords replace its sections."""

    def write(**changes: Any) -> Path:
        files = study_files
        data = {
            "name": "tiny",
            "dir": str(tmp_path / "studies"),
            "base": {
                "student": {"model": str(files / "student"), "device": "cpu"},
                "teacher": {"model": str(files / "teacher"), "device": "cpu"},
                "data": {"train": str(files / "train.jsonl")},
                "rollout": {"prompts": 4, "max_new_tokens": 6},
                "optim": {"steps": 2, "lr": 0.003},
                "eval": {"grader": "exact", "max_new_tokens": 1},
                "run": {"save_every": 0, "trajectories_every": 0},
            },
            "arms": {"untouched": "untouched", "opd": {}, "forward": {"method.divergence": "forward_kl"}},
            "seeds": 2,
            "evals": {"splits": [str(files / "test.jsonl")], "n": 4, "k": 2, "limit": 16},
            "parallel": {"processes": 2},
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(data | changes, sort_keys=False))
        return path

    return write


def result(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((path / "study.json").read_text())
    return data


def scores_by_hand(directory: Path, run: str, step: int, k: int) -> dict[str, list[float]]:
    """Of each problem, the share of right samples and the share of k-subsets with a right one."""
    lines = (directory / run / "evals" / f"test_step_{step:06d}.jsonl").read_text().splitlines()
    verdicts = [row["correct"] for row in sorted(map(json.loads, lines), key=lambda r: r["id"])]
    subsets = [[v for v in product([0, 1], repeat=len(x)) if sum(v) == k] for x in verdicts]
    return {
        "avg_at_k": [float(np.mean(v)) for v in verdicts],
        "pass_at_k": [
            sum(any(take and right for take, right in zip(s, v, strict=True)) for s in all_of)
            / comb(len(v), k)
            for v, all_of in zip(verdicts, subsets, strict=True)
        ],
    }


def check_numbers(directory: Path, data: Mapping[str, Any]) -> None:
    """study.json against the runs' own files, computed another way."""
    tables: dict[str, list[dict[str, list[float]]]] = {}
    for row in data["rows"]:
        by_hand = scores_by_hand(directory, row["run"], row["steps"], 2)
        tables.setdefault(row["arm"], []).append(by_hand)
        metrics = read_lines(directory / row["run"] / "metrics.jsonl")
        assert row["updated_tokens"] == sum(m["tokens"] for m in metrics)
        assert row["tokens_generated_student"] == sum(m["student_tokens_generated"] for m in metrics)
        assert row["wall_seconds"] == pytest.approx(sum(s for m in metrics for s in m["seconds"].values()))
        for measure, values in by_hand.items():
            assert row["evals"]["test"][measure] == pytest.approx(np.mean(values))
    for arm in data["arms"]:
        for measure in ("avg_at_k", "pass_at_k"):
            shown = arm["evals"]["test"][measure]
            own, base = (np.array([t[measure] for t in tables[a]]) for a in (arm["arm"], "opd"))
            assert shown["mean"] == pytest.approx(own.mean())
            if arm["arm"] == "opd":
                assert shown["difference"] is None
                continue
            gap = own - base  # an untouched student is one row, laid against each seed
            assert shown["difference"]["mean"] == pytest.approx(gap.mean())
            assert shown["difference"]["pairs"] == 2
            if (gap.mean(axis=0).var() > 0) and gap.mean(axis=1).var() * 16 * 2 > (gap**2).mean():
                half = by_two_seeds(gap)
                assert shown["difference"]["ci95"] == pytest.approx([gap.mean() - half, gap.mean() + half])


@pytest.mark.slow
def test_killed_and_continued_in_processes(
    make: Make, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    directory = Path(yaml.safe_load(path.read_text())["dir"]) / "tiny"
    context = get_context("fork")  # of this process, which has imported everything
    monkeypatch.setattr(context, "set_forkserver_preload", lambda names: None)

    def of_a_group_of_its_own() -> int:
        os.setsid()
        forked.get_context = lambda kind: context  # type: ignore[attr-defined]
        return main(["study", str(path)])

    first = begun(of_a_group_of_its_own)
    assert first.pid is not None
    while first.is_alive() and len(list((directory / "logs").glob("runs-*"))) < 4:
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a run that a killed one left behind"), locked(directory):
        pass
    os.killpg(first.pid, signal.SIGKILL)
    first.join()
    until = time.monotonic() + 30
    while time.monotonic() < until:  # a killed process may take a moment to end
        with suppress(UserError), locked(directory):
            break
        time.sleep(0.05)
    assert not (directory / "study.json").exists()
    whole = {p: p.stat().st_mtime_ns for p in (directory / "runs").glob("*/model")}
    assert 1 <= len(whole) < 4

    code = main(["study", str(path)])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert {p: p.stat().st_mtime_ns for p in whole} == whole  # not run again
    assert "5/5" in said.err
    data = result(directory)
    assert [(r["arm"], r["seed"]) for r in data["rows"]] == [
        ("untouched", None), ("opd", 0), ("forward", 0), ("opd", 1), ("forward", 1),
    ]  # fmt: skip
    assert any(r["evals"]["test"]["avg_at_k"] > 0 for r in data["rows"])
    check_numbers(directory, data)
    assert "test, pass@2: 16 problems, 4 samples each" in said.out
    assert "| forward | 2 |" in (directory / "study.md").read_text()
    assert not list(directory.glob("runs/*/checkpoints"))


def test_one_seed_one_budget_and_tuning(make: Make, in_process: list[Job], study_files: Path) -> None:
    path = make(
        seeds=[3],
        budget={"updated_tokens": 60, "pilot_steps": 3},
        tune={"lrs": [0.02, 0.002], "split": str(study_files / "held.jsonl"), "limit": 8},
        arms={
            "teacher": "teacher",
            "opd": {},
            "sft": {"method": {"writer": "teacher", "divergence": "cross_entropy"}},
            "same": {"budget": {"generated_tokens": "sft"}, "tuned_like": "opd"},
        },
    )
    directory = run_study(path, quiet=True).directory
    data = result(directory)
    steps = {arm["arm"]: arm["steps"] for arm in data["arms"]}
    for name in ("opd", "sft"):
        assert steps[name] == round(60 / data["pilots"][name]["updated_tokens"])
    written = {
        name: p["tokens_generated_student"] + p["tokens_generated_teacher"]
        for name, p in data["pilots"].items()
    }
    assert data["pilots"]["sft"]["tokens_generated_teacher"] > 0
    assert steps["same"] == round(steps["sft"] * written["sft"] / written["same"])

    assert [t["arm"] for t in data["tuning"]] == ["opd", "sft"]
    rates = {arm["arm"]: arm["lr"] for arm in data["arms"]}
    for tried in data["tuning"]:
        best = max(tried["grid"], key=lambda g: (g["avg_at_k"], -g["lr"]))
        assert tried["chosen"] == best["lr"] == rates[tried["arm"]]
        assert [g["lr"] for g in tried["grid"]] == [0.002, 0.02]
    assert rates["same"] == rates["opd"]
    tuned = [j for j in in_process if j.stage == "tuning"]
    assert {j.config.run.seed for j in tuned} == {1000}
    assert {tuple(j.config.data.eval) for j in tuned} == {("tuning",)}
    assert {j.config.optim.steps for j in tuned if j.arm == "opd"} == {steps["opd"]}

    assert any("one seed cover problems only" in note for note in data["notes"])
    cut = {a["arm"]: min(e["finished"] for e in a["evals"].values()) for a in data["arms"]}
    told = [note for note in data["notes"] if "the others were cut at eval.max_new_tokens" in note]
    assert [note.split()[0] for note in told] == [arm for arm, ended in cut.items() if ended < 0.5]
    assert told
    assert all(a["evals"]["test"]["avg_at_k"]["over"] == "problems only" for a in data["arms"])
    assert all(a["evals"]["test"]["avg_at_k"]["seed_sd"] is None for a in data["arms"])
    teacher = next(j for j in in_process if j.arm == "teacher")
    assert teacher.config.student.model == str(study_files / "teacher")

    ran = len(in_process)
    run_study(path, quiet=True)
    assert len(in_process) == ran  # nothing is repeated, and the rates stay
    assert result(directory) == data


def best_of_test(study_files: Path, **run: Any) -> dict[str, Any]:
    """A base whose runs keep the best weights on the set test, which is evaluated after each step."""
    return {
        "student": {"model": str(study_files / "student"), "device": "cpu"},
        "teacher": {"model": str(study_files / "teacher"), "device": "cpu"},
        "data": {
            "train": str(study_files / "train.jsonl"),
            "eval": {"test": str(study_files / "test.jsonl")},
        },
        "rollout": {"prompts": 4, "max_new_tokens": 6},
        "optim": {"steps": 4, "lr": 1e-7},
        "eval": {"grader": "exact", "max_new_tokens": 1, "every": 1},
        "run": {"save_every": 0, "trajectories_every": 0, "keep_best": "test", **run},
    }


def test_runs_that_stop_early_have_the_numbers_of_their_last_step(
    make: Make, in_process: list[Job], study_files: Path
) -> None:
    evals = {"splits": [str(study_files / "test.jsonl")], "n": 2, "k": 2, "limit": 4, "every": 1}
    path = make(base=best_of_test(study_files, stop_after=1), arms={"opd": {}}, seeds=1, evals=evals)
    directory = run_study(path, quiet=True).directory
    (row,) = result(directory)["rows"]
    (shown,) = result(directory)["arms"]
    lines = read_lines(directory / "runs" / "opd-seed0" / "eval.jsonl")
    assert row["steps"] == shown["steps"] == lines[-1]["step"] == 2  # the second is no better than the first
    assert row["evals"]["test"]["avg_at_k"] == lines[-1]["avg_at_k"]
    assert any(
        "opd-seed0 was stopped by run.stop_after at step 2 of 4" in n for n in result(directory)["notes"]
    )
    run_study(path, quiet=True)
    assert len(in_process) == 1  # it is finished


def test_pilots_and_tuning_of_runs_that_keep_their_best(
    make: Make, in_process: list[Job], study_files: Path
) -> None:
    path = make(
        base=best_of_test(study_files, stop_after=4),
        arms={"opd": {}},
        seeds=1,
        budget={"updated_tokens": 60, "pilot_steps": 2},
        tune={"lrs": [0.02, 0.002], "split": str(study_files / "held.jsonl"), "limit": 4},
        evals={"splits": [str(study_files / "test.jsonl")], "n": 2, "k": 2, "limit": 4, "every": 1},
    )
    run_study(path, quiet=True)
    kept = {j.stage: (j.config.run.keep_best, j.config.run.stop_after) for j in in_process}
    assert kept == {"pilots": (None, 0), "tuning": (None, 0), "runs": ("test", 4)}


def test_a_failed_run_leaves_the_others_results(
    make: Make, in_process: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(arms={"opd": {}, "opsd": {"method.name": "opsd"}}, seeds=1)  # the data has no solutions
    assert main(["study", str(path), "--quiet"]) == 2
    said = capsys.readouterr()
    assert "1 of the study's runs failed, first opsd-seed0" in said.err
    assert "needs the column solution" in said.err
    assert "opd " in said.out
    notes = result(Path(yaml.safe_load(path.read_text())["dir"]) / "tiny")["notes"]
    assert any(note.startswith("opsd-seed0 failed") for note in notes)
    assert "opsd has no finished run" in notes


def test_runs_of_other_data_or_grader_are_refused(
    make: Make, in_process: list[Job], study_files: Path
) -> None:
    path = make(arms={"opd": {}, "forward": {"method.divergence": "forward_kl"}}, seeds=1)
    directory = run_study(path, quiet=True).directory
    file = next((directory / "runs" / "forward-seed0" / "evals").glob("*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for change, sentence in (
        ({"grader": "math"}, "one was graded by 'math', the other by 'exact'"),
        ({"digest": "0"}, "problem '100' is not the same in both"),
        (
            {"sampling": {**rows[0]["sampling"], "temperature": 0.5}},
            "sampling.temperature is 0.5 in one, 1.0",
        ),
    ):
        file.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        with pytest.raises(UserError, match=sentence):
            run_study(path, quiet=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(UserError, match="only one of them has problem '100'"):
        run_study(path, quiet=True)

    with pytest.raises(UserError, match=r"made with optim.steps 2, the study now says 3"):
        run_study(make(arms={"opd": {}}, seeds=1, budget={"updates": 3}), quiet=True)
    (directory / "sources.json").write_text(json.dumps({str(study_files / "train.jsonl"): "another"}))
    with pytest.raises(UserError, match="has changed since the study"):
        run_study(path, quiet=True)


def test_other_questions_do_not_train_again(make: Make, in_process: list[Job], study_files: Path) -> None:
    arms = {
        "untouched": "untouched",
        "opd": {},
        "sft": {"method": {"writer": "teacher", "divergence": "cross_entropy"}, "rollout.temperature": 0.8},
        "adapter": {"student": {"lora_rank": 4, "lora_alpha": 8.0}},
        "half": {"student": {"lora_rank": 4, "lora_alpha": 8.0, "dtype": "float16"}, "optim.lr": 0.03},
    }
    first = run_study(make(arms=arms, seeds=1), quiet=True).directory
    before = result(first)
    trained = [j.name for j in in_process if j.trains]
    assert trained == ["opd-seed0", "sft-seed0", "adapter-seed0", "half-seed0"]

    more = {"splits": [str(study_files / f"{s}.jsonl") for s in ("test", "held")], "n": 6, "k": 3}
    run_study(make(arms=arms, seeds=1, evals=more), quiet=True)
    data = result(first)
    assert [j.name for j in in_process if j.trains] == trained
    assert (data["study"]["n"], data["study"]["k"]) == (6, 3)
    assert data["study"]["problems"] == {"test": 24, "held": 24}
    for row, old in zip(data["rows"], before["rows"], strict=True):
        assert {k: row[k] for k in ("run", "steps", "lr", "updated_tokens")} == {
            k: old[k] for k in ("run", "steps", "lr", "updated_tokens")
        }
        assert row["evaluation"] != row["run"] == old["evaluation"]
        then, now = (verdicts(first / r["evaluation"]) for r in (old, row))
        assert all(now[name][:4] == then[name] for name in then)  # the same draws of the same model
        assert any(sum(right) for right in now.values())

    ran = len(in_process)
    run_study(make(arms=arms, seeds=1), quiet=True)  # the old questions again
    run_study(make(arms=arms, seeds=1, evals=more), quiet=True)
    assert len(in_process) == ran
    assert result(first) == data
    another = make(name="fresh", arms=arms, seeds=1, evals=more)
    fresh = result(run_study(another, quiet=True).directory)
    for ours, theirs in zip(data["rows"], fresh["rows"], strict=True):
        assert ours["evals"] == theirs["evals"]

    ran = len(in_process)
    run_study(make(arms=arms, seeds=1, evals=more | {"every": 1, "start": True}), quiet=True)
    assert len(in_process) == ran, "finished runs have no curve to add to"
    assert result(first)["rows"] == data["rows"]


def test_a_pilot_does_not_answer_and_is_not_in_the_way(
    make: Make, in_process: list[Job], study_files: Path
) -> None:
    asked = {"budget": {"updated_tokens": 60, "pilot_steps": 2}, "arms": {"opd": {}}, "seeds": 1}
    first = result(run_study(make(**asked), quiet=True).directory)
    ran = [job.config.run.dir.rpartition("/")[2] for job in in_process]
    assert ran == ["pilots", "runs"]
    again = result(
        run_study(
            make(**asked, evals={"splits": [str(study_files / "held.jsonl")], "n": 6, "k": 3}), quiet=True
        ).directory
    )
    assert [job.trains for job in in_process] == [True, True, False], "one evaluation is new"
    assert again["pilots"] == first["pilots"]
    assert again["study"]["problems"] == {"held": 24}


def test_what_leaves_the_weights_as_they_are_may_change(make: Make, study_files: Path) -> None:
    """Of a finished run nothing changes; of one that was cut off all but the questions that it began with."""
    evals = {"splits": {"test": str(study_files / "test.jsonl")}, "n": 4, "k": 2}
    runs = {"save_every": 0, "trajectories_every": 0}
    base = {"student": {"device": "cpu"}, "optim": {"steps": 2}, "run": runs}
    other = {
        **base,
        "optim": {"steps": 2, "micro_batch_tokens": 4096},
        "run": {**runs, "save_every": 1},
    }
    arms = {"opd": {}, "cut": {}}
    for job in plan.runs(study.load_study(make(base=base, arms=arms, seeds=1)), {"opd": 2, "cut": 2}, {}):
        job.directory.mkdir(parents=True)
        (job.directory / "config.yaml").write_text(job.config.to_yaml())
        if job.arm == "opd":
            shutil.copytree(study_files / "student", job.directory / "model")
    again = study.load_study(make(base=other, arms=arms, seeds=1, evals={**evals, "n": 6, "every": 1}))
    planned = plan.runs(again, {"opd": 2, "cut": 2}, {})
    made = [reevaluate.as_made(job) for job in planned]
    plan.check_existing(made)
    seen = {
        job.arm: (
            *(job.config.eval.every, job.config.eval.n),
            *(job.config.optim.micro_batch_tokens, job.config.run.save_every),
        )
        for job in made
    }
    assert seen == {"opd": (0, 4, 16384, 0), "cut": (1, 4, 4096, 1)}
    assert list(reevaluate.evaluations(again.directory, planned, made)) == ["opd-seed0"]


def test_a_study_that_is_moved_or_spelled_otherwise_goes_on(
    make: Make, in_process: list[Job], study_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"untouched": "untouched", "opd": {}}
    evals = {"splits": {"test": str(study_files / "test.jsonl")}, "n": 2, "k": 1, "limit": 4}
    more = {**evals, "n": 3}
    run_study(make(arms=arms, seeds=1, evals=evals), quiet=True)
    first = run_study(make(arms=arms, seeds=1, evals=more), quiet=True)
    ran = len(in_process)
    monkeypatch.chdir(study_files)
    spelled = {**more, "splits": {"test": "./test.jsonl"}}
    base = yaml.safe_load(make().read_text())["base"] | {"data": {"train": "train.jsonl"}}
    changes = {"arms": arms, "seeds": 1, "base": base}
    (tmp_path / "studies").rename(tmp_path / "moved")
    for directory in (str(tmp_path / "moved"), os.path.relpath(tmp_path / "moved")):
        run_study(make(**changes, dir=directory, evals={**spelled, "n": 2}), quiet=True)
        found = run_study(make(**changes, dir=directory, evals=more), quiet=True)
        assert len(in_process) == ran
        assert found.data["rows"] == first.data["rows"]
    with pytest.raises(UserError, match=r"made with optim.steps 2, the study now says 5: give the .* said$"):
        run_study(make(**changes, dir=str(tmp_path / "moved"), evals=more, budget={"updates": 5}), quiet=True)


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    "base",
    [
        {"method": {"off_policy": True}, "rollout": {"temperature": 0.7, "top_p": 0.9, "top_k": 5}},
        {"method": {"name": "trd"}, "rollout": {"temperature": 0.7}},
        {"student": {"lora_rank": 4, "quantization": BITS}},
        {"student": {"lora_rank": 4, "dtype": "float16"}, "rollout": {"overlap": True}},
        {"teacher": {"quantization": BITS}, "rollout": {"overlap": True}},
        {"teacher": {"dtype": "float16"}},
        {
            "student": {"lora_rank": 4},
            "rollout": {"engine": "vllm", "url": "http://localhost:8000", "push": "adapter"},
        },
    ],
)
def test_whatever_trains_its_models_can_be_evaluated(
    base: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    arms = {"opd": {}, "untouched": "untouched", "teacher": "teacher"}
    config = study.load_study(make(base=base, arms=arms, seeds=1))
    jobs = {job.arm: job for job in plan.runs(config, {"opd": 1}, {})}
    given = config.base.teacher.quantization
    assert jobs["teacher"].config.student.quantization == given
    assert jobs["untouched"].config.student == config.base.student
    for job in jobs.values():
        asked = reevaluate._evaluation(tmp_path, job, job).config
        assert asked.method.name == "opd"
        assert asked.rollout.sampling(seed=0).untruncated
    trained = reevaluate._evaluation(tmp_path, jobs["opd"], jobs["opd"]).config.student
    kept = config.base.student
    if kept.quantization is None and kept.dtype == "float32":
        kept = kept.model_copy(update={"model": str(jobs["opd"].directory / "model"), "lora_rank": 0})
    assert trained == kept


def verdicts(run: Path) -> dict[str, list[bool]]:
    """Problem → verdicts on its samples, of the last evaluation on `test`."""
    lines = max((run / "evals").glob("test_step_*.jsonl")).read_text().splitlines()
    return {row["id"]: row["correct"] for row in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": {"opd": {}, "b": {"data.limit": 5}}}, "arm b has data.limit 5 and arm opd None"),
        ({"arms": {"opd": {}, "b": {"eval": {"grader": "math"}}}}, "arm b has eval.grader 'math'"),
        (
            {
                "arms": {
                    "opd": {"budget": {"generated_tokens": "b"}},
                    "b": {"rollout": {"refresh": "never"}},
                }
            },
            "arm b keeps rollouts",
        ),
        ({"arms": {"opd": {"method.divergenc": 1}}}, "arm opd: unknown key method.divergenc; did you mean"),
        ({"arms": {"a": {}}}, "base_arm is opd, which is none of the arms a"),
        ({"evals": {"n": 2}, "base": {"data": {"eval": {}}}}, "evals.splits names no set to compare"),
        ({"arms": {"opd": "control"}}, "arms.opd: it is 'control'; an arm is untouched, teacher, or a"),
        ({"arms": {"opd": 3}}, "an arm is untouched, teacher, or a mapping"),
        ({"arms": {"opd": {}, "a/b": {}}}, "cannot name a directory"),
        ({"budget": {"updates": 3, "wall_seconds": 5}}, "give one of"),
        ({"budget": {"updated_tokens": -1}}, "must be above 0"),
        ({"budget": {"updated_tokens": "opd"}}, "budget.updated_tokens must be a number"),
        (
            {"arms": {"opd": {}, "b": {"budget": {"wall_seconds": "topd"}}}},
            "budget.wall_seconds is 'topd', neither a number nor an arm",
        ),
        ({"budget": {"updates": 3}, "arms": {"opd": {"optim.steps": 2}}}, "which the budget decides"),
        ({"tune": {"lrs": [1, 2]}, "arms": {"opd": {"optim.lr": 2}}}, "optim.lr, which tune chooses"),
        ({"arms": {"opd": {"run.seed": 7}}}, "opd sets run.seed, which the study decides: give its seeds"),
        ({"arms": {"opd": {"run": {"name": "x"}}}}, "arm opd sets run.name, which the study decides, by arm"),
        ({"arms": {"opd": {"run.dir": "x"}}}, "arm opd sets run.dir, which the study decides: give its dir"),
        ({"tune": {"lrs": [1, 2], "seed": 1}}, "tune.seed 1 is one of the seeds"),
        ({"tune": {"lrs": [1, 2], "split": "gym:hard"}, "evals": {"splits": ["gym:hard"]}}, "compared on"),
        (
            {
                "base": {"data": {"limit": 20}},
                "tune": {"lrs": [1, 2], "split": "gym:test?late=0", "limit": 9},
                "evals": {"splits": {"all": "gym:test"}, "n": 1, "k": 1, "limit": 4},
            },
            "tune.split gym:test?late=0: 4 of its 9 problems, the first with id '",
        ),
        (
            {
                "base": {"data": {"limit": 20}},
                "tune": {"lrs": [1, 2], "split": "gym:train?late=0", "limit": 9},
                "evals": {"splits": {"all": "gym:test"}, "n": 1, "k": 1, "limit": 4},
            },
            "are also in gym:train, on which arms are trained; tune on a split of its own",
        ),
        ({"arms": {"opd": {}, "b": {"tuned_like": "opd"}}}, "tuned_like is opd, which is no arm"),
        ({"seeds": [1, 1]}, "holds one twice"),
        ({"tune": {"lrs": [1e-3, 1.0000001e-3]}}, "holds 0.001 twice"),
        ({"arms": {"opd": {}, "opd-seed0": "untouched"}}, "would have the directory of a run of arm opd"),
        ({"name": None}, "study.yaml: name is null, which is no text: give it some, or leave it out"),
        ({"name": False}, "name is false, which is no text: write it in quotes, as yes, no, on and off are"),
        ({"name": 2024}, "name is 2024, which is no text: write it in quotes"),
        ({"name": "../up"}, "name is '../up', which cannot name a directory"),
        ({"arms": {"opd": {}, False: {}}}, "arms: the name false is no text: write it in quotes, as yes, no"),
        ({"arms": {"opd": {}, 1: {}}}, "arms: the name 1 is no text: write it in quotes"),
        ({"base_arm": False}, "base_arm is false, which is no text: write it in quotes"),
        ({"seeds": 10**10}, "seeds: 10000000000 is more than 10,000 seeds"),
        ({"seed": 1}, "unknown key seed; did you mean seeds? a study has name"),
        ({"budget": {"steps": 2}}, "unknown key budget.steps; budget has updates, "),
        ({"parallel": {"processes": 0}}, "at least 1"),
        ({"base": 3}, "base must be a mapping"),
        ({"arms": ["opd", "trd"]}, "it must be a mapping, such as {opd: {}, trd: "),
        ({"parallel": [2]}, "parallel is '[2]'; it must be a mapping"),
        ({"base": {"optim": {"lr": -1}}}, "base: optim.lr is -1"),
        ({"base": "nowhere.yaml"}, "study.yaml: base is nowhere.yaml: no such config file, beside this one"),
        ({"base": ""}, "study.yaml: base: '' is no path: it is empty"),
        ({"arms": {"opd": {"optim": 5}}, "budget": {"updates": 3}}, "arm opd: optim is 5"),
        ({"arms": {"opd": {"optim": ["steps"]}}, "budget": {"updates": 3}}, "arm opd: optim is ['steps']"),
        ({"evals": {"splits": ["gym:hard", "gym:hard?late=1"]}}, "gym:hard and gym:hard?late=1 would both"),
        ({"evals": {"splits": ["no/file.jsonl"]}}, "'no/file.jsonl': no such file or directory in "),
        ({"tune": {"lrs": [1, 2], "split": "no/file.parquet"}}, "'no/file.parquet': no such file"),
        ({"tune": {"lrs": [1, 2], "split": "pack:nothing"}}, "pack:nothing"),
        ({"base": {"data": {"train": "no/file.jsonl"}}}, "'no/file.jsonl': no such file or directory"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str, make: Make, in_process: list[Job]
) -> None:
    with pytest.raises(UserError) as error:
        run_study(make(**changes), quiet=True)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not in_process
    assert not Path(yaml.safe_load(make().read_text())["dir"]).exists(), "nothing is written"


def test_data_is_opened_before_anything_runs_and_where_something_is_left(
    make: Make, in_process: list[Job], study_files: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test.jsonl"
    text = (study_files / "test.jsonl").read_text()
    changes: dict[str, Any] = {
        "arms": {"opd": {}},
        "seeds": 1,
        "evals": {"splits": {"test": str(test)}, "n": 2, "k": 1, "limit": 4},
    }
    test.write_text('{"prompt": "1+1=?"}\n')
    with pytest.raises(UserError, match="'test': 1 of 1 prompts have no answer"):
        run_study(make(**changes), quiet=True)
    test.write_text(text)  # mended: no other data than the study began with, since it did not begin
    run_study(make(**changes), quiet=True)
    test.unlink()
    run_study(make(**changes), quiet=True)
    assert len(in_process) == 1
    for late in ({"seeds": 2}, {"evals": {**changes["evals"], "n": 3}}):
        with pytest.raises(UserError, match="no such file or directory"):
            run_study(make(**{**changes, **late}), quiet=True)
    assert len(in_process) == 1


def test_what_names_stand_for_is_the_same_to_the_end(
    make: Make, in_process: list[Job], study_files: Path, tmp_path: Path
) -> None:
    """Weights, directories of data, a chat template; of older studies none is known."""
    models = {
        name: Path(shutil.copytree(study_files / name, tmp_path / name)) for name in ("student", "teacher")
    }
    rows = [json.loads(line) for line in (study_files / "train.jsonl").read_text().splitlines()]
    saved, template = tmp_path / "saved", tmp_path / "chat.jinja"
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:8])).save_to_disk(saved)
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    base = best_of_test(study_files) | {
        "student": {"model": str(models["student"]), "device": "cpu"},
        "teacher": {"model": str(models["teacher"]), "device": "cpu"},
        "data": {"train": f"{saved}:train", "chat_template": str(template)},
        "optim": {"steps": 1},
        "run": {"save_every": 0, "trajectories_every": 0},
    }
    path = make(base=base, arms={"opd": {}}, seeds=1)
    begun_with = run_study(path, quiet=True).directory / "sources.json"
    known = json.loads(begun_with.read_text())
    assert {str(models["student"]), str(models["teacher"]), f"{saved}:train", str(template)} < known.keys()

    def change(name: str, file: Path) -> None:
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        with pytest.raises(UserError, match=re.escape(f"{name} has changed since the study in")):
            run_study(path, quiet=True)
        kept = {key: digest for key, digest in known.items() if key != name}
        begun_with.write_text(json.dumps(kept))
        run_study(path, quiet=True)  # nobody knows what it was
        file.write_bytes(before)
        begun_with.write_text(json.dumps(known))

    for name, model in models.items():
        change(str(model), model / ("model.safetensors" if name == "student" else "tokenizer.json"))
    change(f"{saved}:train", next((saved / "train").glob("*.arrow")))
    change(str(template), template)
    (saved / "test" / "state.json").touch()
    (models["student"] / "README.md").write_text("a card")
    run_study(path, quiet=True)
    assert len(in_process) == 1


def test_a_study_whose_runs_have_done_nothing_has_not_begun(
    make: Make, study_files: Path, tmp_path: Path
) -> None:
    """What kept them from it may be mended."""
    model = Path(shutil.copytree(study_files / "student", tmp_path / "student"))
    config = study.load_study(make(base={"student": {"model": str(model)}}))
    config.directory.mkdir(parents=True)
    sources.claim(config)
    (model / "tokenizer_config.json").write_text("{}")
    sources.claim(config)
    metrics = config.directory / "runs" / "opd-seed0" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 1}\n')
    sources.claim(config)
    (model / "tokenizer_config.json").write_text("{ }")
    with pytest.raises(UserError, match="student has changed since the study"):
        sources.claim(config)


def test_a_data_file_that_cannot_be_read(
    make: Make, in_process: list[Job], study_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads whatever it likes, so the refusal is the test's own."""
    real, closed = Path.open, str(study_files / "test.jsonl")

    def refuses(self: Path, *arguments: Any, **options: Any) -> Any:
        if str(self) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return real(self, *arguments, **options)

    sources._read.cache_clear()
    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(UserError, match=r"test\.jsonl: cannot be read: Permission denied$"):
        sources.digests(study.load_study(make()))
    assert main(["study", str(make()), "--quiet"]) == 2
    assert not in_process


def test_unreadable_studies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        study.load_study(tmp_path / "none.yaml")
    for text, sentence in (("a: [", "not valid YAML"), ("- 1", "must be a mapping"), ("{}", "arms is")):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            study.load_study(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "base: {data: {train: gym:train}}\nseeds: 2",
            "arms is missing: it has no default, so set it, such as {",
        ),
        (
            "base: {}\narm: {opd: {}}",
            "unknown key arm; did you mean arms? a study has name, dir, base, arms, ",
        ),
        ("optim: {steps: 2}\narm: {opd: {}}", "unknown key optim; a study has name"),
        ("optim: {steps: 2}", "has no arms: it is the config of one run; use onpath train"),
    ],
)
def test_arms_that_are_not_there(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        study.load_study(path)
    assert "train" not in str(error.value) or "onpath train" in str(error.value)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "étude.yaml",
            "called by its file, and 'étude' cannot name the directory of its results: give it a name",
        ),
        ("my study/config.yaml", "called by its directory, and 'my study' cannot"),
    ],
)
def test_a_file_whose_name_names_no_directory(file: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("arms: {opd: {}}")
    with pytest.raises(UserError, match=re.escape(said)):
        study.load_study(path)
    path.write_text("arms: {opd: {}}\nname: mine")
    assert study.load_study(path).name == "mine"


def test_names_bases_and_layers(make: Make, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 0.5}\nmethod: {name: opd, divergence: forward_kl}\n")
    text = make(
        base="base.yaml",
        arms={"opd": {"rollout.prompts": 3}, "topd": {"method": {"name": "topd"}, "method.window": 7}},
    ).read_text()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(text.replace("name: tiny\n", "").replace("base.yaml", "../base.yaml"))
    config = study.load_study(folder / "config.yaml")
    assert config.name == "mine"
    opd, topd = (plan.arm_config(config, arm) for arm in ("opd", "topd"))
    assert (opd.optim.lr, opd.rollout.prompts, opd.method.divergence) == (0.5, 3, "forward_kl")
    assert topd.method.divergence == "reverse_kl"  # topd's own default, not the base's option of opd
    assert topd.method.window == 7  # type: ignore[union-attr]
    assert (opd.eval.n, opd.eval.k, opd.eval.start, opd.data.eval_limit) == (4, 2, False, 16)


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"optim.lr": 1, "optim": {"steps": 2}}, {"optim": {"lr": 1, "steps": 2}}),
        ({"data": {"eval": {"math.hard": "a"}}}, {"data": {"eval": {"math.hard": "a"}}}),
        ({"data.eval.math.hard": "a"}, {"data": {"eval": {"math.hard": "a"}}}),
        ({"data.eval": {"math.hard": "a"}}, {"data": {"eval": {"math.hard": "a"}}}),
        ({"data": {"eval.hard": "a", "eval": {"b": "c"}}}, {"data": {"eval": {"hard": "a", "b": "c"}}}),
        ({"teachers": {"qwen2.5": {"model": "a"}}}, {"teachers": {"qwen2.5": {"model": "a"}}}),
        ({"teachers": {"a.model": {"model": "a"}}}, {"teachers": {"a.model": {"model": "a"}}}),
        ({"teachers.qwen2.5.model": "a"}, {"teachers": {"qwen2.5": {"model": "a"}}}),
        ({"teachers": {"qwen2.5.model": "a"}}, {"teachers": {"qwen2.5": {"model": "a"}}}),
        ({"teachers.qwen2.5": {"model": "a"}}, {"teachers": {"qwen2.5": {"model": "a"}}}),
        ({"teachers.a.extra_body.x.y": 1}, {"teachers": {"a": {"extra_body": {"x.y": 1}}}}),
        ({"teachers.a.mixture": {"b.c": 1}}, {"teachers": {"a": {"mixture": {"b.c": 1}}}}),
        ({"rewards": {"short.er": {"name": "f"}}}, {"rewards": {"short.er": {"name": "f"}}}),
        (
            {"rewards": [{"name": "f"}], "rollout.vllm.a.b": 1},
            {"rewards": [{"name": "f"}], "rollout": {"vllm": {"a.b": 1}}},
        ),
    ],
)
def test_dots_of_names_of_one_s_own_stay(tree: dict[str, Any], found: dict[str, Any]) -> None:
    assert nested(tree) == found


def test_sets_with_dots_in_their_names(make: Make, study_files: Path) -> None:
    file = str(study_files / "test.jsonl")
    config = study.load_study(make(base={"data": {"eval": {"math.hard": file}}}, evals={"n": 1, "k": 1}))
    assert plan.arm_config(config, "opd").data.eval == {"math.hard": file}


def test_a_base_lies_beside_the_study_or_in_the_working_directory(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "here"):
        (tmp_path / name).mkdir()
    path = make(base="base.yaml", arms={"opd": {}}).rename(tmp_path / "mine" / "study.yaml")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "base.yaml").write_text("optim: {lr: 0.25}\n")
    assert study.load_study(path).base.optim.lr == 0.25
    (tmp_path / "mine" / "base.yaml").write_text("optim: {lr: 0.5}\n")
    assert study.load_study(path).base.optim.lr == 0.5, "the one beside it comes first"


def test_budgets_in_seconds_and_notes_where_missed(make: Make) -> None:
    config = study.load_study(
        make(budget={"wall_seconds": 30}, arms={"opd": {}, "b": {"budget": {"updates": 9}}, "c": {}})
    )
    use = Used(updated_tokens=100, tokens_generated_student=80, tokens_generated_teacher=40, wall_seconds=0.5)
    assert steps_of(config, {"opd": use}) == {"opd": 60, "b": 9}  # c's pilot failed
    assert [job.name for job in plan.pilots(config)] == ["opd", "c"]
    spent = Used(updated_tokens=1, tokens_generated_student=1, tokens_generated_teacher=0, wall_seconds=36.0)
    assert missed(config, {"opd": spent, "b": spent}) == ["opd used 36 wall_seconds, +20% of its budget 30"]


def test_two_studies_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="another onpath study is at work"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass  # free again


@pytest.mark.parametrize(
    ("processes", "gpus", "seen"),
    [
        (3, "47", ["4", "7", "4"]),
        (2, "47", ["4", "7"]),
        (1, "47", ["4,7"]),  # a teacher on another GPU than the student: teacher.device: cuda:1
        (2, "01234", ["0,1", "2,3"]),
    ],
)
def test_slots_give_threads_and_gpus(processes: int, gpus: str, seen: list[str]) -> None:
    slots = Slots(processes=processes, threads=2, gpus=tuple(gpus))
    environments = [one for i in range(processes) for one in slots.environments(i)]
    assert not any("RANK" in e for e in environments)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == seen
    assert {e["OMP_NUM_THREADS"] for e in environments} == {"2"}


def test_processes_of_a_run_meet_at_a_place_of_their_own() -> None:
    slots = Slots(processes=2, threads=1, gpus=tuple("0123"), ranks=2)
    first, second = slots.environments(0), slots.environments(1)
    for run, gpus in ((first, "0,1"), (second, "2,3")):
        assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in run] == [
            ("0", "0", "2"),
            ("1", "1", "2"),
        ]
        assert {e["CUDA_VISIBLE_DEVICES"] for e in run} == {gpus}
        assert len({e["MASTER_PORT"] for e in run}) == 1
    assert first[0]["MASTER_PORT"] != second[0]["MASTER_PORT"]


@pytest.mark.parametrize(
    ("asked", "gpus", "processes"),
    [
        ({"ranks": 4}, 8, 2),
        ({"ranks": 3}, 8, 2),
        ({"ranks": 8}, 8, 1),
        ({"processes": 2, "ranks": 4}, 8, 2),
        ({"processes": 3, "ranks": 4}, 8, None),
        ({"ranks": 9}, 8, None),
        ({"processes": 9}, 8, 9),  # of one process each: they may share
    ],
)
def test_no_two_processes_of_a_run_share_a_gpu(
    asked: dict[str, Any], gpus: int, processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_jobs, "_visible_gpus", lambda: tuple(map(str, range(gpus))))
    parallel = Parallel.model_validate(asked)
    if processes is None:
        with pytest.raises(UserError, match=rf"need (9|12) GPUs, and {gpus} are visible"):
            slots_for(parallel, "cuda")
    else:
        assert slots_for(parallel, "cuda").processes == processes


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a study are forks of this one, which has imported everything."""

    def start(work: str, path: Path, *, log: Path, lock: int, environment: Mapping[str, str]) -> BaseProcess:
        def run() -> int:
            with log.open("ab") as output:
                os.dup2(output.fileno(), 2)
            os.environ.update(environment)
            return int(getattr(worker, work)(path))

        return begun(run)

    monkeypatch.setattr(forked, "start", start)


@pytest.mark.usefixtures("forks")
def test_runs_of_several_processes_find_what_runs_of_one_find(make: Make, tmp_path: Path) -> None:
    """Sharded too, and so do the untrained and what finished runs are asked anew."""
    arms = {
        "opd": {},
        "lora": {"student": {"lora_rank": 4, "lora_alpha": 8.0}, "parallel.shard": "layer"},
        "layer": {"parallel.shard": "layer"},
        "untouched": "untouched",
        "teacher": "teacher",
    }
    found = {}
    for ranks in (1, 2):
        options = {"dir": str(tmp_path / f"of-{ranks}"), "arms": arms, "seeds": 1}
        options["parallel"] = {"processes": 2 // ranks, "ranks": ranks}
        run_study(make(**options), quiet=True)
        evals = {**yaml.safe_load(make().read_text())["evals"], "n": 6, "limit": 12}
        again = run_study(make(**options, evals=evals), quiet=True)
        rows = result(again.directory)["arms"]
        found[ranks] = {row["arm"]: row["evals"] for row in rows}
        assert len(found[ranks]) == len(arms)
        layer, opd = (next(r for r in rows if r["arm"] == arm) for arm in ("layer", "opd"))
        assert layer["updated_tokens"] == opd["updated_tokens"], "sharding changes nothing"
    assert found[1] == found[2]


@pytest.mark.usefixtures("forks")
def test_a_run_of_several_processes_that_fails_says_why(make: Make, tmp_path: Path) -> None:
    path = make(arms={"opd": {}}, seeds=1, parallel={"processes": 1, "ranks": 3})
    tree = yaml.safe_load(path.read_text())
    tree["base"]["parallel"] = {"shard": "layer", "hosts": 2}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="hosts is 2, which does not divide 3 processes"):
        run_study(path, quiet=True)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            r"was killed by SIGKILL \(often: out of memory\) \(log: ",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), r"was killed by SIGUSR1 \(log: "),
        (lambda: sys.exit(1), r"ended without a word \(log: "),
        (lambda: guarded(partial(fail, "no such file")), r"no such file \(log: "),
    ],
)
def test_a_process_that_dies_is_reported(
    ends: Callable[[], Any], said: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own end, not by what an earlier one had said."""
    config = study.load_study(make(arms={"opd": {}}, seeds=1))
    (job,) = plan.runs(config, {"opd": 1}, {})

    def ending(log: Path) -> None:
        with log.open("ab") as output:
            os.dup2(output.fileno(), 2)
        ends()

    def start(work: str, path: Path, *, log: Path, **options: Any) -> BaseProcess:
        return begun(partial(ending, log))

    monkeypatch.setattr(forked, "start", start)
    log = config.directory / "logs" / "runs-opd-seed0.txt"
    log.parent.mkdir(parents=True)
    log.write_text("onpath: an error of the process before\n")
    progress = Progress(console=Console(quiet=True), processes=1, total=1)
    with locked(config.directory) as lock:
        failed = run_jobs([job], Slots(processes=1, threads=1), progress, study=config.directory, lock=lock)
    assert re.match(said, failed["opd-seed0"])
    assert progress.done == 1


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (lambda: sys.exit(9), r"process 1 ended without a word \(log: "),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"process 1 was killed by SIGKILL \(often: out of m"),
        (lambda: guarded(partial(fail, "no such file")), r"no such file \(log: "),
    ],
)
def test_what_is_left_of_a_run_ends_when_one_of_its_processes_has(
    ends: Callable[[], Any], said: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may wait in an exchange, which nobody ends; what they say of it is not why."""
    config = study.load_study(make(arms={"opd": {}}, seeds=1))
    (job,) = plan.runs(config, {"opd": 1}, {})

    def start(work: str, path: Path, *, log: Path, environment: Mapping[str, str], **_: Any) -> BaseProcess:
        def run() -> int:
            with log.open("ab") as output:
                os.dup2(output.fileno(), 2)
            if environment["RANK"] == "1":
                return int(ends() or 0)
            time.sleep(0.3)
            print(
                "onpath: another process of this run has ended before its time", file=sys.stderr, flush=True
            )
            time.sleep(600)
            return 2

        return begun(run)

    monkeypatch.setattr(forked, "start", start)
    monkeypatch.setattr(study_jobs, "_GRACE", 1.0)
    progress = Progress(console=Console(quiet=True), processes=1, total=1)
    slots = Slots(processes=1, threads=1, ranks=2)
    with locked(config.directory) as lock:
        failed = run_jobs([job], slots, progress, study=config.directory, lock=lock)
    assert re.match(said, failed["opd-seed0"])


def fail(sentence: str) -> None:
    raise UserError(sentence)


def test_time_left_counts_what_is_ahead(make: Make) -> None:
    config = study.load_study(make(arms={"opd": {}, "b": {}}, seeds=2))
    jobs = plan.stages(config)[2]
    progress = Progress(console=Console(quiet=True), processes=2, ahead=jobs[2:])
    assert progress.seconds_left([], []) is None
    progress.took = [(jobs[0], 10.0), (jobs[1], 30.0)]
    assert progress.seconds_left([], []) == pytest.approx((10 + 30) / 2)


@pytest.mark.skipif(not RECIPE.exists(), reason="the recipe is not part of the package")
def test_every_arm_of_the_recipe_is_valid_and_another() -> None:
    config = study.load_study(RECIPE)
    plan.check_alike(config)
    assert len(config.seeds) >= 5
    resolved = {name: plan.arm_config(config, name) for name in config.trained}
    bodies = {name: c.model_dump_json() + str(config.budget_of(name)) for name, c in resolved.items()}
    assert len(set(bodies.values())) == len(bodies)
    assert {c.method.name for c in resolved.values()} == {"opd", "opsd", "trd", "topd"}


def test_what_the_highest_mean_is_said_to_be() -> None:
    """By the pairs that there are, not the seeds that were asked for; and of whom it is not."""
    leader = {"highest": "b", "mean": 0.9, "not_told_apart": [], "pairs": 1, "without": []}
    data = {"study": {"seeds": [0, 1]}, "leaders": {"test": leader}}
    assert sentences(data)[0].endswith("no winner: one seed does not say what another would have given.")
    data["leaders"] = {"test": leader | {"pairs": 2, "without": ["teacher"]}}
    assert sentences(data) == [
        "test, teacher aside: the highest mean is b's, 90.0%; ahead of every other arm."
    ]


@pytest.mark.parametrize(
    ("late", "said"),
    [
        (-0.3, "; ahead of every other arm."),  # an arm far behind, whose other seeds failed
        (0.15, "no winner: late has no two seeds in common with it, and one does not say what another would"),
        (0.5, "; no winner: one seed does not say what another would"),
    ],
)
def test_one_seed_of_an_arm_is_nothing_to_the_others(late: float, said: str, make: Make) -> None:
    config = study.load_study(make(arms={"opd": {}, "trd": {}, "late": {}}, seeds=5))
    rng = np.random.default_rng(0)
    problems = rng.uniform(0.3, 0.6, size=100)

    def scores(above: float, seeds: int) -> dict[int | None, np.ndarray]:
        return {s: np.clip(problems + above + 0.02 * rng.standard_normal(100), 0, 1) for s in range(seeds)}

    by_arm = {"opd": scores(0.0, 5), "trd": scores(0.3, 5), "late": scores(late, 1)}
    leader = results._leaders(config, by_arm)
    assert leader is not None
    data = {"study": {"seeds": config.seeds}, "leaders": {"test": leader}}
    assert said in sentences(data)[0]
    one = results._leaders(config, {arm: {0: held[0]} for arm, held in by_arm.items()})
    assert sentences({**data, "leaders": {"test": one}})[0].endswith(
        "no winner: one seed does not say what another would have given."
    )


def test_a_rate_that_comes_back_comes_too_late(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run had failed when the arm's own runs began; they keep the rate that they have."""
    config = study.load_study(make(arms={"opd": {}, "b": {}}, tune={"lrs": [1e-3, 2e-3, 4e-3]}))
    jobs = plan.tuning(config, {"opd": 1, "b": 1})
    score: dict[float, float | None] = {1e-3: 0.3, 2e-3: 0.1 + 0.2, 4e-3: None}
    monkeypatch.setattr(
        results, "_tried", lambda job: {"lr": job.config.optim.lr, "avg_at_k": score[job.config.optim.lr]}
    )
    table, rates = results.tuned(config, jobs, {})
    assert rates == {"opd": 1e-3, "b": 1e-3}, "of equal ones the lower, whatever the last bit says"
    assert [row["at_edge"] for row in table] == [True, True]
    assert "opd, 0.001, was chosen without 0.004" in results.tuning_notes(table)[0]
    score[4e-3] = 0.9
    again, rates = results.tuned(config, jobs, {"opd": {"lr": 1e-3, "without": [4e-3]}})
    assert rates == {"opd": 1e-3, "b": 4e-3}
    assert [row["without"] for row in again] == [[4e-3], []]


def failing(broken: set[str]) -> Callable[..., dict[str, str]]:
    """As `run_jobs`, in this process; runs of these names fail while they are in the set."""

    def run(jobs: list[Job], *rest: Any, **more: Any) -> dict[str, str]:
        for job in jobs:
            if job.name not in broken and not job.finished:
                train(job.config, quiet=True)
        return {job.name: "no memory" for job in jobs if job.name in broken}

    return run


def test_a_study_goes_on_when_a_rate_comes_back(
    make: Make, study_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = {"lrs": [0.02, 0.002], "split": str(study_files / "held.jsonl"), "limit": 4}
    config, broken = study.load_study(make(arms={"opd": {}}, seeds=1, tune=tune)), {"opd-lr0.02"}
    monkeypatch.setattr(study, "run_jobs", failing(broken))
    first = study.carry_out(config, command="", quiet=True)
    assert first.data["tuning"][0]["chosen"] == 0.002
    assert any("was chosen without 0.02" in note for note in first.data["notes"])
    broken.clear()
    second = study.carry_out(config, command="", quiet=True)
    assert second.data["tuning"][0]["chosen"] == 0.002
    assert second.data["tuning"][0]["grid"][1]["avg_at_k"] is not None
    assert second.data["rows"] == first.data["rows"]


def test_a_study_goes_on_when_all_rates_come_back(
    make: Make, study_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was chosen, so that nothing is kept."""
    tune = {"lrs": [0.02, 0.002], "split": str(study_files / "held.jsonl"), "limit": 4}
    config, broken = (
        study.load_study(make(arms={"opd": {}}, seeds=1, tune=tune)),
        {"opd-lr0.02", "opd-lr0.002"},
    )
    monkeypatch.setattr(study, "run_jobs", failing(broken))
    said = r"2 of the study's runs failed, first opd-lr0\.02: no memory"
    with pytest.raises(study.NothingFinished, match=said):
        study.carry_out(config, command="", quiet=True)
    broken.clear()
    data = study.carry_out(config, command="", quiet=True).data
    assert data["tuning"][0]["chosen"] == data["arms"][0]["lr"] in (0.02, 0.002)
    assert data["tuning"][0]["without"] == []
    assert data["notes"] == [note for note in data["notes"] if "chosen without" not in note]


@pytest.mark.parametrize("wanted", [0.0, 0.5])
def test_a_budget_of_next_to_nothing_can_be_told(wanted: float, make: Make) -> None:
    config = study.load_study(
        make(arms={"opd": {"budget": {"wall_seconds": "b"}}, "b": {}}, budget={"updates": 1})
    )
    use = dict.fromkeys(("updated_tokens", "tokens_generated_student", "tokens_generated_teacher"), 1.0)
    both = {"opd": Used(**use, wall_seconds=0.8), "b": Used(**use, wall_seconds=wanted)}
    (note,) = missed(config, both)
    percent = ", +60%" if wanted else ""
    assert note == f"opd used 0.8 wall_seconds{percent} of its budget {wanted:.3g}"
    with pytest.raises(UserError, match="arm opd: its steps use no wall_seconds"):
        steps_of(config, {**both, "opd": Used(**use, wall_seconds=0.0)})


def test_no_winner_from_one_seed() -> None:
    leader = {"highest": "b", "mean": 0.9, "not_told_apart": []}
    said = {
        seeds: sentences({"study": {"seeds": list(range(seeds))}, "leaders": {"test": row}})[0]
        for seeds, row in ((1, leader), (2, leader), (3, leader | {"not_told_apart": ["a", "c"]}))
    }
    assert said[1].endswith("no winner: one seed does not say what another would have given.")
    assert said[2].endswith("ahead of every other arm.")
    assert said[3].endswith("no winner: not told apart from it: a, c.")
