"""One token from logits, by inverse CDF. Shape suffixes: B rows, V vocabulary."""

import torch
from torch import Tensor

from onpath.records import Sampling
from onpath.system.errors import UserError


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probs [B] under the truncated, tempered distribution, by inverse CDF.

    One uniform per token; tokens of probability 0 are never drawn. Temperature 0 takes the likeliest token,
    with log-prob 0: the distribution drawn from has one entry.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        best_B = logits_BV.argmax(-1)
        return best_B, 0.0 * logits_BV.gather(-1, best_B[:, None]).squeeze(-1)
    logp_BV = truncate(logits_BV / sampling.temperature, sampling).log_softmax(-1)
    cdf_BV = logp_BV.exp().double().cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # rounding must not reach the total
    point_B1 = torch.minimum(uniform_B[:, None] * total_B1, below_B1)
    token_B = torch.searchsorted(cdf_BV, point_B1, right=True).squeeze(-1)
    token_B = token_B.clamp(max=logp_BV.shape[-1] - 1)  # of logits that are no numbers: see check_finite
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)


def check_finite(logps: Tensor) -> None:
    """Whether what was drawn came from numbers: each way of generating asks once, of all its log-probs.

    Raises:
        UserError: it did not.
    """
    if not bool(torch.isfinite(logps).all()):
        raise UserError(
            "the model's logits are not finite: it has diverged, or its dtype is too narrow; use a lower "
            "optim.lr, or float32 instead of float16"
        )


def truncate(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside top-k and top-p at −inf; top-p keeps the token that crosses p."""
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        p_BV = sorted_BV.softmax(-1)
        drop_BV = p_BV.cumsum(-1) - p_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(
            torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf
        )
    return logits_BV
