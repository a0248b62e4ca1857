"""Optimal transport between two short windows of tokens: how far apart two near futures are (TOPD, arXiv
2606.00305).

    plan = argmin_γ Σ_ij γ_ij·cost_ij,   γ ≥ 0,  Σ_j γ_ij = 1/K,  Σ_i γ_ij = 1/J        (uniform marginals)

Exact plans: scipy's assignment where both windows are equally long, the same over repeated
rows and columns where the lengths have a small common multiple, shortest augmenting paths otherwise
(`transportation`). With `epsilon` the entropy-smoothed plan comes from Sinkhorn's iterations over all windows
at once, in the log domain with rescaling in between (Schmitzer, arXiv 1610.06519). Plans carry no gradient.

Shape suffixes: W windows, K tokens of one window, J of the other, V vocabulary, H embedding.
"""

import math
from collections import defaultdict

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from onpath.transport.assignment import transportation

_REPLICATED = 72  # an assignment over so many repeated rows and columns is quicker than the transportation
_REPLICATED_ENTRIES = 600_000  # larger ones too, up to so many entries: of few windows nothing is in lockstep
_LOCKSTEP = 256  # windows of unequal length that are solved together
_CACHED = 2**18  # entries of the windows that Sinkhorn works on together: what a CPU's cache holds
_VECTORS = 2**24  # entries of the vectors whose products are taken together
_ABSORB = 40  # iterations between two rescalings
_TOLERANCE = 1e-5  # of the row marginals, as a share of 1/K, summed over rows
_ITERATIONS = 4000
_LOST = 1e-2  # error of the rows, after all iterations, from which on the plan is found otherwise
_SINGLE = 64.0  # range of cost/ε up to which float32 potentials can reach the tolerance


def optimal_transport(
    cost: Real[Tensor, "*batch K J"],
    *,
    epsilon: float | None = None,
    tolerance: float = _TOLERANCE,
    row_lengths: Int[Tensor, "*batch"] | None = None,
    column_lengths: Int[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch K J"]:
    """The plan γ with uniform marginals, of mass 1 per window.

    Args:
        cost: finite. Any leading dimensions; each [K, J] is a problem of its own. Whole numbers (edit
            distances) are computed in torch's default dtype.
        epsilon: None is exact; above 0 adds −ε·H(γ), which spreads the plan. In the unit of the cost.
        tolerance: with epsilon, the error of the rows' sums, summed over rows (the mass is 1), at which the
            iterations stop. What is left of it is spread, so that the plan's own sums are exact.
        row_lengths, column_lengths: numbers of real rows and columns, at least 1; the rest is padding, gets
            no mass, and its cost is not read. None: all.

    Returns:
        γ in the dtype of what is computed, and on the cost's device. Rows sum to 1/K, columns to 1/J.

    Raises:
        ValueError: an epsilon that is not above 0, a cost that is not finite, or a window without a token.

    >>> optimal_transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    if not min(cost.shape[-2:]):
        raise ValueError(f"a window has at least one token, and the costs are of {list(cost.shape)}")
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, or None for the exact plan, not {epsilon}")
    *batch, rows, columns = cost.shape
    if not cost.is_floating_point():  # the plan has the cost's dtype, and its masses are fractions
        cost = cost.to(torch.get_default_dtype())
    cost_WKJ = cost.detach().reshape(-1, rows, columns)
    windows = cost_WKJ.shape[0]
    n_W = _lengths(row_lengths, windows, rows, cost.device)
    m_W = _lengths(column_lengths, windows, columns, cost.device)
    inside_WKJ = _inside(n_W, rows)[:, :, None] & _inside(m_W, columns)[:, None, :]
    cost_WKJ = cost_WKJ.masked_fill(~inside_WKJ, 0.0)
    if not bool(cost_WKJ.isfinite().all()):
        raise ValueError("optimal_transport needs finite costs")
    if epsilon is None:
        plan_WKJ = _exact(cost_WKJ, n_W, m_W)
    else:
        plan_WKJ = _sinkhorn(cost_WKJ, n_W, m_W, epsilon, tolerance)
    return plan_WKJ.reshape(*batch, rows, columns)


def window_divergence(
    *,
    student_ids: Int[Tensor, "*batch K"],
    teacher_ids: Int[Tensor, "*batch J"],
    embedding: Float[Tensor, "V H"],
    epsilon: float | None = None,
    tolerance: float = _TOLERANCE,
    student_lengths: Int[Tensor, "*batch"] | None = None,
    teacher_lengths: Int[Tensor, "*batch"] | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch K J"]]:
    """D = Σ_ij γ_ij·(1 − cos(e(S_i), e(T_j))) and γ, for one pair of windows or many at once (padded, with
    lengths).

    D lies in [0, 2]; it is 0 for windows of the same tokens in any order, and then the exact plan is found
    without solving anything: identical windows give the diagonal, permuted ones a permutation.

    Args:
        student_ids, teacher_ids: token ids; padding may be any valid id.
        embedding: token embeddings; the cosine is of rows e(v), a zero row has cosine 0 with everything but
            itself.
        epsilon: None is exact; else as in `optimal_transport`. D is then Σ γ·cost of the smoothed plan,
            without its entropy term: at least the exact D, and above 0 also for identical windows.
        tolerance: as in `optimal_transport`.
        student_lengths, teacher_lengths: real tokens of each window, at least 1. None: all.

    Returns:
        Distance per pair, and the plan: rows are the student's tokens, columns the teacher's.

    >>> same = torch.tensor([3, 1, 2])
    >>> d, plan = window_divergence(student_ids=same, teacher_ids=same, embedding=torch.eye(5))
    >>> d.item(), (3 * plan).diagonal().tolist()
    (0.0, [1.0, 1.0, 1.0])
    """
    *batch, rows = student_ids.shape
    columns = teacher_ids.shape[-1]
    if not rows or not columns:
        raise ValueError(f"a window has at least one token, not {rows} and {columns}")
    s_WK, t_WJ = student_ids.reshape(-1, rows), teacher_ids.reshape(-1, columns)
    n_W = _lengths(student_lengths, len(s_WK), rows, s_WK.device)
    m_W = _lengths(teacher_lengths, len(t_WJ), columns, t_WJ.device)
    cost_WKJ = token_cost(student_ids=s_WK, teacher_ids=t_WJ, embedding=embedding)
    if epsilon is None:
        plan_WKJ = _exact_screened(cost_WKJ, s_WK, t_WJ, n_W, m_W)
    else:
        plan_WKJ = optimal_transport(
            cost_WKJ, epsilon=epsilon, tolerance=tolerance, row_lengths=n_W, column_lengths=m_W
        )
    distance_W = (plan_WKJ * cost_WKJ).sum((-1, -2))
    return distance_W.reshape(batch), plan_WKJ.reshape(*batch, rows, columns)


def token_cost(
    *,
    student_ids: Int[Tensor, "*batch K"],
    teacher_ids: Int[Tensor, "*batch J"],
    embedding: Float[Tensor, "V H"],
) -> Float[Tensor, "*batch K J"]:
    """1 − cos(e(S_i), e(T_j)), in [0, 2], exactly 0 for the same token; float32, or float64 for such
    embeddings."""
    dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    used, back = torch.cat([student_ids.flatten(), teacher_ids.flatten()]).unique(return_inverse=True)
    unit = torch.nn.functional.normalize(embedding.detach()[used].to(dtype), dim=-1)
    *batch, rows = student_ids.shape
    s_WK = back[: student_ids.numel()].reshape(-1, rows)
    t_WJ = back[student_ids.numel() :].reshape(len(s_WK), -1)
    together = max(1, _VECTORS // max(1, s_WK.shape[1] + t_WJ.shape[1]) // max(1, unit.shape[1]))
    parts = [unit[s] @ unit[t].mT for s, t in zip(s_WK.split(together), t_WJ.split(together), strict=True)]
    cost = (1.0 - torch.cat(parts)).clamp_(0.0, 2.0).reshape(*batch, rows, -1)
    return cost.masked_fill_(student_ids[..., :, None] == teacher_ids[..., None, :], 0.0)


def _lengths(given: Tensor | None, windows: int, size: int, device: torch.device) -> Tensor:
    if given is None:
        return torch.full((windows,), size, device=device)
    flat = given.reshape(-1).to(device)
    if windows and (int(flat.min()) < 1 or int(flat.max()) > size):
        raise ValueError(f"window lengths must lie in 1..{size}")
    return flat


def _inside(lengths_W: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths_W.device) < lengths_W[:, None]


def _exact_screened(cost_WKJ: Tensor, s_WK: Tensor, t_WJ: Tensor, n_W: Tensor, m_W: Tensor) -> Tensor:
    """Exact plans; windows of the same multiset of tokens are matched token to token without solving."""
    plan_WKJ = torch.zeros_like(cost_WKJ)
    size = min(cost_WKJ.shape[1:])
    inside_WK = _inside(n_W, size)
    # Costs are at least 0, and exactly 0 between equal tokens: whatever matches equal tokens is a best plan.
    same_W = (n_W == m_W) & ((s_WK[:, :size] == t_WJ[:, :size]) | ~inside_WK).all(-1)
    # Padding sorts to the end, so that windows with the same tokens are equal entry by entry; the sort is
    # stable, so that repeated tokens are matched in their order.
    order_s, order_t = (_sorted_tokens(ids[:, :size], inside_WK) for ids in (s_WK, t_WJ))
    permuted_W = (n_W == m_W) & (order_s.values == order_t.values).all(-1) & ~same_W
    diagonal = torch.diag_embed(inside_WK[same_W] / n_W[same_W, None].to(cost_WKJ.dtype))
    plan_WKJ[same_W, :size, :size] = diagonal.to(cost_WKJ.dtype)
    # `w` counts the permuted windows, `at` all of them; every token has a cell of its own, repeated ones too,
    # so nothing has to be added up.
    w, k = inside_WK[permuted_W].nonzero(as_tuple=True)
    at = permuted_W.nonzero().squeeze(-1)[w]
    plan_WKJ[at, order_s.indices[permuted_W][w, k], order_t.indices[permuted_W][w, k]] = 1.0 / n_W[at].to(
        cost_WKJ.dtype
    )
    rest_W = ~(same_W | permuted_W)
    if bool(rest_W.any()):
        plan_WKJ[rest_W] = optimal_transport(
            cost_WKJ[rest_W], row_lengths=n_W[rest_W], column_lengths=m_W[rest_W]
        )
    return plan_WKJ


def _sorted_tokens(ids_WK: Tensor, inside_WK: Tensor) -> torch.return_types.sort:
    return ids_WK.masked_fill(~inside_WK, torch.iinfo(ids_WK.dtype).max).sort(dim=-1, stable=True)


def _exact(cost_WKJ: Tensor, n_W: Tensor, m_W: Tensor) -> Tensor:
    costs = cost_WKJ.double().cpu().numpy()
    plan = np.zeros(costs.shape)
    unequal: dict[tuple[int, int], list[int]] = defaultdict(list)
    for w, (n, m) in enumerate(zip(n_W.tolist(), m_W.tolist(), strict=True)):
        if n == 1 or m == 1:
            plan[w, :n, :m] = 1.0 / (n * m)
        elif n == m:
            plan[w][linear_sum_assignment(costs[w, :n, :m])] = 1.0 / n
        else:
            unequal[n, m].append(w)
    for (n, m), windows in unequal.items():
        size = math.lcm(n, m)
        if size <= _REPLICATED or len(windows) * size**2 <= _REPLICATED_ENTRIES:
            for w in windows:
                plan[w, :n, :m] = _replicated(costs[w, :n, :m], size)
            continue
        for start in range(0, len(windows), _LOCKSTEP):
            some = windows[start : start + _LOCKSTEP]
            plan[some, :n, :m] = transportation(costs[some, :n, :m])
    return torch.from_numpy(plan).to(cost_WKJ)


def _replicated(cost_nm: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Every row size/n times, every column size/m times: each copy has mass 1/size on both sides."""
    n, m = cost_nm.shape
    rows, columns = np.arange(size) // (size // n), np.arange(size) // (size // m)
    i, j = linear_sum_assignment(cost_nm[rows[:, None], columns])
    plan = np.zeros((n, m))
    np.add.at(plan, (rows[i], columns[j]), 1.0 / size)
    return plan


def _sinkhorn(cost_WKJ: Tensor, n_W: Tensor, m_W: Tensor, epsilon: float, tolerance: float) -> Tensor:
    """Potentials f, g with γ = exp(f_i + g_j − cost_ij/ε), refined by scalings u, v of that kernel's rows and
    columns.

    Windows leave as they converge. Updates of the others are over-relaxed by ω = 2/(1 + √(1−η)) where η is
    the rate at which their error has just fallen (Thibault et al., arXiv 1711.01851); a window whose error
    rose goes back to ω = 1, and one whose scalings left the range of the dtype stays there from then on, with
    its last potentials. What comes out, converged or not, is rounded to a plan; where ε is so small that the
    error stays large, the plan is the exact one, to which the smoothed ones tend.
    """
    windows, rows, columns = cost_WKJ.shape
    sharp = windows > 0 and float(cost_WKJ.max() - cost_WKJ.min()) > _SINGLE * epsilon
    # Potentials are as large as the range of cost/ε, and their rounding is the error of the marginals.
    dtype = torch.float64 if sharp or cost_WKJ.dtype == torch.float64 else torch.float32
    a_WK = _inside(n_W, rows) / n_W[:, None].to(dtype)
    b_WJ = _inside(m_W, columns) / m_W[:, None].to(dtype)
    # Marginals, and with them scalings and kernel, are 0 at padding; potentials are kept finite there.
    f_WK, g_WJ = torch.zeros_like(a_WK), torch.zeros_like(b_WJ)
    error_W = torch.full((windows,), torch.inf, dtype=dtype, device=cost_WKJ.device)
    omega_W = torch.ones_like(error_W)
    strayed_W = torch.zeros(windows, dtype=torch.bool, device=cost_WKJ.device)
    plan_WKJ = torch.empty(cost_WKJ.shape, dtype=dtype, device=cost_WKJ.device)
    open_W = torch.arange(windows, device=cost_WKJ.device)
    together = windows if cost_WKJ.is_cuda else max(1, _CACHED // (rows * columns))
    for round_ in range(-(-_ITERATIONS // _ABSORB)):
        for at in open_W.split(max(1, together)):
            scaled = cost_WKJ[at].to(dtype).div_(-epsilon)
            if round_ == 0:
                f_WK[at], g_WJ[at] = _first_potentials(scaled, a_WK[at], b_WJ[at])
            # Made anew from the potentials in every round: the scalings start from 1 again before they leave
            # the range of the dtype.
            kernel = scaled.add_(f_WK[at, :, None]).add_(g_WJ[at, None, :]).exp_()
            kernel.mul_((a_WK[at] > 0)[:, :, None]).mul_((b_WJ[at] > 0)[:, None, :])
            u, v, row_sums = _scalings(kernel, a_WK[at], b_WJ[at], omega_W[at, None])
            error = (row_sums - a_WK[at]).abs().sum(-1)
            finite = error.isfinite()
            strayed_W[at] |= ~finite
            # Reads the error of the round before, so it comes before that is overwritten.
            omega_W[at] = _relaxation(error, error_W[at], omega_W[at]).masked_fill(strayed_W[at], 1.0)
            error_W[at] = error.masked_fill(~finite, torch.inf)
            # Of every open window in every round: one that never converges keeps its last plan.
            plan_WKJ[at] = kernel.mul_(u[:, :, None]).mul_(v[:, None, :])
            f_WK[at] += _log_inside(u).masked_fill_(~finite[:, None], 0.0)
            g_WJ[at] += _log_inside(v).masked_fill_(~finite[:, None], 0.0)
        # Columns are exact after each round, so only the rows' sums can be off.
        open_W = open_W[error_W[open_W] > tolerance]
        if not len(open_W):
            break
    # Rows off within the tolerance can be cheaper than any plan: D would fall below the exact D.
    plan_WKJ = _rounded(plan_WKJ, a_WK, b_WJ).to(cost_WKJ.dtype)
    lost_W = error_W > max(_LOST, tolerance)
    if bool(lost_W.any()):
        plan_WKJ[lost_W] = _exact(cost_WKJ[lost_W], n_W[lost_W], m_W[lost_W])
    return plan_WKJ


def _rounded(plan_WKJ: Tensor, a_WK: Tensor, b_WJ: Tensor) -> Tensor:
    """The marginals made exact: rows and columns that have too much are scaled down, and what all then
    lack is spread in proportion (Altschuler, Weed, Rigollet, arXiv 1705.09634, algorithm 2)."""
    tiny = torch.finfo(plan_WKJ.dtype).tiny
    plan = plan_WKJ * (a_WK / plan_WKJ.sum(-1).clamp_min(tiny)).clamp(max=1.0)[:, :, None]
    plan = plan * (b_WJ / plan.sum(-2).clamp_min(tiny)).clamp(max=1.0)[:, None, :]
    rows_WK, columns_WJ = (a_WK - plan.sum(-1)).clamp_min(0.0), (b_WJ - plan.sum(-2)).clamp_min(0.0)
    share_WK = rows_WK / rows_WK.sum(-1, keepdim=True).clamp_min(tiny)
    return plan + share_WK[:, :, None] * columns_WJ[:, None, :]


def _scalings(
    kernel_WKJ: Tensor, a_WK: Tensor, b_WJ: Tensor, omega_W1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, v after `_ABSORB` iterations from 1, the last exact in its columns, and the rows' sums after it."""
    across_WJK = kernel_WKJ.mT.contiguous()
    tiny = torch.finfo(kernel_WKJ.dtype).tiny
    relaxed = bool((omega_W1 != 1.0).any())
    u_WK, v_WJ = (a_WK > 0).to(a_WK.dtype), (b_WJ > 0).to(b_WJ.dtype)
    for step in range(_ABSORB):
        u_new = a_WK / (v_WJ[:, None, :] @ across_WJK).squeeze(1).clamp_min_(tiny)
        u_WK = _relaxed(u_WK, u_new, omega_W1) if relaxed else u_new
        v_new = b_WJ / (u_WK[:, None, :] @ kernel_WKJ).squeeze(1).clamp_min_(tiny)
        v_WJ = _relaxed(v_WJ, v_new, omega_W1) if relaxed and step < _ABSORB - 1 else v_new
    return u_WK, v_WJ, u_WK * (v_WJ[:, None, :] @ across_WJK).squeeze(1)


def _relaxed(old: Tensor, new: Tensor, omega_W1: Tensor) -> Tensor:
    """old·(new/old)^ω; 0 stays 0 (padding)."""
    tiny = torch.finfo(old.dtype).tiny
    return (new / old.clamp_min(tiny)).clamp_min_(tiny).log_().mul_(omega_W1).exp_().mul_(old)


def _relaxation(error_W: Tensor, before_W: Tensor, omega_W: Tensor) -> Tensor:
    """The next ω of each window, from how its error fell over the last `_ABSORB` iterations."""
    first_W = before_W.isinf()
    rate_W = (error_W / before_W).clamp(0.0, 1.0).pow(1.0 / _ABSORB)
    fresh_W = (2.0 / (1.0 + (1.0 - rate_W).sqrt())).clamp(1.0, 1.9)
    next_W = torch.where(omega_W > 1.0, omega_W, torch.where(first_W, 1.0, fresh_W))
    return torch.where((error_W > before_W) & ~first_W, 1.0, next_W)


def _log_inside(scaling: Tensor) -> Tensor:
    """log of a scaling; 0 for padding, whose scaling is 0."""
    return scaling.log().masked_fill_(scaling == 0, 0.0)


def _first_potentials(scaled_WKJ: Tensor, a_WK: Tensor, b_WJ: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration with log-sum-exp; after it no row or column of the kernel underflows as a whole."""
    rows_WK, columns_WJ = a_WK > 0, b_WJ > 0
    outside_WKJ = ~(rows_WK[:, :, None] & columns_WJ[:, None, :])
    scaled_WKJ = scaled_WKJ.masked_fill(outside_WKJ, -torch.inf)
    f_WK = (a_WK.log() - torch.logsumexp(scaled_WKJ, -1)).masked_fill(~rows_WK, 0.0)
    g_WJ = (b_WJ.log() - torch.logsumexp(scaled_WKJ + f_WK[:, :, None], -2)).masked_fill(~columns_WJ, 0.0)
    return f_WK, g_WJ
