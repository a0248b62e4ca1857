"""Plans and distances against POT, at unequal lengths, in batches with padding, and where nothing need be
solved."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpath.transport import plans as transport
from onpath.transport.assignment import transportation
from onpath.transport.plans import optimal_transport, token_cost, window_divergence


def random_cost(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pot_distance(cost: torch.Tensor) -> float:
    n, m = cost.shape
    return float(ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), np.ascontiguousarray(cost.double().numpy())))


def assert_marginals(plan: torch.Tensor, n: int, m: int, total: float = 1e-12) -> None:
    assert (plan >= 0).all()
    torch.testing.assert_close(
        plan[:n, :m].sum(0), torch.full((m,), 1 / m, dtype=plan.dtype), rtol=1e-6, atol=1e-9
    )
    assert (plan[:n, :m].sum(1) - 1 / n).abs().sum() <= total
    assert plan.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert plan[n:].abs().sum() == 0
    assert plan[:, m:].abs().sum() == 0


SIZES = [(1, 1), (1, 5), (6, 1), (5, 5), (4, 6), (6, 4), (7, 5), (13, 11), (24, 36), (31, 29), (50, 50)]


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_exact_plans_cost_what_pot_says(n, m):
    cost = random_cost(n, m, seed=n * 100 + m)
    plan = optimal_transport(cost)
    assert_marginals(plan, n, m)
    assert (plan * cost).sum().item() == pytest.approx(pot_distance(cost), abs=1e-12)


def test_both_ways_to_an_exact_unequal_plan_agree(monkeypatch):
    cost = random_cost(3, 6, 10, seed=3)
    replicated = optimal_transport(cost)
    monkeypatch.setattr(transport, "_REPLICATED", 0)
    paths = optimal_transport(cost)
    torch.testing.assert_close(
        (replicated * cost).sum((1, 2)), (paths * cost).sum((1, 2)), rtol=0, atol=1e-12
    )
    assert_marginals(paths[1], 6, 10)


@pytest.mark.parametrize("epsilon", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_whole_numbers_have_the_plan_of_the_same_fractions(dtype, epsilon):
    cost = (9 * random_cost(2, 4, 6, seed=5)).to(dtype)
    plan = optimal_transport(cost, epsilon=epsilon)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(plan, optimal_transport(cost.float(), epsilon=epsilon))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    windows=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 4, 1000]),
    seed=st.integers(0, 999),
)
def test_shortest_paths_in_lockstep_are_optimal(n, m, windows, levels, seed):
    """Also with ties, equal sizes, and a single row or column; each window as if it were alone."""
    cost = (random_cost(windows, n, m, seed=seed) * levels).floor() / levels - 0.5
    plan = torch.from_numpy(transportation(cost.numpy()))
    for w in range(windows):
        assert_marginals(plan[w], n, m)
        assert (plan[w] * cost[w]).sum().item() == pytest.approx(pot_distance(cost[w]), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), levels=st.integers(1, 5), seed=st.integers(0, 999))
def test_exact_with_ties_and_any_shape(n, m, levels, seed):
    """Costs with few distinct values: many plans are optimal, all cost the same."""
    cost = (random_cost(n, m, seed=seed) * levels).floor()
    plan = optimal_transport(cost)
    assert_marginals(plan, n, m)
    assert (plan * cost).sum().item() == pytest.approx(pot_distance(cost), abs=1e-10)


@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.5])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (5, 5), (7, 4), (20, 30)])
def test_smoothed_plans_equal_pots(n, m, epsilon):
    cost = random_cost(n, m, seed=n + m)
    plan = optimal_transport(cost, epsilon=epsilon)
    assert_marginals(plan, n, m, total=2e-5)
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    want = ot.bregman.sinkhorn_log(a, b, cost.numpy(), epsilon, numItermax=200_000, stopThr=1e-10, warn=False)
    np.testing.assert_allclose(plan.numpy(), want, atol=1e-4 / max(n, m))


def test_float32_reaches_the_same_plan():
    cost = random_cost(12, 9, seed=1)
    for epsilon in (0.005, 0.05):
        single = optimal_transport(cost.float(), epsilon=epsilon)
        assert single.dtype == torch.float32
        assert_marginals(single, 12, 9, total=3e-5)
        torch.testing.assert_close(
            single.double(), optimal_transport(cost, epsilon=epsilon), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 31), (14, 14)])
@pytest.mark.parametrize("epsilon", [5e-4, 1e-4, 1e-6])
def test_however_small_epsilon_is_there_is_a_plan(n, m, epsilon):
    """Over-relaxed scalings left the range of the dtype, and a plan of NaN counted as converged."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(200, 64, generator=generator)
    windows = [torch.randint(0, 200, (12, size), generator=generator) for size in (n, m)]
    told = {"student_ids": windows[0], "teacher_ids": windows[1], "embedding": vectors}
    distance, plan = window_divergence(**told, epsilon=epsilon, tolerance=1e-3)
    exact, _ = window_divergence(**told)
    assert (plan >= 0).all()
    assert (plan.sum(-1) - 1 / n).abs().sum(-1).max() < 1e-2
    torch.testing.assert_close(plan.sum(-2), torch.full((12, m), 1 / m), rtol=0, atol=1e-6)
    assert (distance - exact).abs().max() < epsilon * math.log(n * m) + 2e-3  # what the entropy can buy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "epsilon"), [(20, 33, 5e-4), (14, 14, 1e-3), (5, 5, 0.005), (20, 20, 0.02)]
)
def test_a_smoothed_plan_is_a_plan_whether_the_iterations_have_converged_or_not(n, m, epsilon, dtype):
    """Rows that were off within the tolerance made D smaller than the exact D, which is no plan's."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(40, 16, generator=generator, dtype=dtype)
    student, teacher = (torch.randint(0, 40, (8, size), generator=generator) for size in (n, m))
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    exact, _ = window_divergence(student_ids=student, teacher_ids=teacher, embedding=vectors)
    for few in (4000, 80):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("onpath.transport.plans._ITERATIONS", few)
            distance, plan = window_divergence(
                student_ids=student, teacher_ids=teacher, embedding=vectors, epsilon=epsilon
            )
        assert (plan >= 0).all()
        torch.testing.assert_close(
            plan.sum(-1), torch.full((8, n), 1 / n, dtype=dtype), rtol=0, atol=rounding
        )
        torch.testing.assert_close(
            plan.sum(-2), torch.full((8, m), 1 / m, dtype=dtype), rtol=0, atol=rounding
        )
        assert (distance - exact).min() > -rounding
        assert (distance - exact).max() < epsilon * math.log(n * m) + 2e-2


def test_epsilon_spreads_the_plan_and_costs_more():
    cost = random_cost(8, 8, seed=2)
    costs, peaks = [], []
    for epsilon in (None, 0.01, 0.1, 1.0, 100.0):
        plan = optimal_transport(cost, epsilon=epsilon)
        costs.append((plan * cost).sum().item())
        peaks.append(plan.max().item())
    assert costs == sorted(costs)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] == pytest.approx(1 / 64, rel=0.01)


@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_a_padded_batch_equals_its_problems_one_by_one(epsilon):
    rows, columns = torch.tensor([[4, 1, 7], [7, 3, 5]]), torch.tensor([[6, 2, 6], [1, 3, 4]])
    cost = random_cost(2, 3, 7, 6, seed=5)
    poisoned = cost.clone()
    for i in range(2):
        for j in range(3):
            poisoned[i, j, rows[i, j] :] = torch.nan
            poisoned[i, j, :, columns[i, j] :] = torch.inf
    batch = optimal_transport(poisoned, epsilon=epsilon, row_lengths=rows, column_lengths=columns)
    for i in range(2):
        for j in range(3):
            n, m = int(rows[i, j]), int(columns[i, j])
            assert_marginals(batch[i, j], n, m, total=2e-5)
            alone = optimal_transport(cost[i, j, :n, :m].contiguous(), epsilon=epsilon)
            torch.testing.assert_close(batch[i, j, :n, :m], alone, rtol=1e-6, atol=1e-6)


def test_more_windows_than_one_group():
    """Groups, and windows that converge in different rounds, do not mix."""
    cost = (
        random_cost(300, 30, 30, seed=6) * torch.linspace(0.1, 2.0, 300, dtype=torch.float64)[:, None, None]
    )
    whole = optimal_transport(cost, epsilon=0.05)
    for w in (0, 111, 299):
        torch.testing.assert_close(whole[w], optimal_transport(cost[w], epsilon=0.05), rtol=0, atol=1e-9)


def test_no_windows():
    assert optimal_transport(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert optimal_transport(torch.zeros(0, 3, 4), epsilon=0.1).shape == (0, 3, 4)


def test_wrong_calls_say_why():
    with pytest.raises(ValueError, match="epsilon"):
        optimal_transport(random_cost(2, 2), epsilon=0.0)
    with pytest.raises(ValueError, match="finite"):
        optimal_transport(torch.tensor([[0.0, torch.nan]]))
    for epsilon in (None, 0.1):
        with pytest.raises(ValueError, match="a window has at least one token"):
            optimal_transport(torch.zeros(0, 3), epsilon=epsilon)
        ids = torch.zeros(2, dtype=torch.long)
        with pytest.raises(ValueError, match="a window has at least one token, not 2 and 0"):
            window_divergence(student_ids=ids, teacher_ids=ids[:0], embedding=torch.eye(3), epsilon=epsilon)
    with pytest.raises(ValueError, match="lengths"):
        optimal_transport(random_cost(1, 2, 2), row_lengths=torch.tensor([0]))
    with pytest.raises(ValueError, match="lengths"):
        optimal_transport(random_cost(1, 2, 2), column_lengths=torch.tensor([3]))


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(8))


def test_cost_is_one_minus_cosine(embedding):
    s, t = torch.tensor([1, 2, 3]), torch.tensor([3, 4])
    cost = token_cost(student_ids=s, teacher_ids=t, embedding=embedding)
    for i in range(3):
        for j in range(2):
            cosine = torch.cosine_similarity(embedding[s[i]], embedding[t[j]], dim=0).item()
            assert cost[i, j].item() == pytest.approx(1 - cosine, abs=1e-6)
    assert cost[2, 0].item() == 0.0
    assert cost.max() > 1.0


def test_costs_in_groups_are_those_of_all_at_once(embedding, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randint(0, len(embedding), (2, 3, size), generator=generator) for size in (4, 5))
    told = {"student_ids": ours, "teacher_ids": theirs, "embedding": embedding}
    at_once = token_cost(**told)
    monkeypatch.setattr(transport, "_VECTORS", 1)
    torch.testing.assert_close(token_cost(**told), at_once)
    assert at_once.shape == (2, 3, 4, 5)


@pytest.mark.parametrize(("k", "j"), [(6, 6), (5, 8), (1, 4)])
def test_window_distance_equals_pots(embedding, k, j):
    g = torch.Generator().manual_seed(k * 10 + j)
    s, t = torch.randint(0, 40, (k,), generator=g), torch.randint(0, 40, (j,), generator=g)
    distance, plan = window_divergence(student_ids=s, teacher_ids=t, embedding=embedding)
    assert distance.item() == pytest.approx(
        pot_distance(token_cost(student_ids=s, teacher_ids=t, embedding=embedding)), abs=1e-6
    )
    assert_marginals(plan, k, j, total=1e-6)
    other, transposed = window_divergence(student_ids=t, teacher_ids=s, embedding=embedding)
    assert other.item() == pytest.approx(distance.item(), abs=1e-6)
    assert transposed.shape == (j, k)


def test_the_same_tokens_cost_nothing_and_are_not_solved(embedding, monkeypatch):
    """Identical: the diagonal. Permuted, with repeats: a permutation between equal tokens. Exactly zero."""
    monkeypatch.setattr(transport, "linear_sum_assignment", None)
    s = torch.tensor([[5, 9, 5, 7], [5, 9, 5, 7], [1, 2, 0, 0]])
    t = torch.tensor([[5, 9, 5, 7], [7, 5, 5, 9], [2, 1, 3, 3]])
    lengths = torch.tensor([4, 4, 2])
    distance, plan = window_divergence(
        student_ids=s, teacher_ids=t, embedding=embedding, student_lengths=lengths, teacher_lengths=lengths
    )
    assert torch.equal(distance, torch.zeros(3))
    assert torch.equal(plan[0], torch.eye(4) / 4)
    assert plan[2].tolist() == [[0, 0.5, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    for w in range(3):
        assert_marginals(plan[w], int(lengths[w]), int(lengths[w]), total=1e-6)
        i, j = plan[w].nonzero(as_tuple=True)
        assert torch.equal(s[w, i], t[w, j])


@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_a_batch_of_windows_of_many_lengths(embedding, epsilon):
    g = torch.Generator().manual_seed(9)
    s, t = torch.randint(0, 40, (12, 7), generator=g), torch.randint(0, 40, (12, 5), generator=g)
    n, m = torch.randint(1, 8, (12,), generator=g), torch.randint(1, 6, (12,), generator=g)
    t[3, :4], n[3], m[3] = s[3, :4].flip(0), 4, 4
    s[4, :5], n[4], m[4] = t[4], 5, 5
    distance, plan = window_divergence(
        student_ids=s,
        teacher_ids=t,
        embedding=embedding,
        epsilon=epsilon,
        student_lengths=n,
        teacher_lengths=m,
    )
    for w in range(12):
        one = {
            "student_ids": s[w, : n[w]],
            "teacher_ids": t[w, : m[w]],
            "embedding": embedding,
            "epsilon": epsilon,
        }
        alone, alone_plan = window_divergence(**one)
        assert distance[w].item() == pytest.approx(alone.item(), abs=1e-5)
        assert_marginals(plan[w], int(n[w]), int(m[w]), total=2e-5)
        torch.testing.assert_close(plan[w, : n[w], : m[w]], alone_plan, rtol=0, atol=1e-5)
    if epsilon is None:
        assert distance[3].item() == distance[4].item() == 0.0


def test_other_futures_are_farther_and_order_does_not_matter(embedding):
    s = torch.tensor([1, 2, 3, 4])
    d = lambda t: window_divergence(student_ids=s, teacher_ids=torch.tensor(t), embedding=embedding)[0].item()  # noqa: E731
    assert d([4, 3, 2, 1]) == 0.0
    assert 0 < d([1, 2, 3, 30]) < d([31, 32, 33, 30])
    assert d([1, 2, 3, 30]) == pytest.approx(
        (1 - torch.cosine_similarity(embedding[4], embedding[30], dim=0).item()) / 4, rel=1e-5
    )


def test_zero_embeddings_and_gradients(embedding):
    table = embedding.clone().requires_grad_()
    table.data[0] = 0.0
    distance, plan = window_divergence(
        student_ids=torch.tensor([0, 1]), teacher_ids=torch.tensor([0, 2]), embedding=table
    )
    assert math.isfinite(distance.item())
    assert not distance.requires_grad
    assert not plan.requires_grad
    assert plan[0, 0].item() == 0.5
