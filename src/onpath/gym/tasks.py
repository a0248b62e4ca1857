"""Problems: a few definitions, computed modulo 100, in any order in which their operands are ready.

>>> p = parse_problem("a: 35 + 47; b: a * 3; c: 62 - a; d: b + c; d?")
>>> p.values()
{'a': 82, 'b': 46, 'c': 80, 'd': 26}
>>> solution(p, ["a", "c", "b", "d"])
'a: 35 + 47 = a82; c: 62 - a82 = c80; b: a82 * 3 = b46; d: b46 + c80 = d26; ans 26'
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property

from onpath.gym.rows import Row, distinct_rows, hashed_split
from onpath.gym.vocab import NAMES

MODULUS = 100
FACTORS = (2, 3, 4, 5)
SIZES = {
    "train": (3, 5), "validation": (3, 5), "test": (3, 5), "hard": (6, 7), "hard_validation": (6, 7)
}  # fmt: skip
"""Nodes of a split's problems. `hard_validation` is as hard as `hard`, for tuning: of the problems that are
train's by their meaning those that are too large for it."""
_DEFINITION = re.compile(r"([a-h]): ([a-h]|\d\d) ([-+*]) ([a-h]|\d\d|\d)")


@dataclass(frozen=True)
class Node:
    """One definition, `name: left op right`; an operand is a node's name or its digits."""

    name: str
    left: str
    op: str
    right: str

    @property
    def needs(self) -> frozenset[str]:
        """The nodes whose values this one uses."""
        return frozenset(operand for operand in (self.left, self.right) if operand in NAMES)


@dataclass(frozen=True)
class Problem:
    """Definitions, each after those it uses, and the node that is asked for."""

    nodes: tuple[Node, ...]
    target: str

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """The definition of each name."""
        return {node.name: node for node in self.nodes}

    @property
    def text(self) -> str:
        """The user's message."""
        return "".join(f"{n.name}: {n.left} {n.op} {n.right}; " for n in self.nodes) + f"{self.target}?"

    def values(self) -> dict[str, int]:
        """The true value of every node."""
        known: dict[str, int] = {}
        for node in self.nodes:
            left, right = (known[o] if o in NAMES else int(o) for o in (node.left, node.right))
            known[node.name] = compute(node.op, left, right)
        return known

    @property
    def answer(self) -> str:
        """The target's value, two digits."""
        return f"{self.values()[self.target]:02d}"

    def canonical(self) -> str:
        """The target as one expression: equal for two problems that differ in names and order only."""
        done: dict[str, str] = {}
        for n in self.nodes:
            operands = [done.get(o, o) for o in (n.left, n.right)]
            done[n.name] = f"({n.op.join(sorted(operands) if n.op == '+' else operands)})"
        return done[self.target]


def compute(op: str, left: int, right: int) -> int:
    """One operation modulo 100."""
    if op == "+":
        return (left + right) % MODULUS
    return (left - right) % MODULUS if op == "-" else left * right % MODULUS


def parse_problem(text: str) -> Problem | None:
    """The first problem in a text (a prompt may go on with a hint or an attempt); None if there is none."""
    end = re.search(r"([a-h])\?", text)
    if end is None:
        return None
    nodes: list[Node] = []
    seen: set[str] = set()
    for name, left, op, right in _DEFINITION.findall(text[: end.start()]):
        node = Node(name, left, op, right)
        if name in seen or not node.needs <= seen:
            return None
        seen.add(name)
        nodes.append(node)
    return Problem(tuple(nodes), end[1]) if end[1] in seen else None


def make_problem(rng: random.Random, size: int) -> Problem:
    """A random problem of `size` nodes, every one of which the target depends on."""
    names = rng.sample(NAMES, size)
    nodes: list[Node] = []
    loose: list[str] = []  # not yet used by another node; the last node must leave one
    for i, name in enumerate(names):
        rest = size - i - 1
        # How many loose nodes this one may use so that the rest can still join what remains.
        uses = [u for u in (0, 1, 2) if u <= len(loose) and len(loose) - u + 1 <= rest + 1]
        if rest == 0:
            uses = [u for u in uses if len(loose) == u]
        nodes.append(_make_node(rng, name, names[:i], rng.sample(loose, rng.choice(uses))))
        loose = [n for n in loose if n not in nodes[-1].needs] + [name]
    return Problem(tuple(nodes), names[-1])


def _make_node(rng: random.Random, name: str, before: list[str], used: list[str]) -> Node:
    if len(used) == 2:
        return Node(name, used[0], rng.choice("+-"), used[1])
    number = f"{rng.randrange(MODULUS):02d}"
    if not used:
        op = rng.choice("++--*")
        return Node(name, number, op, str(rng.choice(FACTORS)) if op == "*" else _number(rng))
    op = rng.choice("+-**")
    if op == "*":
        return Node(name, used[0], op, str(rng.choice(FACTORS)))
    other = rng.choice(before) if rng.random() < 0.25 else number
    pair = [used[0], other] if other != used[0] else [used[0], number]
    rng.shuffle(pair)
    return Node(name, pair[0], op, pair[1])


def _number(rng: random.Random) -> str:
    return f"{rng.randrange(MODULUS):02d}"


def split_of(problem: Problem) -> str:
    """The split a problem belongs to."""
    return hashed_split(problem.canonical(), len(problem.nodes), longest=SIZES["test"][1])


def belongs(problem: Problem, split: str) -> bool:
    """Whether a problem of a split's size may be in it: no problem is in two."""
    return split_of(problem) == ("train" if split == "hard_validation" else split)


def random_problem(rng: random.Random, split: str, sizes: tuple[int, int] | None = None) -> Problem:
    """A random problem of a split; `sizes` other than the split's own serve as drills for training."""
    low, high = sizes or SIZES[split]
    while True:
        problem = make_problem(rng, rng.randint(low, high))
        if belongs(problem, split):
            return problem


def ready(problem: Problem, done: set[str]) -> list[str]:
    """The nodes that can be computed next."""
    return [n.name for n in problem.nodes if n.name not in done and n.needs <= done]


def random_order(rng: random.Random, problem: Problem) -> list[str]:
    """A derivation's order: each time one of the ready nodes."""
    order: list[str] = []
    while len(order) < len(problem.nodes):
        order.append(rng.choice(ready(problem, set(order))))
    return order


def count_orders(problem: Problem, done: frozenset[str] = frozenset()) -> int:
    """How many orders are valid derivations."""
    if len(done) == len(problem.nodes):
        return 1
    return sum(count_orders(problem, done | {name}) for name in ready(problem, set(done)))


def solution(problem: Problem, order: list[str]) -> str:
    """The worked solution in one order, in the teacher's usual words."""
    values = {name: f"{value:02d}" for name, value in problem.values().items()}
    shown = {name: f"{name}{value}" for name, value in values.items()}
    steps = []
    for name in order:
        n = problem.by_name[name]
        left, right = shown.get(n.left, n.left), shown.get(n.right, n.right)
        steps.append(f"{name}: {left} {n.op} {right} = {shown[name]}; ")
    return "".join(steps) + f"ans {values[problem.target]}"


def rows(split: str, n: int, seed: int = 0) -> list[Row]:
    """`n` different problems of a split: the same for the same seed.

    Keys: id, prompt (the user's message), answer, solution (one reference derivation).

    >>> rows("test", 1) == rows("test", 2)[:1]
    True
    """
    if split not in SIZES:
        raise ValueError(f"the gym has the splits {', '.join(SIZES)}; not {split!r}")
    return distinct_rows(_row, split, n, seed, stream=f"{split}/{seed}")


def _row(rng: random.Random, split: str) -> tuple[str, Row]:
    problem = random_problem(rng, split)
    text = solution(problem, random_order(rng, problem))
    return problem.canonical(), {"prompt": problem.text, "answer": problem.answer, "solution": text}
