"""What every engine can do, and the questions that it answers about itself."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import nn

from onpath.data.render import Renderer
from onpath.engines.decoding.branches import Past, Place
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.decoding.side_by_side import Finished, Start
from onpath.engines.remote.wire import Server
from onpath.records import Completion, Prompt, Rollout, Sampling


class Engine:
    """Generates and scores tokens. The same request gives the same tokens however it is batched.

    A subclass defines `continue_from`, `score` and, if its weights can change, `sync_weights`.
    """

    renderer: Renderer
    policy_version: int = 0
    """Optimiser steps that the engine's weights have seen."""
    shares_weights: bool = False
    """Whether it reads the very tensors that train: then nothing may be generated while they move."""
    takes_prefixes: bool = True
    """Whether it goes on from token ids and scores them; False: it answers messages only."""
    generates: bool = True
    """Whether it can write; False: it only scores (a mixture of teachers)."""
    shows_early: bool = False
    """Whether its `generate` takes `finished`, and shows it each rollout while others are written."""
    stop_ids: frozenset[int] = frozenset()
    """Ids that end what it generates."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end it, at the token that completes one."""
    server: Server | None = None
    """The server that it asks, if there is one."""

    def in_step(self) -> AbstractContextManager[None]:
        """Around what processes ask for in different numbers of calls, where they share what answers: all
        enter, and leave. An exchange of all inside of it goes through `distributed`. Outside of it each makes
        as many calls as the others."""
        return nullcontext()

    def of(self, teacher: str | None) -> "Engine":
        """That of one of several teachers (`routed.py`); otherwise itself."""
        return self

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, keys: Sequence[str] | None = None
    ) -> list[Rollout]:
        """n samples per prompt, a prompt's samples side by side, in the prompts' order.

        `keys` name the requests (default: the prompts' ids): a draw depends on (seed, key, sample) alone.
        """
        return sampled(self, self.renderer, prompts, sampling, n=n, keys=keys)

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """One completion per prefix. `keys` name the requests: a draw depends on (seed, key) alone."""
        raise NotImplementedError

    def answer(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: "Sequence[Drafts] | None" = None,
    ) -> list[Completion]:
        """One completion per prefix, which is a rendering of the prompt beside it and may hold the beginning
        of a response. An engine that answers messages only is shown the prompts; one that can verify many
        tokens at once follows `drafts`, one per prefix, which change nothing."""
        return self.continue_from(prefixes, sampling, keys=keys)

    def can_draw_from(self, past: Past | None) -> bool:
        """Whether it can go on from the keys and values that a scoring pass has left."""
        return False

    def draw_from(
        self,
        past: Past,
        places: Sequence[Place],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """`continue_from` at places of the rows of `past`; only if it can draw from it."""
        raise NotImplementedError

    def relay(
        self, teacher: "Engine", starts: Sequence[Start], sampling: Sampling, *, delta: float
    ) -> list[Finished] | None:
        """Goes on with responses together with a teacher's engine (`decoding/side_by_side.py`); None where
        these two cannot, whatever is asked."""
        return None

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """Log-probs of each response token under the model itself (temperature 1), nats."""
        raise NotImplementedError

    def sync_weights(self, version: int) -> None:
        """Takes over the trained weights; rollouts from now on carry `version`."""
        self.policy_version = version

    def close(self) -> None:
        """Gives back what it has started; nothing is asked of it afterwards. An engine that a run was given
        (`onpath.train(engine=…)`) is its owner's to close."""


@dataclass(frozen=True, kw_only=True)
class Generators:
    """Who generates."""

    student: Engine
    """With the student's weights: rollouts and evaluations."""
    teacher: Engine
    """In the teacher's name: rewrites, windows, samples."""
    over: Callable[[nn.Module], Engine]
    """An engine in this process over a model of the student's kind."""


def gone_on(
    engine: Engine,
    prefixes: Sequence[Sequence[int]],
    rooms: Sequence[int],
    sampling: Sampling,
    *,
    keys: Sequence[str],
    longest: int,
) -> list[Completion]:
    """`continue_from` with a limit for each prefix; with one of 0 nothing is generated.

    Args:
        rooms: most new tokens of each: what fits its prefix.
        longest: most tokens, prefix and new ones, that the engine takes.
    """
    done = {i: Completion(ids=(), logprobs=(), finish_reason="length") for i in range(len(prefixes))}
    todo = sorted((i for i, room in enumerate(rooms) if room > 0), key=lambda i: -rooms[i])
    while todo:
        # A batch has one limit, which is too much for a row whose prefix only just fits.
        size = rooms[todo[0]]
        now = [i for i in todo if i == todo[0] or len(prefixes[i]) + size <= longest]
        found = engine.continue_from(
            [prefixes[i] for i in now], replace(sampling, max_new_tokens=size), keys=[keys[i] for i in now]
        )
        done |= {i: c.truncated(rooms[i]) for i, c in zip(now, found, strict=True)}
        todo = [i for i in todo if i not in now]
    return [done[i] for i in range(len(prefixes))]


def sampled(
    engine: Engine,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    n: int,
    keys: Sequence[str] | None,
    finished: Callable[[Rollout], None] | None = None,
) -> list[Rollout]:
    """`Engine.generate` by the engine's own `continue_from`.

    Args:
        finished: see `ServerEngine.generate`.
    """
    keys = [p.id for p in prompts] if keys is None else keys
    blank = unwritten(engine, renderer, prompts, sampling, n=n)
    early = {} if finished is None else {"finished": lambda place, c: finished(blank[place].continued(c))}
    done = engine.continue_from([r.context for r in blank], sampling, keys=sample_keys(keys, n), **early)
    return [r.continued(c) for r, c in zip(blank, done, strict=True)]


def unwritten(
    engine: Engine, renderer: Renderer, prompts: Sequence[Prompt], sampling: Sampling, *, n: int
) -> list[Rollout]:
    """What `Engine.generate` fills with tokens, n for each prompt."""
    contexts = [renderer.ids(p) for p in prompts]
    jobs = [(p, i, ids) for p, ids in zip(prompts, contexts, strict=True) for i in range(n)]
    return [
        Rollout(
            prompt=prompt,
            sample=sample,
            place=place,
            context=context,
            ids=(),
            logprobs=(),
            finish_reason="length",
            policy_version=engine.policy_version,
            sampling=sampling,
        )
        for place, (prompt, sample, context) in enumerate(jobs)
    ]


def sample_keys(keys: Sequence[str], n: int) -> list[str]:
    """Names of the draws of n samples each."""
    return [f"{key}/{i}" for key in keys for i in range(n)]
