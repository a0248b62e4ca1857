"""What every engine can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from onpath.data.render import Renderer
from onpath.records import FinishReason, Prompt, Rollout, Sampling


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Tokens written after a prefix.

    >>> Completion(ids=(4, 2), logprobs=(-0.3, -0.1), finish_reason="stop").finish_reason
    'stop'
    """

    ids: tuple[int, ...]
    """The stop token included, if one was drawn."""
    logprobs: tuple[float, ...]
    """Under the distribution drawn from (after temperature, top-k, top-p), nats."""
    finish_reason: FinishReason


class Engine(Protocol):
    """Writes and scores tokens. The same request gives the same tokens however it is batched."""

    policy_version: int
    """Optimiser steps that the engine's weights have seen."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, keys: Sequence[str] | None = None
    ) -> list[Rollout]:
        """n samples per prompt, a prompt's samples side by side, in the prompts' order.

        `keys` name the requests (default: the prompts' ids): a draw depends on (seed, key, sample) alone.
        """
        ...

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """One completion per prefix. `keys` name the requests: a draw depends on (seed, key) alone."""
        ...

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """Log-probs of each response token under the model itself (temperature 1), nats."""
        ...

    def sync_weights(self, version: int) -> None:
        """Takes over the trained weights; rollouts from now on carry `version`."""
        ...


def sampled(
    engine: Engine,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    n: int,
    keys: Sequence[str] | None,
) -> list[Rollout]:
    """`Engine.generate` by the engine's own `continue_from`."""
    keys = [p.id for p in prompts] if keys is None else keys
    contexts = [renderer.ids(p) for p in prompts]
    jobs = [(p, i, ids) for p, ids in zip(prompts, contexts, strict=True) for i in range(n)]
    done = engine.continue_from(
        [j[2] for j in jobs], sampling, keys=[f"{key}/{i}" for key in keys for i in range(n)]
    )
    return [
        Rollout(
            prompt=p,
            sample=i,
            context=ids,
            ids=c.ids,
            logprobs=c.logprobs,
            finish_reason=c.finish_reason,
            policy_version=engine.policy_version,
            sampling=sampling,
        )
        for (p, i, ids), c in zip(jobs, done, strict=True)
    ]
