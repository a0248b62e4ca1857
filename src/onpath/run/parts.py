"""Everything that the steps of a run work with."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from onpath.config.build import Config
from onpath.data.render import Renderer
from onpath.engines.base import Engine
from onpath.engines.head import head_of
from onpath.engines.hf import HFEngine
from onpath.engines.overlap import Ahead
from onpath.engines.replay import Cache
from onpath.engines.teacher import Teacher
from onpath.grade.base import Grader
from onpath.losses import Head, Objective
from onpath.methods import Method, Tools
from onpath.records import Prompt, Sampling
from onpath.run.gradient_cosine import GradientCosine


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that the steps of a run work with."""

    config: Config
    pool: tuple[Prompt, ...]
    evals: dict[str, tuple[Prompt, ...]]
    skipped: int
    """Bad rows left out (data.skip_bad)."""
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    student: nn.Module
    teacher: Teacher
    engine: Engine
    """Writes with the student's weights: rollouts and evaluations."""
    engine_over: Callable[[nn.Module], HFEngine]
    """An engine in this process over a model of the student's kind."""
    sampler: Engine
    """Writes the rollouts that are trained on: the engine, or what the starting weights wrote (offline)."""
    method: Method
    grader: Grader
    objective: Objective
    sampling: Sampling
    vocabulary: int
    device: torch.device
    tools: Tools
    """What the method works with."""
    cosine: GradientCosine
    cache: Cache | None = None
    """What the starting weights wrote, of an offline method."""
    ahead: Ahead | None = None
    """Draws the next batch while this one trains (rollout.overlap)."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def head(self) -> Head:
        """The student's output layer."""
        return head_of(self.student, self.vocabulary)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 forward passes if optim.bf16 asks for them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.bf16)
