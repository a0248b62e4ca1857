"""Intervals of a study stay where shares and their differences can be."""

import numpy as np
import pytest

from onpath.commands.study.intervals import difference, estimate


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
