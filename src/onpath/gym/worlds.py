"""Worlds: what makes a trajectory worth correcting, each with a strength from 0 to 1 (`gym:train?spoil=0.8`).

    late    on that share of the problems the first steps hold nothing to learn: operands that are numbers
            are such that the student masters them, so its errors are in steps that need an earlier result
    spoil   in that share of the training rollouts the last digit of the first result is replaced from
            outside, and the student goes on: an early error that no training removes
    again   on that share of the problems the student errs so again, whenever it writes that result itself in
            training: a second draw is no repair, a token of the teacher's is
    lost    on that share of the problems the teacher is, behind the first error, the untouched student
    surface of the student's habits, how much is left (1: all; see surface.py)

All at 0 (surface at 1) the gym is as it always was. A problem that a strength has chosen is also chosen by
every higher one, and which are chosen depends on (seed, problem) alone.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onpath.gym.check import label_tokens
from onpath.gym.demos import Beliefs
from onpath.gym.language import SOL
from onpath.gym.tasks import Node, Problem, belongs, compute, parse_problem, random_order, solution
from onpath.gym.tasks import rows as plain_rows
from onpath.gym.vocab import DIGITS, EQUALS

_SURELY = 10.0
"""Scale at which the student acts on every misbelief that it has."""


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """The strengths (`onpath.data.tasks.World`).

    >>> Worlds(spoil=1.0).spoils, Worlds().spoils
    (True, False)
    """

    late: float = 0.0
    spoil: float = 0.0
    again: float = 0.0
    lost: float = 0.0
    surface: float = 1.0

    @property
    def spoils(self) -> bool:
        """See `World.spoils`."""
        return self.spoil > 0

    @property
    def repeats(self) -> bool:
        """See `World.repeats`."""
        return self.spoil > 0 and self.again > 0

    @property
    def loses(self) -> bool:
        """See `World.loses`."""
        return self.lost > 0

    def rows(self, split: str, count: int) -> list[dict[str, str]]:
        """The gym's rows, of which a share `late` has easy first steps; ids are those of the plain rows."""
        found = plain_rows(split, count)
        return [self._late(row, split) if _chosen(self.late, "late", row["id"]) else row for row in found]

    @staticmethod
    def _late(row: Mapping[str, str], split: str) -> dict[str, str]:
        rng = random.Random(f"late/{row['prompt']}")
        plain = parse_problem(row["prompt"])
        assert plain is not None, "the gym's own rows"
        problem = with_easy_starts(rng, plain)
        while not belongs(problem, split):
            problem = with_easy_starts(rng, plain)
        text = solution(problem, random_order(rng, problem))
        return {"id": row["id"], "prompt": problem.text, "answer": problem.answer, "solution": text}

    def spoiled(self, seed: int, problem: str, tokens: Sequence[str]) -> tuple[int, str] | None:
        """See `World.spoiled`: the first result's last digit, if the step is sound as the student wrote
        it."""
        asked = parse_problem(problem)
        at = first_result(tokens)
        if asked is None or at is None or not _chosen(self.spoil, "spoil", seed, asked.text):
            return None
        if any(label.kind == "error" for label in label_tokens(problem, tokens[: at + 1])):
            return None
        others = [d for d in DIGITS if d != tokens[at]]
        return at, random.Random(f"digit/{seed}/{asked.text}").choice(others)

    def spoiled_again(self, seed: int, tokens: Sequence[str], begin: int) -> tuple[int, str] | None:
        """See `World.spoiled_again`."""
        start = _response_of(tokens)
        asked = parse_problem("".join(tokens[:start]))
        if asked is None or not _chosen(self.again, "again", seed, asked.text):
            return None
        found = self.spoiled(seed, asked.text, tokens[start:])
        return (start + found[0], found[1]) if found and start + found[0] >= begin else None

    def lost_after(self, seed: int, tokens: Sequence[str]) -> int | None:
        """See `World.lost_after`: at the first wrong token itself the teacher still knows better."""
        start = _response_of(tokens)
        asked = parse_problem("".join(tokens[:start]))
        if asked is None or not _chosen(self.lost, "lost", seed, asked.text):
            return None
        labels = label_tokens(asked.text, tokens[start:])
        return next((start + i for i, label in enumerate(labels) if label.kind == "error"), None)


def _response_of(tokens: Sequence[str]) -> int:
    """Where it begins."""
    return max((i for i, t in enumerate(tokens) if t == SOL), default=len(tokens)) + 1


def first_result(tokens: Sequence[str]) -> int | None:
    """The place of the first result's last digit."""
    at = next((i + 3 for i, t in enumerate(tokens) if t in EQUALS), len(tokens))
    return at if at < len(tokens) and tokens[at] in DIGITS else None


def with_easy_starts(rng: random.Random, problem: Problem) -> Problem:
    """The problem with other numbers in the definitions that use numbers alone: those of which the student
    misbelieves nothing."""
    return replace(problem, nodes=tuple(n if n.needs else _mastered(rng, n) for n in problem.nodes))


def _mastered(rng: random.Random, node: Node) -> Node:
    beliefs = Beliefs()
    while True:
        left = rng.randrange(100)
        right = int(node.right) if node.op == "*" else rng.randrange(100)
        if beliefs.result(rng, node, left, right, _SURELY) == f"{compute(node.op, left, right):02d}":
            return replace(node, left=f"{left:02d}", right=str(right) if node.op == "*" else f"{right:02d}")


def _chosen(strength: float, *what: object) -> bool:
    return random.Random("/".join(map(str, what))).random() < strength
