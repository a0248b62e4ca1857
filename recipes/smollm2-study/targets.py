"""What TOPD's targets consist of on this pair, before any training, as Markdown.

python recipes/smollm2-study/targets.py recipes/smollm2-study/topd.yaml --rollouts 32
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onpath import config
from onpath.commands.probes.base import sampled
from onpath.commands.probes.futures import labeller
from onpath.config.methods.topd import TOPDOptions
from onpath.methods.topd.method import TOPD
from onpath.records import Rollout
from onpath.run.assemble import assemble
from onpath.run.parts import Parts
from onpath.system import code

EPSILONS = (0.05, 0.02, 0.005)
"""Of Sinkhorn's transport; 0.05 is TOPD's default."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One guided token. Shares are of its target's mass."""

    label: str
    """What the rollout's own token is, by the checker."""
    own: float
    """On the rollout's own token."""
    teacher: float
    """On the teacher's likeliest token in the rollout's context, where that is another one."""
    agreed: bool
    """Whether it is the own one."""
    bag: float
    """Entropy, as a share of that of a uniform bag of the windows' different tokens."""


def targets(parts: Parts, rollouts: Sequence[Rollout], epsilon: float) -> Iterator[Target]:
    """Of all forks that the method finds."""
    options: Any = parts.config.method.model_copy(update={"epsilon": epsilon})
    assert isinstance(options, TOPDOptions), "method.name: topd"
    method, label_of = TOPD(options, parts.method.tools), labeller(parts)
    assert label_of is not None, "the task has no truth of tokens"
    for row, t in enumerate(method.prepare(rollouts, step=0).trajectories):
        labels = label_of(rollouts[row])
        windows = {f["position"]: {*f["teacher_window"]} for f in t.edit.detail.get("forks", ())}
        for g in t.guidance:
            for at, target in enumerate(g.targets, start=g.start):
                mass, own, likeliest = sum(target.values()), t.response[at], method.likeliest[row][at]
                over = [w for start, w in windows.items() if start <= at < start + options.window]
                kinds = len(set().union(*over))
                entropy = -sum(p / mass * math.log(p / mass) for p in target.values() if p > 0)
                yield Target(
                    label=labels[at],
                    own=target.get(own, 0.0) / mass,
                    teacher=0.0 if likeliest == own else target.get(likeliest, 0.0) / mass,
                    agreed=likeliest == own,
                    bag=entropy / math.log(kinds) if kinds > 1 else 0.0,
                )


def table(found: dict[float, list[Target]]) -> Iterator[str]:
    yield "| ε | guided tokens | own token | teacher's other one | others | entropy ÷ uniform bag |"
    yield "|---|---|---|---|---|---|"
    for epsilon, every in found.items():
        groups = {"all": every, "errors": [t for t in every if t.label == "error"]}
        groups["where the two differ"] = [t for t in every if not t.agreed]
        for name, mine in groups.items():
            own, teacher, bag = (
                sum(getattr(t, k) for t in mine) / max(1, len(mine)) for k in ("own", "teacher", "bag")
            )
            shares = f"{own:.0%} | {teacher:.0%} | {1 - own - teacher:.0%} | {bag:.2f}"
            yield f"| {epsilon:g} | {name}, {len(mine)} | {shares if mine else '– | – | – | –'} |"


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("config")
    asked.add_argument("--rollouts", type=int, default=32)
    given = asked.parse_args()
    with code.allowed():  # the task is a file beside this one
        parts = assemble(config.load(given.config))
        rollouts = sampled(parts, given.rollouts)
        print("\n".join(table({e: list(targets(parts, rollouts, e)) for e in EPSILONS})))


if __name__ == "__main__":
    main()
