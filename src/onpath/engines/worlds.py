"""A task's world as engines and teachers: rollouts spoiled from outside, and a teacher that is lost behind an
error (`onpath.data.tasks.World`).

Both are pure functions of (seed, problem), and lie around the engine and the teacher of the run: methods ask
as ever. N response tokens, H hidden.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.data.batch import Batch
from onpath.data.render import Renderer
from onpath.data.tasks import World, task_of
from onpath.engines.base import Engine, gone_on, sample_keys
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.routed import by_teacher
from onpath.engines.teacher import ModelTeacher, Teacher
from onpath.losses import Head, TeacherHidden
from onpath.records import Completion, Prompt, Rollout, Sampling
from onpath.system.errors import UserError

After = Callable[[Sequence[int]], int | None]
"""Ids of prompt and response → the place behind which the teacher is lost."""


def world_of(source: str) -> World | None:
    """Of the training data; None: a world that does nothing to rollouts and teacher, or none."""
    task = task_of(source)
    world = None if task is None else task.world
    return world if world is not None and (world.spoils or world.loses) else None


def lost_behind(world: World | None, seed: int, renderer: Renderer) -> After:
    """`World.lost_after` of ids."""
    return lambda ids: None if world is None else world.lost_after(seed, renderer.tokens(ids))


class _InWorld(Engine):
    """Around the student's engine, in a world that puts tokens into what it writes.

    Args:
        longest: most tokens, prompt and response, that the engine takes.
    """

    def __init__(self, engine: Engine, world: World, *, seed: int, longest: int) -> None:
        self.engine, self.world, self.seed, self.longest = engine, world, seed, longest
        self.renderer = engine.renderer

    def _id(self, token: str) -> int:
        (found,) = self.renderer.text_ids(token)
        return found

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        return self.engine.score(contexts, responses)

    def sync_weights(self, version: int) -> None:
        """See `Engine.sync_weights`."""
        self.engine.sync_weights(version)

    def in_step(self) -> AbstractContextManager[None]:
        """See `Engine.in_step`."""
        return self.engine.in_step()

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()


class SpoilingEngine(_InWorld):
    """Generates as another engine does, and puts a token of the world's into some rollouts, from which the
    student goes on. Of that token the rollout has the student's own log-prob."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, keys: Sequence[str] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        rollouts = self.engine.generate(prompts, sampling, n=n, keys=keys)
        names = sample_keys(keys or [p.id for p in prompts], n)
        hits = [
            (place, at, self._id(token))
            for place, r in enumerate(rollouts)
            for at, token in filter(None, [self._spoiled(r)])
        ]
        if not hits:
            return rollouts
        begun = [(place, (*rollouts[place].ids[:at], token)) for place, at, token in hits]
        contexts = [rollouts[place].context for place, _ in begun]
        ends = _rewritten(
            self.engine,
            contexts,
            [ids for _, ids in begun],
            sampling,
            keys=[f"{names[place]}/spoiled" for place, _ in begun],
            longest=self.longest,
        )
        for (place, ids), (logp, rest) in zip(begun, ends, strict=True):
            old = rollouts[place]
            rollouts[place] = replace(
                old,
                ids=ids + rest.ids,
                logprobs=(*old.logprobs[: len(ids) - 1], logp, *rest.logprobs),
                finish_reason=rest.finish_reason,
            )
        return rollouts

    def _spoiled(self, rollout: Rollout) -> tuple[int, str] | None:
        tokens = self.renderer.tokens(rollout.ids)
        return self.world.spoiled(self.seed, rollout.prompt.question, tokens)

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        return self.engine.continue_from(prefixes, sampling, keys=keys)


class RepeatingEngine(_InWorld):
    """The student's engine as a method has it, in a world in which the student errs again: what it writes
    anew holds an error at that place too (`World.spoiled_again`). Evaluations do not."""

    def __init__(self, engine: Engine, world: World, *, seed: int, longest: int) -> None:
        super().__init__(engine, world, seed=seed, longest=longest)
        self.shares_weights = engine.shares_weights
        self.stop_ids, self.stop_strings, self.server = engine.stop_ids, engine.stop_strings, engine.server

    @property
    def policy_version(self) -> int:  # type: ignore[override]
        """See `Engine.policy_version`."""
        return self.engine.policy_version

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        done = self.engine.continue_from(prefixes, sampling, keys=keys)
        names = [str(i) for i in range(len(prefixes))] if keys is None else list(keys)
        found = [self._again(prefix, c) for prefix, c in zip(prefixes, done, strict=True)]
        hits = [(i, ids) for i, ids in enumerate(found) if ids is not None]
        ends = _rewritten(
            self.engine,
            [prefixes[i] for i, _ in hits],
            [ids for _, ids in hits],
            sampling,
            keys=[f"{names[i]}/again" for i, _ in hits],
            longest=self.longest,
        )
        for (i, ids), (logp, rest) in zip(hits, ends, strict=True):
            done[i] = replace(
                rest,
                ids=ids + rest.ids,
                logprobs=(*done[i].logprobs[: len(ids) - 1], logp, *rest.logprobs),
            )
        return done

    def _again(self, prefix: Sequence[int], completion: Completion) -> tuple[int, ...] | None:
        """What it has written up to the token that it errs at again, with it."""
        tokens = self.renderer.tokens((*prefix, *completion.ids))
        hit = self.world.spoiled_again(self.seed, tokens, len(prefix))
        if hit is None:
            return None
        at, spelling = hit
        return (*completion.ids[: at - len(prefix)], self._id(spelling))


def _rewritten(
    engine: Engine,
    contexts: Sequence[Sequence[int]],
    begun: Sequence[tuple[int, ...]],
    sampling: Sampling,
    *,
    keys: Sequence[str],
    longest: int,
) -> list[tuple[float, Completion]]:
    """The engine's own log-prob of the last token of each text that was begun, and how it goes on."""
    if not begun:
        return []
    rooms = [sampling.max_new_tokens - len(ids) for ids in begun]
    prefixes = [(*context, *ids) for context, ids in zip(contexts, begun, strict=True)]
    scored = engine.score(contexts, begun)
    done = gone_on(engine, prefixes, rooms, sampling, keys=keys, longest=longest)
    return [(logps[-1], rest) for logps, rest in zip(scored, done, strict=True)]


class LostTeacher(Teacher):
    """A teacher that is another model behind an error.

    Logits are linear in the hidden states, so both models fit into one head: it is [W_sound, W_lost], and the
    states of a token are [h_sound, 0], or behind an error [0, h_lost].

    Raises:
        UserError: one of the models has a head with more to it than a matrix.
    """

    model: nn.Module

    def __init__(self, sound: Teacher, lost: ModelTeacher, after: After) -> None:
        assert isinstance(sound, ModelTeacher), "the config refuses any other"
        self.sound, self.lost, self.after = sound, lost, after
        self.model = self.separate = sound.model
        self.context_length = min(sound.context_length, lost.context_length)
        for head in (sound.head, lost.head):
            if replace(head, tokens=None) != Head(weight=head.weight):
                raise UserError(
                    "data.train: lost is for models whose logits are a matrix of their hidden states alone; "
                    "one of the two has a bias, a scale or a softcap"
                )
        tokens = min(sound.head.vocabulary, lost.head.vocabulary)
        one, other = sound.head.weight[:tokens], lost.head.weight[:tokens]
        self._head = Head(weight=torch.cat([one, other.to(one)], dim=1))

    @property
    def head(self) -> Head:
        """See `Teacher.head`."""
        return self._head

    @torch.no_grad()
    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherHidden:
        """See `Teacher.scores`."""
        sound_NH, lost_NH = self.sound.hidden(batch), self.lost.hidden(batch)
        lost_N1 = self._lost(batch).to(sound_NH.device)[:, None]
        hidden = [sound_NH.masked_fill(lost_N1, 0), lost_NH.to(sound_NH.dtype).masked_fill(~lost_N1, 0)]
        return TeacherHidden(hidden=torch.cat(hidden, dim=1), head=self.head)

    def _lost(self, batch: Batch) -> Tensor:
        """Whether the context of each response token holds an error, [N]."""
        flags: list[bool] = []
        for t in batch.trajectories:
            start = len(t.teacher_context)
            at = self.after(t.teacher_context + t.response)
            flags += [at is not None and start + i > at for i in range(len(t.response))]
        return torch.tensor(flags, dtype=torch.bool)


class LostEngine(Engine):
    """Generates in the teacher's name: prefixes with an error are gone on from by the lost model."""

    def __init__(self, sound: Engine, lost: Engine, after: After) -> None:
        self.sound, self.lost, self.after, self.renderer = sound, lost, after, sound.renderer

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`. An error in what is being generated changes nothing: the writer knows
        no better than it writes."""
        names = [str(i) for i in range(len(prefixes))] if keys is None else list(keys)
        return by_teacher(
            self._whose(prefixes),
            lambda who, mine: self._of(who).continue_from(
                [prefixes[i] for i in mine], sampling, keys=[names[i] for i in mine]
            ),
        )

    def answer(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """See `Engine.answer`. What either model reads is half of what scores."""
        return by_teacher(
            self._whose(prefixes),
            lambda who, mine: self._of(who).answer(
                [prompts[i] for i in mine],
                [prefixes[i] for i in mine],
                sampling,
                keys=[keys[i] for i in mine],
                drafts=None if drafts is None else [drafts[i].unkept() for i in mine],
            ),
        )

    def _whose(self, prefixes: Sequence[Sequence[int]]) -> list[str | None]:
        return [None if self.after(prefix) is None else "lost" for prefix in prefixes]

    def _of(self, who: str | None) -> Engine:
        return self.sound if who is None else self.lost

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """Of the sound model: see `LostTeacher` for what a run learns from."""
        return self.sound.score(contexts, responses)
