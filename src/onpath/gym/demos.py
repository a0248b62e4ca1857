"""Demonstrations: how teacher and student write solutions, and what the student misbelieves.

A demonstration is a list of pieces (token, trained): what nobody should learn to write (another writer's
style, an injected error) carries no loss.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from onpath.gym.language import EOS
from onpath.gym.tasks import MODULUS, Node, Problem, compute, ready
from onpath.gym.vocab import ANSWER, EQUALS, NAMES, ONSET_WORDS, SEPARATORS, tokenize

Pieces = list[tuple[str, bool]]

TEACHER_SLIP = {"+": 0.02, "-": 0.0, "*": 0.002}
"""How often the teacher writes a surface form of the student's. Unequal, so that habits are as many-valued in
loss as errors are: with 0.002 everywhere, 5% of the loudest 2.25% of tokens were habits."""
EVEN_SLIP = dict.fromkeys(TEACHER_SLIP, 0.002)
"""Of the teacher's first stage."""
# The student's habits depend on the operation, so that they are as many-valued as its errors are.
STUDENT_ARROW = {"+": 0.6, "-": 0.95, "*": 0.8}
STUDENT_SEPARATOR = {"+": (0.2, 0.75, 0.05), "-": (0.05, 0.1, 0.85), "*": (0.3, 0.6, 0.1)}
CONFIDENCE = (0.3, 0.5, 0.75, 0.9)
"""How likely a student is to act on one of its wrong beliefs: one of these."""


@dataclass
class Beliefs:
    """What the student misbelieves: facts of one digit each, in a context, each with its own probability.

    Four kinds: a carry forgotten, a borrow forgotten, a wrong table entry, and a result left unreduced
    (`134` for `34`: visible, since every other number has two digits).
    """

    seed: int = 7
    share: float = 0.34
    """Of the facts that are misbelieved at all."""
    _table: dict[tuple[object, ...], float] = field(default_factory=dict)

    def strength(self, *fact: object) -> float:
        """How likely the student is to act on a wrong belief about this fact; 0 for most."""
        if fact not in self._table:
            rng = random.Random(f"{self.seed}/{fact}")
            self._table[fact] = rng.choice(CONFIDENCE) if rng.random() < self.share else 0.0
        return self._table[fact]

    def result(self, rng: random.Random, node: Node, left: int, right: int, scale: float = 1.0) -> str:
        """What the student writes as the result of a step on these operands."""
        op, named = node.op, node.left in NAMES
        value = compute(op, left, right)
        plain = left + right if op == "+" else left * right
        units = (left % 10, right % 10)
        if op != "-" and plain >= MODULUS:
            high = ("over", op, left // 10, right // 10 if op == "+" else right, named)
            if rng.random() < 0.6 * scale * self.strength(*high):
                return str(plain)
        carries = sum(units) >= 10 if op == "+" else units[0] < units[1] if op == "-" else True
        if carries and rng.random() < 0.75 * scale * self.strength("carry", op, *units, named):
            value = (value + (10 if op == "-" else -10)) % MODULUS
        if rng.random() < 0.3 * scale * self.strength("units", op, *units, named):
            shift = random.Random(f"{self.seed}/{op}/{units}").choice((-2, -1, 1, 2))
            value = value // 10 * 10 + (value + shift) % 10
        return f"{value:02d}"


@dataclass(frozen=True)
class Writer:
    """A way to write solutions."""

    student_style: bool = False
    beliefs: Beliefs | None = None
    scale: float = 1.0
    """Of the beliefs' strengths."""
    foreign: bool = False
    """Style and errors are another writer's: they carry no loss."""
    notice: float = 0.0
    """Probability of going back after a visible error."""
    noise: float = 0.0
    """Probability of a random result."""
    slips: Mapping[str, float] = field(default_factory=lambda: TEACHER_SLIP)
    """By operation, in the teacher's style."""

    def write(self, rng: random.Random, problem: Problem, order: list[str]) -> Pieces:
        """One worked solution with its answer and the end token."""
        pieces: Pieces = []
        written: dict[str, str] = {}
        for name in order:
            node = problem.by_name[name]
            result = self._step(rng, node, written, pieces, honest=False)
            if len(result) > 2 and rng.random() < self.notice:
                pieces.append((ONSET_WORDS[0], True))
                self._step(rng, node, written, pieces, honest=True)
        return [*pieces, (ANSWER, True), *((d, True) for d in written[problem.target]), (EOS, True)]

    def _step(
        self, rng: random.Random, node: Node, written: dict[str, str], pieces: Pieces, *, honest: bool
    ) -> str:
        pieces.append((f"{node.name}: ", True))
        for operand, after in ((node.left, f" {node.op} "), (node.right, "")):
            digits = operand + written[operand] if operand in NAMES else operand
            pieces.extend((t, True) for t in [*digits, *([after] if after else [])])
        pieces.append((self._equals(rng, node.op), not self.foreign))
        left, right = (int(written.get(o, o)) for o in (node.left, node.right))
        truth = f"{compute(node.op, left, right):02d}"
        result = truth if honest else self._result(rng, node, left, right)
        pieces.append((node.name, True))
        pieces.extend((d, result == truth or not self.foreign) for d in result)
        pieces.append((self._separator(rng, node.op), not self.foreign))
        # Reading a number takes its first two digits: an unreduced result leads on to wrong values.
        written[node.name] = result[:2]
        return result

    def _result(self, rng: random.Random, node: Node, left: int, right: int) -> str:
        if self.noise and rng.random() < self.noise:
            wrong = rng.randrange(MODULUS) if rng.random() < 0.6 else rng.randrange(MODULUS, 400)
            return f"{wrong:02d}"
        if self.beliefs is None:
            return f"{compute(node.op, left, right):02d}"
        return self.beliefs.result(rng, node, left, right, self.scale)

    def _equals(self, rng: random.Random, op: str) -> str:
        arrow = STUDENT_ARROW[op] if self.student_style else self.slips[op]
        return EQUALS[rng.random() < arrow]

    def _separator(self, rng: random.Random, op: str) -> str:
        slip = self.slips[op] / 2
        slips = (1 - 2 * slip, slip, slip)
        return rng.choices(SEPARATORS, STUDENT_SEPARATOR[op] if self.student_style else slips)[0]


def text_of(pieces: Pieces) -> str:
    """The text of a demonstration, without the end token."""
    return "".join(token for token, _ in pieces if token != EOS)


def corrupt(rng: random.Random, attempt: str, other: str) -> str:
    """Damage an attempt as no student would: character noise, steps lost or doubled, cut off, another's."""
    kind = rng.randrange(5)
    if kind == 0:
        return other
    tokens = tokenize(attempt)
    if kind == 1:
        rate = rng.choice((0.03, 0.1, 0.3))
        return "".join(rng.choice("0123456789abcdefgh") if rng.random() < rate else t for t in tokens)
    if kind == 2:
        return "".join(tokens[: rng.randrange(len(tokens) + 1)])
    starts = [i for i, token in enumerate(tokens) if token.endswith(": ")] + [len(tokens)]
    if len(starts) < 3:
        return attempt
    cut = rng.randrange(len(starts) - 1)
    head, step, tail = tokens[: starts[cut]], tokens[starts[cut] : starts[cut + 1]], tokens[starts[cut + 1] :]
    return "".join(head + (step + step if kind == 3 else []) + tail)


def order_like(rng: random.Random, problem: Problem, attempt: str) -> list[str]:
    """The attempt's order of steps as far as it is valid, then any."""
    wanted = [t[0] for t in tokenize(attempt) if t.endswith(": ")]
    order: list[str] = []
    while len(order) < len(problem.nodes):
        able = ready(problem, set(order))
        order.append(next((name for name in wanted if name in able), None) or rng.choice(able))
    return order
