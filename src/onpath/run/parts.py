"""Everything that the steps of a run work with."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from onpath.config.whole import Config
from onpath.engines import sharding
from onpath.engines.base import Engine, Generators
from onpath.engines.forward import Models
from onpath.engines.overlap import Overlap
from onpath.engines.self_check import Agreement
from onpath.engines.stops import Stops
from onpath.losses import Objective
from onpath.methods.base import Method
from onpath.methods.tools import Text, Tools
from onpath.records import Sampling
from onpath.run.gradient_cosine import GradientCosine
from onpath.run.guidance_ratio import GuidanceRatio
from onpath.run.inputs import Prompts
from onpath.run.refresh import Refreshed


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `assemble` makes of a config."""

    config: Config
    prompts: Prompts
    models: Models
    generators: Generators
    text: Text
    sampling: Sampling
    """Of the rollouts."""
    sampler: Engine
    """Generates the rollouts that are trained on: the student's engine, or that of rollout.overlap."""
    method: Method
    objective: Objective
    gradient_cosine: GradientCosine
    guidance_ratio: GuidanceRatio
    stops: Stops
    refreshed: Refreshed | None = None
    """Rollouts and what the method made of them, of older weights (rollout.refresh)."""
    overlap: Overlap | None = None
    """Draws the next batch while this one trains."""
    warnings: tuple[str, ...] = ()
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """What the start-up check measured, by the option that names the model."""

    @contextmanager
    def whole(self, *, prepares: bool = True) -> Iterator[None]:
        """While something is sampled: of sharded models, all weights of those that it runs, and of a vLLM
        that processes share, their patience.

        Args:
            prepares: whether the method prepares in it too.
        """
        models, runs = self.models, prepares and self.config.method.gathers_models
        student = models.student if runs or self.generators.student.shares_weights else None
        gathered = sharding.whole(student, *(models.teacher.models if runs else ()))
        with gathered, self.generators.student.in_step():
            yield

    def whole_step(self) -> AbstractContextManager[None]:
        """While a step samples, scores and trains: the student is whole with parallel.shard: step."""
        return sharding.whole(self.models.student if self.config.parallel.shard == "step" else None)

    def close(self) -> None:
        """Waits for what is being drawn; what a teacher was asked for and nobody needs is given up; a vLLM
        of this run's ends."""
        with ExitStack() as ending:  # each, whatever becomes of those before it; in reverse
            ending.callback(self.generators.student.close)
            ending.callback(self.models.teacher.close)
            if self.overlap is not None:
                ending.callback(self.overlap.close)

    @property
    def tools(self) -> Tools:
        """What the method works with."""
        return self.method.tools
