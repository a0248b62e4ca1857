"""The rollouts of a step: the same whatever the number of processes, however they are dealt to them."""

from dataclasses import replace

from onpath.data.load import prompts_of_step
from onpath.engines.overlap import fresh
from onpath.records import Rollout
from onpath.run.parts import Parts
from onpath.system import distributed


def generate_ahead(parts: Parts) -> None:
    """Methods that ask for it: the starting weights generate everything that the run will train on, before a
    checkpoint replaces them."""
    if parts.replay is not None:
        for step in range(parts.config.optim.steps):
            parts.method.prepare(sample(parts, step), step=step)
            parts.replay.share()  # a later epoch may deal this prompt to another process
        parts.replay.sealed = True


def sample(parts: Parts, step: int) -> list[Rollout]:
    """This process's rollouts of one step: the student's own samples (rollout.overlap: of one step ago)."""

    def draw(step: int) -> list[Rollout]:
        size, n = parts.config.rollout.prompts, parts.config.rollout.n
        prompts = prompts_of_step(parts.prompts.pool, size=size, seed=parts.config.run.seed, step=step)
        mine = distributed.share(list(enumerate(prompts)))
        keys = [f"step {step}/{place}" for place, _ in mine]
        return parts.sampler.generate([p for _, p in mine], parts.sampling, n=n, keys=keys)

    rollouts = draw(step) if parts.overlap is None else parts.overlap(step, draw)
    if parts.config.parallel.balance:
        rollouts = distributed.dealt(rollouts, lambda r: len(r.context) + len(r.ids))
        rollouts = [replace(r, place=place) for place, r in enumerate(rollouts)]
    return fresh(parts.config, rollouts, step)
