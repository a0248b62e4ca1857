"""Weights and advantages per token: pure functions of detached per-token values, to be multiplied as one likes.

Shape suffixes: N tokens.
"""

from jaxtyping import Float, Int
from torch import Tensor


def discounted_future_sum(
    values: Float[Tensor, " N"], *, sequence_ids: Int[Tensor, " N"], discount: float
) -> Float[Tensor, " N"]:
    """Σ_{u≥t} γ^{u−t}·values_u within each sequence; the tokens of one sequence stand together and in order.

    >>> discounted_future_sum(torch.tensor([1.0, 2.0, 4.0]), sequence_ids=torch.tensor([0, 0, 1]), discount=0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    result = values.clone()
    for t in range(len(values) - 2, -1, -1):
        if sequence_ids[t] == sequence_ids[t + 1]:
            result[t] = values[t] + discount * result[t + 1]
    return result
