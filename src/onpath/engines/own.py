"""An engine of the user's own (`onpath.train(config, engine=…)`): told how the run renders prompts and where
responses end, and looked at: its completions must be such as the student could have drawn.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import UnionType

from onpath.data.render import Renderer
from onpath.engines.base import Engine, sampled
from onpath.engines.decoding.branches import Past, Place
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.decoding.side_by_side import Finished, Start
from onpath.engines.stops import Stops, string_end
from onpath.engines.vllm import checked_completion
from onpath.records import Completion, Prompt, Rollout, Sampling
from onpath.system import code
from onpath.system.errors import UserError

_HOOKS = (
    "generate", "continue_from", "answer", "can_draw_from", "draw_from", "relay", "score", "sync_weights"
)  # fmt: skip
"""What onpath calls of an engine."""


def check_engine(engine: object) -> None:
    """Before anything is loaded for it.

    Raises:
        UserError: it is no engine, one that writes nothing, or one that takes other arguments than it is
            given.
    """
    if not isinstance(engine, Engine):
        given = type(engine).__name__
        raise UserError(f"engine is {given}; it must be derived from onpath.engines.base.Engine")
    kind = type(engine)
    if kind.generate is Engine.generate and kind.continue_from is Engine.continue_from:
        raise UserError(f"engine {kind.__name__}: it has no continue_from, as docs/extending.md says")
    for hook in _HOOKS:
        code.check_takes(f"engine {kind.__name__}: {hook}", getattr(engine, hook), getattr(Engine, hook))


class OwnEngine(Engine):
    """Asks the engine, and checks what it answers. `renderer`, `stop_ids` and `stop_strings` of the engine
    are set to those of the run.

    Args:
        vocabulary: ids that student and teacher share.
    """

    def __init__(self, engine: Engine, renderer: Renderer, stops: Stops, *, vocabulary: int) -> None:
        self.engine, self.vocabulary = engine, vocabulary
        self.name, self.modules = f"engine {type(engine).__name__}", code.modules_of(engine)
        # A copy: with rollout.overlap it renders in a thread of its own.
        self.renderer = engine.renderer = copy.deepcopy(renderer)
        self.stop_ids = engine.stop_ids = stops.ids
        self.stop_strings = engine.stop_strings = stops.strings
        self.policy_version, self.server = engine.policy_version, engine.server
        self.shares_weights, self.takes_prefixes = engine.shares_weights, engine.takes_prefixes

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, keys: Sequence[str] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`; by the engine's own, if it has one."""
        if type(self.engine).generate is Engine.generate:
            return sampled(self, self.renderer, prompts, sampling, n=n, keys=keys)
        with self._blamed("generate"):
            rollouts = self.engine.generate(prompts, sampling, n=n, keys=keys)
        done = self._all("generate", rollouts, len(prompts) * n, sampling, kind=Rollout)
        return [replace(r, **vars(c)) for r, c in zip(rollouts, done, strict=True)]

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        with self._blamed("continue_from"):
            done = self.engine.continue_from(prefixes, sampling, keys=keys)
        return self._all("continue_from", done, len(prefixes), sampling)

    def answer(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """See `Engine.answer`."""
        followed = None if drafts is None else [draft.unkept() for draft in drafts]
        with self._blamed("answer"):
            done = self.engine.answer(prompts, prefixes, sampling, keys=keys, drafts=followed)
        return self._all("answer", done, len(prefixes), sampling)

    def can_draw_from(self, past: Past | None) -> bool:
        """See `Engine.can_draw_from`."""
        with self._blamed("can_draw_from"):
            return self.engine.can_draw_from(past)

    def draw_from(
        self,
        past: Past,
        places: Sequence[Place],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """See `Engine.draw_from`."""
        with self._blamed("draw_from"):
            done = self.engine.draw_from(past, places, sampling, keys=keys, drafts=drafts)
        return self._all("draw_from", done, len(places), sampling)

    def relay(
        self, teacher: Engine, starts: Sequence[Start], sampling: Sampling, *, delta: float
    ) -> list[Finished] | None:
        """See `Engine.relay`."""
        with self._blamed("relay"):
            return self.engine.relay(teacher, starts, sampling, delta=delta)

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        with self._blamed("score"):
            found = self.engine.score(contexts, responses)
        try:
            scores = [tuple(map(float, row)) for row in found]
        except (TypeError, ValueError):
            raise UserError(f"{self.name}: score gives a list of log-probs for each response") from None
        if [len(row) for row in scores] != [len(response) for response in responses]:
            raise UserError(f"{self.name}: score gives one log-prob for each token of each response")
        return scores

    def in_step(self) -> AbstractContextManager[None]:
        """See `Engine.in_step`."""
        return self.engine.in_step()

    def sync_weights(self, version: int) -> None:
        """See `Engine.sync_weights`."""
        with self._blamed("sync_weights"):
            self.engine.sync_weights(version)
        self.policy_version = self.engine.policy_version

    def _blamed(self, hook: str) -> AbstractContextManager[None]:
        return code.blamed(f"{self.name}: {hook}", self.modules)

    def _all(
        self,
        hook: str,
        done: Sequence[Completion] | Sequence[Rollout],
        asked: int,
        sampling: Sampling,
        *,
        kind: type[Completion] | type[Rollout] | UnionType = Completion | Rollout,
    ) -> list[Completion]:
        listed = isinstance(done, Sequence) and not isinstance(done, str)
        parts = [type(c).__name__ for c in done if not isinstance(c, kind)] if listed else []
        if parts or not listed:
            given = f"a list with {parts[0]} in it" if parts else type(done).__name__
            wanted = "Rollouts" if kind is Rollout else "Completions"
            raise UserError(f"{self.name}: {hook} gave {given}; it gives a list of {wanted}")
        if len(done) != asked:
            raise UserError(f"{self.name}: gave {len(done)} completions where {asked} were asked for")
        return [self._checked(c, sampling) for c in done]

    def _checked(self, done: Completion | Rollout, sampling: Sampling) -> Completion:
        """With plain numbers, whatever kind of sequences the engine made."""
        try:
            ids, logprobs = tuple(map(int, done.ids)), tuple(map(float, done.logprobs))
        except (TypeError, ValueError):
            raise UserError(f"{self.name}: a completion's ids and log-probs must be numbers") from None
        inside = all(0 <= t < self.vocabulary for t in ids)
        found = checked_completion(
            ids,
            logprobs,
            sampling,
            self.stop_ids,
            self.vocabulary,
            self.name,
            string_end=string_end(ids, self.stop_strings, self.renderer.text) if inside else None,
            may_end=True,
        )
        short = len(found.ids) < sampling.max_new_tokens
        return replace(found, finish_reason=done.finish_reason) if short else found
