"""The rollouts of a step: the same whatever the number of processes, however they are dealt to them."""

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from numbers import Real

from onpath.config.sections import OF_A_STEP
from onpath.data.load import prompts_of_step
from onpath.engines.overlap import fresh
from onpath.methods.base import Prepared
from onpath.records import Rollout
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.errors import UserError


def sample(parts: Parts, step: int) -> list[Rollout]:
    """This process's rollouts of one step: the student's own samples (rollout.overlap: of one step ago;
    rollout.refresh: of the weights that the rule says)."""

    def draw(step: int) -> list[Rollout]:
        size, n = parts.config.rollout.prompts, parts.config.rollout.n
        prompts = prompts_of_step(parts.prompts.pool, size=size, seed=parts.config.run.seed, step=step)
        # A step over the end of an epoch may hold a prompt twice: its samples are numbered through.
        seen = Counter[str]()
        before = [seen.update([p.id]) or seen[p.id] - 1 for p in prompts]
        mine = distributed.share(list(enumerate(prompts)))
        keys = [f"step {step}/{place}" for place, _ in mine]
        rollouts = parts.sampler.generate(
            [p for _, p in mine], parts.sampling, n=n, keys=keys, **scored_early(parts)
        )
        if not any(before):
            return rollouts
        firsts = [n * before[place] for place, _ in mine for _ in range(n)]
        return [replace(r, sample=first + r.sample) for first, r in zip(firsts, rollouts, strict=True)]

    if parts.refreshed is not None:
        rollouts = parts.refreshed.rollouts(step)
    else:
        rollouts = draw(step) if parts.overlap is None else parts.overlap(step, draw)
    if parts.config.parallel.balance:
        together = (lambda r: r.prompt.id) if parts.method.compares_samples else None
        rollouts = distributed.dealt(rollouts, lambda r: len(r.context) + len(r.ids), together=together)
    rollouts = [replace(r, place=place) for place, r in enumerate(rollouts)]
    return fresh(parts.config, rollouts, step)


def scored_early(parts: Parts) -> dict[str, Callable[[Rollout], None]]:
    """What the sampler is told, if anything: that the teacher may score a rollout while others are written.
    Not where a rollout may yet be left out, or go to another process."""
    config = parts.config
    moves = config.parallel.balance and distributed.world() > 1
    left_out = any(r.at_least is not None for r in config.rewards.values())
    if moves or left_out or not parts.sampler.shows_early:
        return {}

    def finished(rollout: Rollout) -> None:
        if (trajectory := parts.method.scored_first(rollout)) is not None:
            parts.models.teacher.expect([trajectory])

    return {"finished": finished}


def prepare(parts: Parts, rollouts: list[Rollout], step: int) -> Prepared:
    """What the method makes of them, or made of them when they were sampled (rollout.refresh)."""
    if parts.refreshed is not None:
        made = parts.refreshed.prepared(rollouts, step)
    else:
        made = parts.method.prepare(rollouts, step=step)
    check_names(made, parts.config.rewards, of=parts.config.method.name)
    check_tokens(
        made,
        of=parts.config.method.name,
        vocabulary=parts.models.vocabulary,
        sampled=parts.objective.kind == "sampled",
    )
    return made


def check_names(prepared: Prepared, rewards: Collection[str], *, of: str) -> None:
    """Of the numbers of a method none may stand in the place of another one in the step's line.

    Raises:
        UserError: one would.
    """
    totals = prepared.totals.keys() - {"student_tokens_generated"}  # which is added to the rollouts' own
    labels = {*rewards, "reward"} if rewards else set()
    taken = dict.fromkeys(OF_A_STEP, "a step's line has") | dict.fromkeys(labels, "the rewards have")
    for part, names in (("metrics", prepared.metrics), ("means", prepared.means), ("totals", totals)):
        for name in names:
            if name in taken:
                raise UserError(
                    f"method.name {of}: Prepared.{part} has {name}, and {taken[name]} one already; give it "
                    "another name"
                )
        taken |= dict.fromkeys(names, f"Prepared.{part} has")


def check_tokens(prepared: Prepared, *, of: str, vocabulary: int, sampled: bool) -> None:
    """What a method gives for each token: ids that both models know, numbers that are numbers, and no
    advantages that nothing reads.

    Args:
        vocabulary: number of ids that the models share.
        sampled: whether the divergence is that of the sampled token.

    Raises:
        UserError: one is not so.
    """
    for place, t in enumerate(prepared.trajectories):
        if not t.edit.kept:
            continue
        where = f"method.name {of}: trajectory {place} has"
        for part, given in (("weights", t.weights), ("advantages", t.advantages)):
            for x in given or ():
                if not isinstance(x, Real):
                    raise UserError(f"{where} {part} that are no plain numbers but {type(x).__name__}")
                if not math.isfinite(x):
                    raise UserError(f"{where} {part} that are not finite ({x})")
        drawn = zip(t.written_by, t.token_weights, strict=True)
        if sampled and t.advantages is None and any(who != "student" and w for who, w in drawn):
            raise UserError(
                f"{where} tokens that others wrote, and method.divergence: sampled takes every one for the "
                "student's own; give those weight 0, or use reverse_kl"
            )
        if t.advantages is not None and not sampled:
            raise UserError(f"{where} advantages, which method.divergence: sampled alone reads")
        if t.response and not 0 <= min(t.response) <= max(t.response) < vocabulary:
            raise UserError(
                f"{where} a response with ids that are not within the {vocabulary} of both models"
            )
