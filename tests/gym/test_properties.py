"""The gym's measured properties: the area under the ROC curve and its interval."""

import pytest

from onpath.gym.properties import _auc_number


def test_auc_counts_ties_half_and_its_interval_widens_with_fewer_items() -> None:
    few = _auc_number("few", [3.0, 2.0], [2.0, 1.0])
    assert (few.value, few.n) == (pytest.approx((1 + 1 + 0.5 + 1) / 4), 4)
    many = _auc_number("many", [3.0, 2.0] * 50, [2.0, 1.0] * 50)
    assert many.value == pytest.approx(few.value)
    assert few.low <= many.low < many.value < many.high <= few.high
    assert many.high - many.low < few.high - few.low
