"""What all probes share: the rollouts that they look at, and the files that they leave."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from onpath.data.load import prompts_of_step
from onpath.records import Rollout
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import write_text


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


def store(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any],
    draw: Callable[[Path], None] | None = None,
) -> Path:
    """JSON lines, the summary (.json) and the picture (.png) beside each other. Of several processes all have
    measured the same, and the first writes it.

    Returns:
        The path of the JSON lines, again.
    """
    if distributed.rank() == 0:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        write_text(path.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")
        if draw is not None:
            draw(path.with_suffix(".png"))
    return path
