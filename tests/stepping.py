"""One optimiser step on trajectories that a test chooses, through the step that runs use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onpath.engines.base import Engine
from onpath.methods import Prepared
from onpath.records import Rollout, Trajectory
from onpath.run.meter import Meter
from onpath.run.parts import Parts
from onpath.training import one_step
from tests.conftest import CHARACTERS, make_tokenizer


@dataclass
class Given:
    """A method that trains on what it was given."""

    trajectories: list[Trajectory]
    guidance_weight: float = 1.0
    compares_samples: bool = False
    measured: list[Mapping[str, Any]] = field(default_factory=list)

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        return Prepared(trajectories=self.trajectories, guidance_weight=self.guidance_weight)

    def after_step(self, measured: Mapping[str, Any]) -> None:
        self.measured.append(measured)

    def state(self) -> dict[str, Tensor]:
        return {}


class Silent(Engine):
    """A sampler that writes nothing: the trajectories are there already."""

    def generate(self, *_: Any, **__: Any) -> list[Rollout]:
        return []


class Recorder:
    """Stands in for the optimiser: keeps the gradients that the step hands over, and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.zero_grad(set_to_none=set_to_none)


def step_on(
    parts: Parts,
    trajectories: Sequence[Trajectory],
    *,
    micro_batch_tokens: int | None = None,
    guidance_weight: float = 1.0,
) -> tuple[Meter, dict[str, Tensor]]:
    """What one step measures and the gradients before the optimiser (clipping as in the config)."""
    if micro_batch_tokens is not None:
        optim = parts.config.optim.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
        parts = replace(parts, config=parts.config.model_copy(update={"optim": optim}))
    recorder = Recorder(parts.models.student)
    given = replace(parts, method=Given(list(trajectories), guidance_weight), sampler=Silent())
    meter = one_step(given, recorder, 0)  # type: ignore[arg-type]
    return meter, recorder.gradients


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten().double() for g in gradients.values()])


def perturbed_copy(model: nn.Module, target: Path, *, scale: float, seed: int = 7) -> Path:
    """A model directory whose weights lie near those of `model`, which it leaves as it is."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if "norm" not in name and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            value.add_(torch.randn(value.shape, generator=generator), alpha=scale)
    model.save_pretrained(target, state_dict=state)
    make_tokenizer(CHARACTERS).save_pretrained(target)
    return target
