"""Places in rollouts that methods look for: where futures part, windows of a statistic, a place by lot."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from onpath.config.methods.topd import TOPDOptions
from onpath.engines.forward import Kept
from onpath.methods.base import own_response
from onpath.methods.tools import Tools
from onpath.methods.topd import decide
from onpath.methods.topd.method import TOPD
from onpath.records import Rollout
from onpath.system.draws import noise


@dataclass(frozen=True, kw_only=True)
class FirstFork:
    """What TOPD finds first in one rollout."""

    position: int | None
    """Index into the response; None: its near futures part nowhere."""
    teacher_window: tuple[int, ...] = ()
    """What the teacher writes from there."""
    teacher_tokens: int = 0
    """That the teacher generated to find it."""


def first_forks(
    rollouts: Sequence[Rollout],
    tools: Tools,
    *,
    window: int,
    distance: float,
    starts: Sequence[int] | None = None,
    keep: Kept | None = None,
    step: int = 0,
) -> list[FirstFork]:
    """TOPD's first real divergent point of each rollout: the futures part by at least `distance`.

    Args:
        window: K, tokens of each future.
        starts: what stands before these positions is settled, and no candidate; None: nothing is.
        keep: receives what the loss can use again.
    """
    topd = TOPD(TOPDOptions(window=window, decide="threshold", threshold=distance), tools)
    own = [own_response(r) for r in rollouts]
    found = topd.forks(rollouts, own, Kept() if keep is None else keep, step, starts)
    firsts = []
    for row in range(len(rollouts)):
        mine = [f for f in found if f.row == row]
        first = next((f for f in mine if f.decision == "fork"), None)
        firsts.append(
            FirstFork(
                position=None if first is None else first.position,
                teacher_window=() if first is None else first.teacher,
                teacher_tokens=sum(f.generated[1] for f in mine),
            )
        )
    return firsts


def window_means(values: Sequence[float], size: int) -> list[float]:
    """Means of consecutive windows; the last one may be shorter.

    >>> window_means([1.0, 3.0, 5.0], 2)
    [2.0, 5.0]
    """
    parts = [values[at : at + size] for at in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def first_run(means: Sequence[float], *, below: float, count: int) -> int | None:
    """Where `count` values in a row first lie below a threshold.

    >>> first_run([0.9, 0.1, 0.8, 0.2, 0.1], below=0.5, count=2)
    3
    """
    runs = (at for at in range(len(means) - count + 1) if max(means[at : at + count]) < below)
    return next(runs, None)


def moved(threshold: Tensor, values: Sequence[float], *, level: float, decay: float) -> float:
    """A moving quantile, in place: towards that of the step's values over all processes, each of which must
    call."""
    decide.follow(threshold, decide.shared_quantile(values, level), decay=decay)
    return float(threshold)


def by_lot(seed: int, key: str, size: int) -> int:
    """A place in 0 … size − 1, a pure function of seed and key.

    >>> 0 <= by_lot(0, "step 3/p/0", 5) < 5
    True
    """
    return int(noise(seed, key, 1)[0] * size)
