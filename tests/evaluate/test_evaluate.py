"""pass@k, intervals, paired comparisons, and evaluation with a made-up engine."""

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from onpath.evaluate.scores import (
    EvalResult,
    compare,
    evaluate,
    paired_difference,
    pass_at_k,
    read_details,
    write_details,
)
from onpath.evaluate.stats import bootstrap_interval, difference_interval, sign_flip_p_value, wilson_interval
from onpath.grade.exact import ExactGrader
from onpath.records import Graded, Prompt, Rollout, Sampling
from onpath.system.errors import UserError


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n=n, c=c, k=k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_equals_the_product_form_at_any_size(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2000))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    misses = Fraction(1)
    for i in range(min(k, n - c + 1)):
        misses *= Fraction(n - c - i, n - i)
    value = pass_at_k(n=n, c=c, k=k)
    assert value == float(1 - misses)
    if k < n:
        assert value <= pass_at_k(n=n, c=c, k=k + 1)


def test_pass_at_k_keeps_digits_where_one_minus_would_lose_them() -> None:
    assert pass_at_k(n=10**6, c=1, k=1) == 1e-6
    assert pass_at_k(n=np.int64(4), c=np.int64(1), k=np.int64(2)) == 0.5


def test_pass_at_k_is_unbiased() -> None:
    """Over binomial counts its expectation is the chance that k fresh samples hold a right one."""
    p, n, k = 0.3, 7, 3
    expectation = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n=n, c=c, k=k) for c in range(n + 1)
    )
    assert expectation == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(4, 1, 5), (4, 5, 2), (4, -1, 2), (4, 1, 0), (4, 1, -1), (0, 0, 1), (-4, 0, 1)]
)
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n=n, c=c, k=k)


def test_pass_at_k_refuses_fractions() -> None:
    with pytest.raises(TypeError):
        pass_at_k(n=4, c=1.5, k=2)  # type: ignore[arg-type]


def test_bootstrap_equals_scipys() -> None:
    scores = np.random.default_rng(0).integers(0, 5, size=80) / 4
    theirs = scipy.stats.bootstrap(
        (scores,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_interval(scores, resamples=20_000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)


@pytest.mark.parametrize("problems", [3, 5, 10, 60])
def test_intervals_cover_the_truth(problems: int) -> None:
    """400 data sets, 4 samples a problem: 95% within 3 standard errors. A bootstrap as it is covers 86% with
    five problems."""
    rng = np.random.default_rng(0)
    hits, paired = 0, 0
    for trial in range(400):
        ours, theirs = (rng.binomial(4, rng.beta(1.0, 1.5, size=problems)) / 4 for _ in range(2))
        low, high = bootstrap_interval(ours, seed=trial, resamples=500)
        hits += low <= 0.4 <= high
        low, high = difference_interval(ours - theirs, seed=trial, resamples=500)
        paired += low <= 0.0 <= high
    assert min(hits, paired) / 400 >= 0.917
    assert problems < 60 or max(hits, paired) / 400 <= 0.985


@pytest.mark.parametrize("interval", [bootstrap_interval, difference_interval])
def test_one_problem_that_differs_does_not_make_the_others_certain(interval: Any) -> None:
    """30 zeros leave room for 11% that were never seen; so do 29 and a sixteenth."""
    _, none = interval([0.0] * 30)
    _, one = interval([0.0] * 29 + [1 / 16])
    assert none == pytest.approx(0.1135, abs=1e-4)
    assert none < one < none + 0.01
    low, _ = interval([1.0] * 29 + [15 / 16])
    assert low < 0.9


def test_bootstrap_is_seeded_and_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(30)
    whole = bootstrap_interval(scores, seed=1)
    assert whole == bootstrap_interval(scores, seed=1)
    assert whole != bootstrap_interval(scores, seed=2)
    assert whole != bootstrap_interval(scores, seed=1, resamples=9000)
    monkeypatch.setattr("onpath.evaluate.stats.CHUNK_ENTRIES", 100)
    assert whole == bootstrap_interval(scores, seed=1)


@pytest.mark.parametrize(
    ("scores", "expected"), [([1.0] * 10, (0.722, 1.0)), ([0.0] * 10, (0.0, 0.278)), ([1.0], (0.207, 1.0))]
)
def test_equal_scores_get_wilsons_interval(scores: list[float], expected: tuple[float, float]) -> None:
    assert bootstrap_interval(scores) == pytest.approx(expected, abs=5e-4)


def test_rounding_is_no_difference() -> None:
    rounded = [0.3 - 0.2, 0.2 - 0.1, 0.1 - 0.0]
    assert len(set(rounded)) > 1
    assert bootstrap_interval(rounded) == pytest.approx(bootstrap_interval([0.1] * 3))
    assert sign_flip_p_value([0.3 - 0.2 - 0.1, 0.2 - 0.1 - 0.1, 0.1 + 0.2 - 0.3]) == 1.0


@pytest.mark.parametrize(("hits", "trials"), [(0, 7), (3, 7), (7, 7), (50, 100)])
def test_wilson_equals_scipys(hits: int, trials: int) -> None:
    theirs = scipy.stats.binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson_interval(hits / trials, trials=trials) == pytest.approx(
        (theirs.low, theirs.high), abs=1e-12
    )


def test_an_interval_holds_what_was_measured() -> None:
    """Also where rounding says otherwise: a picture has no bars of negative length."""
    for trials in range(1, 200):
        for share in (0.0, 1.0, 1 / trials):
            low, high = wilson_interval(share, trials=trials)
            assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("scores", [[], [0.5, float("nan")], [[0.5]]])
def test_statistics_refuse_what_is_no_vector(scores: list[float]) -> None:
    for function in (bootstrap_interval, difference_interval, sign_flip_p_value):
        with pytest.raises(ValueError, match="one finite number per problem"):
            function(scores)


def test_scores_lie_within_zero_and_one() -> None:
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        bootstrap_interval([0.5, 1.5])


def enumerated(differences: Sequence[float]) -> Fraction:
    """All sign patterns in exact arithmetic."""
    exact = [Fraction(d).limit_denominator(1000) for d in differences]
    signs = itertools.product((-1, 1), repeat=len(exact))
    sums = [abs(sum(s * d for s, d in zip(row, exact, strict=True))) for row in signs]
    return Fraction(sum(s >= abs(sum(exact)) for s in sums), len(sums))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-10, 10).map(lambda tenths: tenths / 10), min_size=1, max_size=9))
def test_few_differences_get_the_exact_p_value(differences: list[float]) -> None:
    assert sign_flip_p_value(differences) == float(enumerated(differences))


def test_many_differences_get_a_p_value_near_scipys() -> None:
    differences = np.random.default_rng(3).normal(0.05, 0.3, size=120)
    theirs = scipy.stats.permutation_test(
        (differences, np.zeros_like(differences)), lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples", n_resamples=20_000, vectorized=True, rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert 0.01 < theirs < 0.5
    assert sign_flip_p_value(differences) == pytest.approx(theirs, abs=0.015)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    p_values = [sign_flip_p_value(rng.normal(size=25), seed=trial, resamples=500) for trial in range(300)]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


def test_paired_difference_by_hand() -> None:
    a = {"p": [1, 1], "q": [1, 0], "r": [True, True]}
    b = {"r": [False], "q": [0.5], "p": [0.0]}
    result = paired_difference(a, b)
    assert (result.problems, result.mean_a, result.mean_b) == (
        3,
        pytest.approx(2.5 / 3),
        pytest.approx(0.5 / 3),
    )
    assert result.difference == pytest.approx(2 / 3)
    assert result.ci95 == (-1.0, 1.0)  # three problems say little
    assert result.p_value == 0.5
    swapped = paired_difference(b, a)
    assert (swapped.difference, swapped.p_value) == (-result.difference, 0.5)
    assert swapped.ci95 == (-1.0, 1.0)


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    a = {str(i): [h] for i, h in enumerate(hard)}
    b = {str(i): [h * 0.95] for i, h in reversed(list(enumerate(hard)))}
    low, high = paired_difference(a, b).ci95
    assert 0 < low < high < 0.05
    assert paired_difference(a, b).p_value < 0.001


def test_paired_difference_without_spread() -> None:
    same = {"p": [1.0], "q": [0.0]}
    assert paired_difference(same, same).ci95 == pytest.approx((-0.658, 0.658), abs=1e-3), "two tell little"
    assert paired_difference(same, same).p_value == 1.0
    assert paired_difference({"p": [1.0]}, {"p": [0.0]}).ci95 == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "graders", "reason"),
    [
        ({"p": [1]}, {"q": [1]}, None, "the second lacks problem 'p'"),
        ({"p": [1]}, {"p": [1], "q": [1]}, None, "the first lacks problem 'q'"),
        ({str(i): [1] for i in range(9)}, {"0": [1]}, None, "lacks problems '1', '2', '3' and 5 more"),
        ({"p": [1]}, {"p": [1]}, ("math", "exact"), "one was graded by 'math', the other by 'exact'"),
        ({"p": [1]}, {"p": []}, None, "no samples of problem 'p'"),
        ({}, {}, None, "there are no problems"),
    ],
)
def test_paired_difference_refuses(
    a: dict[str, list[float]], b: dict[str, list[float]], graders: tuple[str, str] | None, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        paired_difference(a, b, graders=graders)


PROMPTS = [Prompt(id=f"p{i}", text=f"{i}+{i}?", answer=str(2 * i)) for i in range(12)]
SAMPLING = Sampling(temperature=0.7, max_new_tokens=5, seed=3)


def engine(chance: float, sampling: Sampling = SAMPLING) -> Callable[[Sequence[Prompt], int], list[Rollout]]:
    """Ids are the digits of the answer, right with the given chance; every third response is cut."""

    def generate(prompts: Sequence[Prompt], n: int) -> list[Rollout]:
        rng = random.Random(0)
        rollouts = []
        for prompt, sample in itertools.product(prompts, range(n)):
            text = prompt.answer if rng.random() < chance else "999"
            ids = tuple(map(int, text or ""))
            rollouts.append(
                Rollout(
                    prompt=prompt, ids=ids, logprobs=(0.0,) * len(ids), policy_version=4,
                    finish_reason="stop" if sample % 3 else "length", sampling=sampling, sample=sample,
                )
            )  # fmt: skip
        return rollouts

    return generate


def decode(ids: Sequence[int]) -> str:
    return "".join(map(str, ids))


def run(
    chance: float, *, prompts: Sequence[Prompt] = PROMPTS, n: int = 6, k: int = 3
) -> tuple[EvalResult, list[Graded]]:
    return evaluate(prompts, engine(chance), decode, ExactGrader(), n=n, k=k, step=40, split="test")


def test_evaluate_counts() -> None:
    result, graded = run(0.5)
    right = np.array([g.correct for g in graded]).reshape(12, 6)
    assert result.avg_at_k == pytest.approx(right.mean())
    assert result.pass_at_k == pytest.approx(
        np.mean([pass_at_k(n=6, c=int(c), k=3) for c in right.sum(axis=1)])
    )
    assert result.ci95 == bootstrap_interval(right.mean(axis=1))
    assert result.ci95[0] < result.avg_at_k < result.ci95[1]
    assert result.pass_at_k_ci95[0] < result.pass_at_k < result.pass_at_k_ci95[1]
    assert result.mean_length == pytest.approx(np.mean([len(g.rollout.ids) for g in graded]))
    assert result.finished == pytest.approx(4 / 6)
    assert [p.id for p in result.details] == [p.id for p in PROMPTS]
    assert {p.id: list(p.correct) for p in result.details} == {f"p{i}": right[i].tolist() for i in range(12)}
    assert graded[0].extracted == decode(graded[0].rollout.ids)
    assert 0 < right.sum() < right.size


def test_result_as_a_line_of_eval_jsonl() -> None:
    line = json.loads(json.dumps(run(0.5)[0].to_json()))
    assert list(line) == [
        "step", "split", "n", "k", "problems", "avg_at_k", "ci95", "pass_at_k", "pass_at_k_ci95",
        "mean_length", "finished", "grader", "sampling",
    ]  # fmt: skip
    assert (line["step"], line["split"], line["n"], line["k"], line["problems"]) == (40, "test", 6, 3, 12)
    assert line["sampling"] == {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 5, "seed": 3}
    assert len(line["ci95"]) == len(line["pass_at_k_ci95"]) == 2
    assert line["grader"] == "exact"


def test_first_errors_are_shares_of_all_samples(tmp_path: Path) -> None:
    def kind(rollout: Rollout) -> str:
        return "early" if rollout.sample % 2 else "late"

    result, graded = evaluate(
        PROMPTS, engine(0.5), decode, ExactGrader(), n=6, k=3, step=0, split="test", error_kind=kind
    )
    assert result.first_errors is not None
    wrong = [kind(g.rollout) for g in graded if not g.correct]
    assert result.first_errors == {k: wrong.count(k) / 72 for k in ("early", "late")}
    assert sum(result.first_errors.values()) == pytest.approx(1 - result.avg_at_k)
    assert result.to_json()["first_errors"] == result.first_errors
    write_details(tmp_path / "d.jsonl", result)
    read = read_details(tmp_path / "d.jsonl").problems
    assert {i: p.errors for i, p in read.items()} == {p.id: p.errors for p in result.details}
    assert all((e is None) == c for p in read.values() for e, c in zip(p.errors, p.correct, strict=True))
    assert run(0.5)[0].first_errors is None


@pytest.mark.parametrize(
    ("prompts", "n", "k", "reason"),
    [
        (PROMPTS, 2, 3, "eval.k is 3, but must be between 1 and eval.n, the 2 samples"),
        (PROMPTS, 2, 0, "eval.k is 0"),
        ([], 2, 2, "evaluation set 'test' has no prompts"),
        (
            [PROMPTS[0], Prompt(id="x", text="?"), Prompt(id="y", text="?")],
            2,
            2,
            "'test': 2 of 3 .* the first is 'x'",
        ),
    ],
)
def test_evaluate_refuses_before_it_samples(prompts: list[Prompt], n: int, k: int, reason: str) -> None:
    def never(prompts: Sequence[Prompt], n: int) -> list[Rollout]:
        raise AssertionError("sampled")

    with pytest.raises(UserError, match=reason):
        evaluate(prompts, never, decode, ExactGrader(), n=n, k=k, step=0, split="test")


def test_an_engine_out_of_order_is_our_fault() -> None:
    def reversed_engine(prompts: Sequence[Prompt], n: int) -> list[Rollout]:
        return engine(0.5)(prompts, n)[::-1]

    with pytest.raises(AssertionError, match="n rollouts per prompt, in order"):
        evaluate(PROMPTS, reversed_engine, decode, ExactGrader(), n=2, k=1, step=0, split="test")


def test_saved_evaluations_compare_like_those_in_memory(tmp_path: Path) -> None:
    weak, strong = run(0.3)[0], run(0.8, n=4)[0]
    for name, result in (("weak", weak), ("strong", strong)):
        write_details(tmp_path / "eval_details" / f"{name}.jsonl", result)
    paths = [tmp_path / "eval_details" / f"{name}.jsonl" for name in ("strong", "weak")]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == ["strong.jsonl", "weak.jsonl"]
    difference = compare(*paths)
    assert difference == compare(strong, weak) == paired_difference(strong.scores, weak.scores)
    assert difference.difference == pytest.approx(strong.avg_at_k - weak.avg_at_k)
    assert difference.p_value < 0.01
    assert read_details(paths[0]).problems == {p.id: p for p in strong.details}
    table = pd.read_json(paths[0], lines=True)
    assert table["correct"].map(len).tolist() == [4] * 12
    assert set(table["grader"]) == {"exact"}


def test_compare_notes_other_sampling_and_refuses_other_problems(tmp_path: Path) -> None:
    ours = run(0.5)[0]
    cooler = replace(ours, sampling=replace(SAMPLING, temperature=0.0, max_new_tokens=9))
    assert compare(ours, cooler).notes == (
        "sampling.max_new_tokens: 5 against 9",
        "sampling.temperature: 0.7 against 0.0",
    )
    with pytest.raises(UserError, match=r"test at step 40 .* graded by 'exact', the other by 'math'"):
        compare(ours, replace(ours, grader="math"))
    same_ids = [replace(p, text=f"{p.text} Really?") for p in PROMPTS]
    with pytest.raises(UserError, match="problems 'p0', 'p1', 'p10' and 9 more not the same in both"):
        compare(ours, run(0.5, prompts=same_ids)[0])
    with pytest.raises(UserError, match="the second lacks problem 'p11'"):
        compare(ours, run(0.5, prompts=PROMPTS[:-1])[0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "details.jsonl: cannot be read: No such file"),
        ("", "holds no evaluation details"),
        ("{", "line 1: not a line of evaluation details"),
        ('{"id": "p0"}', "line 1: .*damaged: digest is missing"),
        ("[]", "line 1: .*list in place of an object"),
    ],
)
def test_foreign_details_are_a_users_error(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "details.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=reason):
        compare(path, path)


def test_details_of_two_evaluations_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "details.jsonl"
    lines = []
    for grader in ("exact", "math"):
        write_details(path, replace(run(0.5)[0], grader=grader))
        lines.append(path.read_text())
    path.write_text("".join(lines))
    with pytest.raises(UserError, match="mixes evaluations"):
        read_details(path)


def test_details_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_details(tmp_path / "file" / "details.jsonl", run(0.5)[0])
    (tmp_path / "taken.jsonl").mkdir()
    with pytest.raises(UserError, match=r"taken.jsonl: cannot write"):
        write_details(tmp_path / "taken.jsonl", run(0.5)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.jsonl"]
