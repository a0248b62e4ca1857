"""What all probes look at."""

from onpath.data.load import prompts_of_step
from onpath.records import Rollout
from onpath.run.parts import Parts
from onpath.system.errors import UserError


def checked(**numbers: int | None) -> None:
    """Options that count something.

    Raises:
        UserError: one is below 1.
    """
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")


def sampled(parts: Parts, count: int, *, answered: bool = False) -> list[Rollout]:
    """Rollouts of up to `count` training prompts, as the run samples them: in the world of its data.

    Args:
        answered: the prompts need answers.

    Raises:
        UserError: one has none.
    """
    pool = parts.prompts.pool
    prompts = prompts_of_step(pool, size=min(count, len(pool)), seed=parts.config.run.seed, step=0)
    unanswered = [p.id for p in prompts if p.answer is None]
    if answered and unanswered:
        raise UserError(f"prompt {unanswered[0]!r} has no answer, so its continuations cannot be graded")
    return parts.sampler.generate(prompts, parts.sampling, keys=[f"probe/{p.id}" for p in prompts])
