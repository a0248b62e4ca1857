"""AdamW, the learning rate's schedule, and the gradient's last check."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onpath.config.whole import Config
from onpath.system.errors import UserError


def make_optimizer(config: Config, student: nn.Module) -> tuple[torch.optim.AdamW, Callable[[int], None]]:
    """AdamW, and the function that sets the learning rate of a step."""
    optim = config.optim
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps
    )

    def schedule(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * rate(step, config)

    return optimizer, schedule


def rate(step: int, config: Config) -> float:
    """Learning rate of step `step` (from 0) as a share of the peak: linear warm-up, then the schedule, which
    reaches its end one step behind the last. A single step has the peak."""
    optim = config.optim
    warm = math.ceil(optim.warmup * optim.steps) if optim.steps > 1 else 0
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, optim.steps - warm)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        optim.schedule
    ]
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape


def finite(norm: Tensor, step: int) -> float:
    """The gradient's norm in step `step` (from 0).

    Raises:
        UserError: it is NaN or infinite.
    """
    value = float(norm)
    if not math.isfinite(value):
        raise UserError(
            f"step {step + 1}: the gradient is not finite; go on from the last checkpoint with another "
            "run.name and a lower optim.lr, or float32 instead of bf16"
        )
    return value
