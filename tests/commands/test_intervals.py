"""Intervals of a study stay where shares and their differences can be."""

import numpy as np
import pytest
import scipy.stats

from onpath.commands.study.intervals import difference, estimate, p_value
from onpath.commands.study.results import _judge


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_no_interval_leaves_what_is_possible(runs: int) -> None:
    """With two seeds that disagree the half width alone is above 1."""
    lots = np.random.default_rng(runs)
    scores = (lots.random((runs, 20)) < np.linspace(0.1, 0.9, runs)[:, None]).astype(float)
    low, high = difference(2 * scores - 1).ci95
    assert -1 <= low < high <= 1
    assert runs > 2 or (low, high) == (-1, 1)
    low, high = estimate(scores).ci95
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("runs", [2, 4, 6])
def test_seeds_that_agree_by_chance_leave_the_spread_of_the_problems(runs: int) -> None:
    """Their part of the variance is estimated below 0 then, and would narrow the problems' own."""
    lots, problems = np.random.default_rng(runs), 60
    interaction = lots.normal(0, 0.1, (runs, problems))
    interaction -= interaction.mean(axis=1, keepdims=True)  # every seed has the same mean
    values = lots.normal(0, 0.1 / runs**0.5, problems)[None] + interaction
    assert np.ptp(values.mean(axis=1)) < 1e-12
    of_problems = runs * np.var(values.mean(axis=0), ddof=1)
    least = scipy.stats.t.ppf(0.975, problems - 1) * np.sqrt(of_problems / values.size)
    low, high = difference(values).ci95
    assert (high - low) / 2 >= least * (1 - 1e-9)


@pytest.mark.parametrize(("runs", "problems", "n"), [(2, 20, 1), (2, 50, 1), (2, 20, 4), (3, 20, 1)])
def test_equal_means_by_chance_are_no_finding(runs: int, problems: int, n: int) -> None:
    """Counts are coarse: two seeds often have one mean. Under the null p is low as often as it says."""
    lots, found = np.random.default_rng(problems), []
    for _ in range(2000):
        right = lots.random(problems) * np.ones((2, runs, 1))
        ours, theirs = lots.binomial(n, right) / n
        found.append(difference(ours - theirs))
    assert min(f.ci95[1] - f.ci95[0] for f in found) > 0.02
    low = np.array([f.p_value for f in found])
    assert np.mean(low < 0.05) <= 0.055
    assert np.mean(low < 0.05 / 20) <= 0.006


@pytest.mark.parametrize("runs", [2, 3, 4, 5])
def test_seeds_and_problems_without_a_part_leave_the_rest(runs: int) -> None:
    """Each seed is ahead on one problem, and each problem has one such seed."""
    found = difference(np.eye(runs))
    assert found.ci95[0] < found.mean < found.ci95[1]
    assert 0 < p_value(np.eye(runs)) <= 1


def test_an_interval_that_covers_0_is_no_verdict() -> None:
    """All differences are equal: the signs tell, and problems that were not asked may yet be others."""
    rows = []
    for value in (1 / 8, 1.0):
        found = difference(np.full((2, 20), value))
        rows.append({"mean": found.mean, "ci95": found.ci95, "p_value": found.p_value})
    _judge(rows)
    assert all(row["p_holm"] < 0.05 for row in rows)
    assert [row["verdict"] for row in rows] == ["inside the noise", "higher"]


ROUNDED = [0.3 - 0.2, 0.2 - 0.1, 0.1 - 0.0]
"""Equal but for rounding."""


@pytest.mark.parametrize("runs", [1, 2, 4])
def test_rounding_is_no_spread(runs: int) -> None:
    rounded, equal = np.array([ROUNDED] * runs), np.full((runs, 3), 0.1)
    assert np.ptp(rounded) > 0
    assert p_value(rounded) == p_value(equal) == 0.25
    assert p_value(rounded - 0.1) == p_value(equal - 0.1) == 1.0
    for found, exact in ((difference(rounded), difference(equal)), (estimate(rounded), estimate(equal))):
        assert found.ci95 == pytest.approx(exact.ci95)
        assert found.p_value == exact.p_value
    assert difference(rounded - 0.1).p_value == 1.0
