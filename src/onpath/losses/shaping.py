"""Weights and advantages per token: pure functions of detached per-token values.

Each returns factors to multiply with each other and with a trajectory's own weights; none changes the loss's
denominator, which is the count of tokens before shaping. Value-dependent clips that need no other token
(`Objective.entry_clip`, `Objective.token_clip`) happen inside the pass; what compares tokens (medians,
quantiles, means) needs the values of all
of them first: take them from `token_stats`, then hand the product to `fused_objective` as weights.

Shape suffixes: N tokens, the responses one after the other; S sequences, T longest of them.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def first_tokens(positions: Int[Tensor, " N"], *, n: int) -> Float[Tensor, " N"]:
    """1 for the first n tokens of each response, else 0. `positions` count from 0 within the response.

    Truncation, the token-level remedy for unreliable late prefixes (arXiv 2606.08432's baselines).

    >>> first_tokens(torch.tensor([0, 1, 2]), n=2).tolist()
    [1.0, 1.0, 0.0]
    """
    return (positions < n).float()


def clip_factor(values: Float[Tensor, " N"], *, cap: float | Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """min(1, cap / value): multiplied into a loss it makes the value min(value, cap) and shrinks its gradient
    alike.

    Unlike `Objective.token_clip`, whose capped tokens give no gradient, a token above the cap still pulls, at
    the cap's strength.

    >>> clip_factor(torch.tensor([0.5, 4.0]), cap=1.0).tolist()
    [1.0, 0.25]
    """
    cap = torch.as_tensor(cap, dtype=values.dtype, device=values.device)
    return torch.where(values > cap, cap / values.clamp_min(torch.finfo(values.dtype).tiny), 1.0)


def median_cap(
    values: Float[Tensor, " N"], *, selected: Bool[Tensor, " N"], sequence_ids: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """min(1, median / value) at the selected tokens, 1 elsewhere; the median is the response's own.

    TOPD's suppression of high-loss tokens at no real fork (arXiv 2606.00305). An even count has the mean of
    the middle two.

    >>> median_cap(torch.tensor([1.0, 2.0, 8.0]), selected=torch.tensor([False, False, True]),
    ...            sequence_ids=torch.tensor([0, 0, 0])).tolist()
    [1.0, 1.0, 0.25]
    """
    medians = torch.empty_like(values)
    for sequence in sequence_ids.unique():
        inside = sequence_ids == sequence
        medians[inside] = values[inside].quantile(0.5)
    return torch.where(selected, clip_factor(values, cap=medians), 1.0)


def proportional(values: Float[Tensor, " N"], *, mean: float | Float[Tensor, ""]) -> Float[Tensor, " N"]:
    """value / mean: entropy- or divergence-weighted loss with mean weight 1, given the mean over all the
    step's tokens.

    The mean is an argument, as a denominator is, so that weights do not depend on how a batch was split.

    >>> proportional(torch.tensor([1.0, 3.0]), mean=2.0).tolist()
    [0.5, 1.5]
    """
    return values / torch.as_tensor(mean, dtype=values.dtype, device=values.device)


def top_share(values: Float[Tensor, " N"], *, share: float) -> Float[Tensor, " N"]:
    """1 for the given share of tokens with the largest values (rounded up, ties by position), else 0.

    With the student's entropy: training on the forking tokens alone (arXiv 2506.01939: 20%; TIP, arXiv
    2604.14084: 50%).

    >>> top_share(torch.tensor([0.1, 0.9, 0.5, 0.2]), share=0.5).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], not {share}")
    count = min(len(values), int(-(-len(values) * share // 1)))
    kept = torch.zeros_like(values)
    kept[values.sort(descending=True, stable=True).indices[:count]] = 1.0
    return kept


def confident_and_wrong(
    student_entropy: Float[Tensor, " N"],
    divergence: Float[Tensor, " N"],
    *,
    entropy_share: float,
    divergence_share: float,
) -> Float[Tensor, " N"]:
    """1 for high-divergence tokens among those of low student entropy, else 0: TIP's third quadrant (arXiv
    2604.14084).

    Args:
        entropy_share: share of tokens that count as high-entropy; they are left out.
        divergence_share: share of the remaining tokens that is kept, by divergence.
    """
    low = top_share(student_entropy, share=entropy_share) == 0
    kept = torch.zeros_like(divergence)
    if bool(low.any()):
        kept[low] = top_share(divergence[low], share=divergence_share)
    return kept


def discounted_future_sum(
    values: Float[Tensor, " N"], *, sequence_ids: Int[Tensor, " N"], discount: float
) -> Float[Tensor, " N"]:
    """Σ_{u≥t} γ^{u−t}·value_u within each sequence; the tokens of one sequence stand together and in order.

    With values log p_T − log p_S of sampled tokens and γ = 1 this is the advantage of the whole trajectory's
    reverse KL.

    >>> values = torch.tensor([1.0, 2.0, 4.0])
    >>> discounted_future_sum(values, sequence_ids=torch.tensor([0, 0, 1]), discount=0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    if not len(values):
        return values.clone()
    _, row_N, length_S = sequence_ids.unique_consecutive(return_inverse=True, return_counts=True)
    column_N = torch.arange(len(values), device=values.device) - (length_S.cumsum(0) - length_S)[row_N]
    padded_ST = values.new_zeros(len(length_S), int(length_S.max()))
    padded_ST[row_N, column_N] = values
    for t in range(padded_ST.shape[1] - 2, -1, -1):
        padded_ST[:, t] += discount * padded_ST[:, t + 1]
    return padded_ST[row_N, column_N]
