"""Weights per token: hand values, composition, and independence of how tokens are grouped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpath.losses import shaping


def test_first_tokens():
    assert shaping.first_tokens(torch.tensor([0, 1, 2, 0, 1]), n=1).tolist() == [1, 0, 0, 1, 0]


def test_clip_factor_makes_the_minimum():
    values = torch.tensor([0.0, 0.5, 2.0, 1e30])
    torch.testing.assert_close(
        values * shaping.clip_factor(values, cap=1.0), torch.tensor([0.0, 0.5, 1.0, 1.0])
    )


def test_median_cap_uses_each_responses_own_median():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 40.0])
    sequences = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    everywhere = shaping.median_cap(values, selected=torch.ones(7, dtype=torch.bool), sequence_ids=sequences)
    torch.testing.assert_close(everywhere, torch.tensor([1, 1, 2 / 3, 1, 1, 25 / 30, 25 / 40]))
    nowhere = shaping.median_cap(values, selected=torch.zeros(7, dtype=torch.bool), sequence_ids=sequences)
    assert nowhere.tolist() == [1.0] * 7


def test_proportional_has_mean_one_over_all_parts():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    whole = shaping.proportional(values, mean=values.mean())
    assert whole.mean().item() == pytest.approx(1.0)
    parts = [shaping.proportional(x, mean=values.mean()) for x in values.split(1)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(("share", "kept"), [(0.2, 1), (0.5, 3), (0.51, 3), (1.0, 5)])
def test_top_share_keeps_the_largest(share, kept):
    values = torch.tensor([0.3, 0.1, 0.5, 0.4, 0.2])
    mask = shaping.top_share(values, share=share)
    assert int(mask.sum()) == kept
    assert values[mask == 1].min() > values[mask == 0].max() if kept < 5 else True
    with pytest.raises(ValueError, match="share"):
        shaping.top_share(values, share=0.0)


def test_confident_and_wrong_takes_the_third_quadrant():
    entropy = torch.tensor([2.0, 1.9, 0.1, 0.2, 0.3, 0.4])
    divergence = torch.tensor([9.0, 0.0, 0.1, 5.0, 0.2, 0.3])
    kept = shaping.confident_and_wrong(entropy, divergence, entropy_share=0.33, divergence_share=0.25)
    assert kept.tolist() == [0, 0, 0, 1, 0, 0]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    discount=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_discounted_future_sum_against_a_loop(lengths, discount, seed):
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = torch.cat([torch.full((n,), 10 - i) for i, n in enumerate(lengths)])
    want, start = [], 0
    for n in lengths:
        row = values[start : start + n].tolist()
        want += [sum(discount ** (u - t) * row[u] for u in range(t, n)) for t in range(n)]
        start += n
    got = shaping.discounted_future_sum(values, sequence_ids=ids, discount=discount)
    assert got.tolist() == pytest.approx(want)


def test_factors_compose_in_any_order():
    values = torch.tensor([4.0, 1.0, 2.0, 8.0])
    a = shaping.first_tokens(torch.arange(4), n=3)
    b = shaping.clip_factor(values, cap=2.0)
    c = shaping.top_share(values, share=0.5)
    torch.testing.assert_close(a * b * c, c * (b * a))
    assert (a * b * c).tolist() == [0.5, 0.0, 0.0, 0.0]
