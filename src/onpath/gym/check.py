"""The gym's truth: is an answer right, where is the first wrong step, and what is every token of a response.

Nothing here raises on any text: what cannot be read is an error of the response.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from onpath.gym.language import EOS
from onpath.gym.tasks import Node, Problem, compute, parse_problem, ready
from onpath.gym.vocab import ANSWER, DIGITS, EQUALS, HEADS, NAMES, ONSET_WORDS, OPS, SEPARATORS, tokenize

Kind = Literal["error", "consequence", "right", "habit", "choice", "copied"]
NOT_READY, ARITHMETIC, OTHER = ERROR_KINDS = ("not ready", "arithmetic", "other")
"""Of first errors: a step whose operands have not been computed; a wrong result; anything else."""
_ANSWER = re.compile(r"ans (\d+)")


@dataclass(frozen=True)
class TokenLabel:
    """What one token of a response is.

    - `error`: the first wrong token of a wrong result, a wrong copy, a step that cannot be taken, garbage;
    - `consequence`: not what the truth has there, because of an earlier error (also a wrong number's rest);
    - `right`: a digit of a computed result, as the truth has it;
    - `habit`: a surface form that means nothing (separator, equals sign), whichever variant it is;
    - `choice`: the name of the next step where several steps were ready;
    - `copied`: everything else (restated names and operands, forced steps, the answer, the end).
    """

    kind: Kind
    visible: bool | None = None
    """Of an error: it is malformed (a result not of two digits, a step that cannot be taken, garbage).
    A wrong result or a wrong copy in range is invisible to whoever does not compute it again."""
    recovery: bool = False
    """Belongs to a way back: the onset (`wait `) or the step that is done again after it."""


def grade(text: str, answer: str) -> bool:
    """Whether the last stated answer of a response is the right one, two digits exactly."""
    found = _ANSWER.findall(text)
    return bool(found) and found[-1] == answer


def first_error_token(prompt: str, tokens: Sequence[str]) -> int | None:
    """Index of the first wrong token; None if there is none."""
    return next((i for i, t in enumerate(label_tokens(prompt, tokens)) if t.kind == "error"), None)


def first_error(prompt: str, response: str) -> int | None:
    """Character offset at which the first wrong step starts; all before it is sound. None: no error."""
    tokens = tokenize(response)
    wrong = first_error_token(prompt, tokens)
    if wrong is None:
        return None
    opens = (*HEADS, ANSWER)
    start = next((i for i in range(wrong, -1, -1) if tokens[i] in opens), wrong)
    return len("".join(tokens[:start]))


def error_kind(prompt: str, tokens: Sequence[str]) -> str | None:
    """Which of `ERROR_KINDS` the first error of a response is; None: there is none.

    >>> prompt = "a: 35 + 47; b: a * 3; b?"
    >>> error_kind(prompt, ["b: "]), error_kind(prompt, tokenize("a: 35 + 47 = a72"))
    ('not ready', 'arithmetic')
    """
    problem, at = parse_problem(prompt), first_error_token(prompt, tokens)
    if at is None:
        return None
    if problem is not None and tokens[at] in HEADS and tokens[at][0] in problem.by_name:
        return NOT_READY
    steps = [i for i in range(at, -1, -1) if tokens[i] in HEADS or tokens[i] in EQUALS]
    return ARITHMETIC if tokens[at] in DIGITS and steps and tokens[steps[0]] in EQUALS else OTHER


def skills(prompt: str, tokens: Sequence[str]) -> list[str]:
    """What each token takes: of a result's digits the operation, and whether its first operand is a number or
    an earlier result, since the student misbelieves other facts of these; elsewhere nothing.

    >>> skills("a: 35 + 47; b: a * 3; b?", tokenize("b: a82 * 3 = b46"))[-2:]
    ['result * number', 'result * number']
    """
    found, written, named, op = [], False, False, ""
    for i, token in enumerate(tokens):
        if token in HEADS:
            written, named, op = False, i + 1 < len(tokens) and tokens[i + 1] in NAMES, ""
        elif token in OPS:
            op = token
        written |= token in EQUALS
        kind = f"{'result' if named else 'number'}{op}number"
        found.append(kind if written and token in DIGITS else "")
        if token in SEPARATORS or token == ANSWER:
            written = False
    return found


def label_tokens(prompt: str, tokens: Sequence[str]) -> list[TokenLabel]:
    """One label per token string of a response (the end token included, if it is there)."""
    problem = parse_problem(prompt)
    if problem is None:
        return _garbage(list(tokens))
    reader = _Reader(problem)
    cuts = [i for i, t in enumerate(tokens) if t in HEADS or t == ANSWER or t in ONSET_WORDS]
    bounds = [0, *[c for c in cuts if c > 0], len(tokens)]
    labels: list[TokenLabel] = []
    for start, end in pairwise(bounds):
        labels += reader.read(list(tokens[start:end]))
    return labels


class _Reader:
    """Reads a response segment by segment: a step, an answer, an onset."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.truth = {name: f"{value:02d}" for name, value in problem.values().items()}
        self.written: dict[str, str] = {}
        self.redoing = False

    def read(self, tokens: list[str]) -> list[TokenLabel]:
        """Labels of one segment."""
        if not tokens:
            return []
        if tokens[0] in HEADS:
            labels = self._step(tokens)
            if self.redoing:
                labels = [replace(label, recovery=True) for label in labels]
            self.redoing = False
            return labels
        if tokens[0] == ANSWER:
            return self._answer(tokens)
        if tokens[0] in ONSET_WORDS and self.written:
            self.redoing = True
            return [TokenLabel("copied", recovery=True), *_garbage(tokens[1:])]
        return _garbage(tokens)

    def _step(self, tokens: list[str]) -> list[TokenLabel]:
        name = tokens[0][0]
        able = ready(self.problem, set(self.written))
        node = self.problem.by_name.get(name)
        repeated = node is not None and name in self.written and self._operands_written(node)
        if node is None or not (name in able or repeated):
            # The step cannot be taken; what it claims as a result is still what later steps build on.
            self._remember(name, tokens)
            return _garbage(tokens)
        head: Kind = "choice" if len(able) > 1 and not self.redoing else "copied"
        labels = [TokenLabel("error", visible=True) if repeated and not self.redoing else TokenLabel(head)]
        consistent, true = self._body(node, self.written), self._body(node, self.truth)
        at = 1
        for expected, right in zip(consistent, true, strict=True):
            if at >= len(tokens):
                break
            labels.append(self._copied(tokens[at], expected, right))
            at += 1
        labels += self._result(node, tokens[at:])
        self._remember(name, tokens)
        return labels

    def _operands_written(self, node: Node) -> bool:
        return all(o in self.written for o in (node.left, node.right) if o in NAMES)

    def _body(self, node: Node, values: dict[str, str]) -> list[str]:
        """The tokens between the head and the equals sign."""
        left, right = (o + values[o] if o in NAMES else o for o in (node.left, node.right))
        return [*left, f" {node.op} ", *right]

    @staticmethod
    def _copied(token: str, expected: str, right: str) -> TokenLabel:
        if token == right:
            return TokenLabel("copied")
        return (
            TokenLabel("consequence")
            if token == expected
            else TokenLabel("error", visible=token not in DIGITS)
        )

    def _result(self, node: Node, tokens: list[str]) -> list[TokenLabel]:
        """Equals sign, name, digits, separator."""
        labels: list[TokenLabel] = []
        if not tokens or tokens[0] not in EQUALS:
            return _garbage(tokens)
        labels.append(TokenLabel("habit"))
        if len(tokens) > 1:
            same = tokens[1] == node.name
            labels.append(TokenLabel("copied") if same else TokenLabel("error", visible=True))
        digits = _digits(tokens[2:])
        left, right = (int(self.written.get(o, o)) for o in (node.left, node.right))
        expected = f"{compute(node.op, left, right):02d}"
        labels += _number(digits, expected, self.truth[node.name], "right")
        rest = tokens[2 + len(digits) :]
        if rest and len(digits) == 1:
            return labels + _garbage(rest)
        if rest and rest[0] in SEPARATORS:
            return [*labels, TokenLabel("habit"), *_garbage(rest[1:])]
        return labels + _garbage(rest)

    def _answer(self, tokens: list[str]) -> list[TokenLabel]:
        target = self.problem.target
        if target not in self.written:
            return _garbage(tokens)
        digits = _digits(tokens[1:])
        labels = [TokenLabel("copied"), *_number(digits, self.written[target], self.truth[target], "copied")]
        rest = tokens[1 + len(digits) :]
        if rest == [EOS] and len(digits) > 1:
            return [*labels, TokenLabel("copied")]
        return labels + _garbage(rest)

    def _remember(self, name: str, tokens: list[str]) -> None:
        """The value that later steps see: the first two digits after the equals sign."""
        at = next((i for i, t in enumerate(tokens) if t in EQUALS), len(tokens))
        digits = _digits(tokens[at + 2 :])
        if len(digits) >= 2 and name in self.truth:
            self.written[name] = "".join(digits[:2])


def _digits(tokens: list[str]) -> list[str]:
    end = next((i for i, t in enumerate(tokens) if t not in DIGITS), len(tokens))
    return tokens[:end]


def _number(digits: list[str], expected: str, truth: str, right: Kind) -> list[TokenLabel]:
    """Labels of a written number that should be `expected` (given what was written before) or `truth`."""
    labels: list[TokenLabel] = []
    wrong = False
    for i, digit in enumerate(digits):
        if not wrong and digit == truth[i : i + 1]:
            labels.append(TokenLabel(right))
        elif wrong or digit == expected[i : i + 1]:
            labels.append(TokenLabel("consequence"))
        else:
            wrong = True
            labels.append(TokenLabel("error", visible=len(digits) != 2))
    return labels


def _garbage(tokens: list[str]) -> list[TokenLabel]:
    return [TokenLabel("consequence") if i else TokenLabel("error", visible=True) for i in range(len(tokens))]
