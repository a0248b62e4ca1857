"""What all methods that intervene on trajectories are tested with: tiny models, one step, plain loops."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onpath.config.whole import Config
from onpath.methods.base import Prepared
from onpath.records import Trajectory
from onpath.run.assemble import assemble
from onpath.run.parts import Parts
from onpath.training import sample

Tiny = Callable[..., Config]

ARMS: dict[str, dict[str, Any]] = {
    "opd of the teacher's samples": {"name": "opd", "writer": "teacher"},
    "branch": {"name": "branch", "branches": 2, "failed_only": False},
    "bridge": {
        "name": "bridge",
        "window": 9,
        "distance": 0.02,
        "meet_window": 3,
        "every": 2,
        "meet_distance": 0.8,
    },
    "relay": {"name": "relay", "delta": 1.0, "hold": 1, "legs": 2},
    "relay from the start": {"name": "relay", "delta": 1.0, "from_start": True},
    "topd": {
        **{"name": "topd", "window": 6, "top_share": 0.1, "guidance_weight": "auto", "suppress": "high"},
        "window_temperature": 0.7,
    },
    "topd spliced": {
        **{"name": "topd", "plan": "spliced", "splice": "end", "window": 4, "top_share": 0.1},
        "window_temperature": 0.7,
    },
    "truncate": {"name": "truncate", "stop_when": "low_kl", "window": 3, "patience": 1, "low_share": 0.5},
}
"""Options with which each method does something on the tiny models, its state and its draws included."""


def options_of(arm: dict[str, Any]) -> dict[str, Any]:
    """As the keywords of `tiny`."""
    return {f"method__{key}": value for key, value in arm.items()}


def parts_of(tiny: Tiny, **method: Any) -> Parts:
    """Parts of a run over the tiny models with rollouts of up to 20 tokens."""
    return assemble(tiny(**options_of(method), rollout__max_new_tokens=20))


def prepared(parts: Parts, step: int = 0) -> Prepared:
    """What the method makes of the first step's rollouts."""
    return parts.method.prepare(sample(parts, step), step=step)


@torch.no_grad()
def logp_after(model: nn.Module, prefix: Sequence[int]) -> Tensor:
    """log p [V] of the next token by a forward pass of its own, without a cache."""
    row: Tensor = model(input_ids=torch.tensor([list(prefix)])).logits[0, -1].float().log_softmax(-1)
    return row


@torch.no_grad()
def logps_along(model: nn.Module, t: Trajectory) -> Tensor:
    """log p [L, V] that predicts each response token, one row at a time."""
    ids = torch.tensor([[*t.student_context, *t.response]])
    logits: Tensor = model(input_ids=ids).logits[0, len(t.student_context) - 1 : -1].float()
    return logits.log_softmax(-1)
