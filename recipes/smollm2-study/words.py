"""Word problems of two to four steps as a task: rows, two ways of writing solutions, a checker of steps.

    eval: {grader: "words.py:grade"}       naming the grader loads this file, and the file registers its task
    data: {train: "words:train"}           then words:train, words:test, words:hard, … are sources

A problem is a few sentences; a step is one equation. Student and teacher calculate alike, but each has words
of its own for it, so that a token can be loud where nothing is wrong.
"""

import contextlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from onpath.data.tasks import Task, register

SPLITS = {
    "train": 2000, "sft": 4000, "test": 400, "hard": 400, "validation": 200,
    "hard_train": 2000, "hard_validation": 200,
}  # fmt: skip
"""Split → problems where no limit is given; `sft` is what the models are made of."""
LONGER = (3, 4)
HARD_OF = {"hard_train": "train", "hard_validation": "validation"}
"""Splits of three and four steps → the split of two whose share of all texts they take."""
LARGEST = 100
"""No result is larger."""

PEOPLE = ("Ann", "Ben", "Carla", "Dan", "Eve", "Finn", "Grace", "Hugo")
ITEMS = ("apples", "pens", "books", "stamps", "coins", "shells", "cards", "buttons")
HOLDERS = ("boxes", "bags", "jars")
_COUNT = {
    "+": ("{who} gets {n} more {items}.", "{who} buys {n} {items}.", "{other} gives {who} {n} {items}."),
    "-": ("{who} loses {n} {items}.", "{who} gives {n} {items} to {other}.", "{who} sells {n} {items}."),
    "*": ("Soon {who} has {n} times as many {items}.",),
}
_START = ("{who} has {n} {items}.", "{who} starts with {n} {items}.")
_FILLED = "{who} has {n} {holders} with {m} {items} each."
_PACKS = "{who} buys {n} {holders} with {m} {items} each."
_QUESTION = "How many {items} does {who} have now?"

OP_WORDS = {
    "more": "+", "add": "+", "up": "+", "away": "-", "take": "-", "down": "-", "times": "*", "each": "*",
    "multiply": "*", "groups": "*",
}  # fmt: skip
"""Words of a solution that commit to an operation."""
_EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) (=|is) (\d+)")
_OPENED = re.compile(r"(\d+) ([-+*])(?: (\d+)(?: (=|is)(?: (\d+))?)?)?")  # an equation that has only begun
_STATED = re.compile(r"answer is (\d+)")
_NUMBER = re.compile(r"\d+")
KINDS = ("error", "consequence", "right", "copied", "habit")
"""Of tokens, the most telling first."""
OPERATION, OPERAND, ARITHMETIC, OTHER = ERROR_KINDS = ("operation", "operand", "arithmetic", "other")


@dataclass(frozen=True)
class Step:
    """One operation: operands are numbers of the text, or earlier steps by index (negative: ~index)."""

    left: int
    op: str
    right: int

    @property
    def needs(self) -> list[int]:
        """Indices of the steps that it builds on."""
        return [~x for x in (self.left, self.right) if x < 0]

    def operands(self, values: Mapping[int, int]) -> tuple[int, int]:
        """As numbers, given the results of earlier steps."""
        left, right = (values[~x] if x < 0 else x for x in (self.left, self.right))
        return left, right


def compute(op: str, left: int, right: int) -> int:
    """
    >>> compute("*", 3, 4)
    12
    """
    return left + right if op == "+" else left - right if op == "-" else left * right


@dataclass(frozen=True)
class Problem:
    """A text and the steps that it asks for, the last one giving the answer."""

    text: str
    steps: tuple[Step, ...]
    items: str

    def values(self) -> dict[int, int]:
        """Index of a step → its right result."""
        found: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            found[i] = compute(step.op, *step.operands(found))
        return found

    @property
    def answer(self) -> int:
        return self.values()[len(self.steps) - 1]


def make(rng: random.Random, steps: int) -> Problem:
    """A problem of so many steps whose numbers are at most 10 and whose results are from 1 to `LARGEST`."""
    while True:
        found = parse(_text(rng, steps))
        assert found is not None
        if len(found.steps) == steps and all(1 <= value <= LARGEST for value in found.values().values()):
            return found


def _text(rng: random.Random, steps: int) -> str:
    who, other = rng.sample(PEOPLE, 2)
    told = {"who": who, "other": other, "items": rng.choice(ITEMS), "holders": rng.choice(HOLDERS)}

    def say(form: str) -> str:
        return form.format(**told, n=rng.randint(2, 10), m=rng.randint(2, 10))

    filled = rng.random() < 0.35
    sentences, left = [say(_FILLED if filled else rng.choice(_START))], steps - filled
    while left > 0:
        if left >= 2 and rng.random() < 0.25:
            sentences.append(say(_PACKS))
            left -= 2
        else:
            op = rng.choice("++--*")
            sentences.append(say(rng.choice(_COUNT[op])).replace("has 10 times", "has 3 times"))
            left -= 1
    return " ".join([*sentences, _QUESTION.format(**told)])


def parse(text: str) -> Problem | None:
    """The problem that a text asks; None: it is none of ours.

    >>> parse("Ann has 7 pens. Ann loses 2 pens. How many pens does Ann have now?").answer
    5
    """
    *sentences, question = re.findall(r"[^.?]+[.?]", text)
    steps: list[Step] = []
    running: int | None = None
    asked = re.search(r"How many (\w+) does (\w+) have now\?", question)
    for sentence in sentences:
        numbers = [int(n) for n in _NUMBER.findall(sentence)]
        if not numbers or asked is None:
            return None
        if sentence.rstrip(".").endswith("each"):
            steps.append(Step(numbers[0], "*", numbers[-1]))
            product = ~(len(steps) - 1)
            if running is None:
                running = product
                continue
            numbers, op = [product], "+"
        elif running is None:
            running = numbers[0]
            continue
        else:
            op = "*" if "times" in sentence else "-" if re.search("loses|sells|to ", sentence) else "+"
        steps.append(Step(running, op, numbers[0]))
        running = ~(len(steps) - 1)
    return Problem(text, tuple(steps), asked[1]) if asked and steps else None


@dataclass(frozen=True)
class Writer:
    """How somebody words a step: forms by operation with their shares, and how he writes `=`.

    Slots: {e} the equation, {n} the second operand, {m} the first, {items}.
    """

    openings: tuple[str, ...]
    """Before the steps, drawn alike."""
    later: tuple[str, ...]
    """What opens each step after the first."""
    forms: Mapping[str, tuple[str, ...]]
    says_is: float
    """How often the equals sign is a word."""

    def write(self, rng: random.Random, problem: Problem, *, kept: str = "") -> str:
        """A right solution; `kept`: a sound beginning of it that somebody else wrote."""
        reading = Reading(problem, kept)
        sentences, first = [], not kept.strip()
        opening = rng.choice(self.openings) if first else ""
        for i in range(len(problem.steps)):
            if i not in reading.written:
                sentences.append(self._step(rng, problem, i, reading.written, first=first))
                first = False
        value = reading.written[len(problem.steps) - 1]
        parts = (kept.strip(), opening, *sentences, f"The answer is {value}.")
        return " ".join(part for part in parts if part)

    def _step(
        self, rng: random.Random, problem: Problem, i: int, written: dict[int, int], *, first: bool
    ) -> str:
        step = problem.steps[i]
        left, right = step.operands(written)
        written[i] = compute(step.op, left, right)
        equals = "is" if rng.random() < self.says_is else "="
        equation = f"{left} {step.op} {right} {equals} {written[i]}"
        kind = "**" if step.op == "*" and not step.needs else step.op
        told = rng.choice(self.forms[kind]).format(e=equation, n=right, m=left, items=problem.items)
        opener = "" if first else f"{rng.choice(self.later)} "
        return opener + told if opener else told[0].upper() + told[1:]


TEACHER = Writer(
    openings=("",),
    later=("Then", "Then", "Then", "After that"),
    forms={
        "+": (*("there are {n} more {items}, so {e}.",) * 2, "{n} more make {e}."),
        "-": (*("{n} {items} go away, so {e}.",) * 2, "{n} away leave {e}."),
        "*": ("there are {n} times as many {items}, so {e}.",),
        "**": ("{m} groups have {n} {items} each, so {e}.", "{m} times {n} {items} make {e}."),
    },
    says_is=0.02,
)
STUDENT = Writer(
    openings=("", "Let us see.", "We do it one by one."),
    later=("Now", "Next,", "And now"),
    forms={
        "+": ("we add {n} and get {e}.", "we add {n} {items}: {e}.", "the number goes up by {n}: {e}."),
        "-": ("we take {n} and get {e}.", "we take {n} {items}: {e}.", "the number goes down by {n}: {e}."),
        "*": ("we multiply by {n} and get {e}.", "we multiply it by {n}: {e}."),
        "**": ("we multiply {m} by {n} and get {e}.", "we have {m} groups of {n} {items}: {e}."),
    },
    says_is=0.4,
)


@dataclass
class Reading:
    """What every character of a response is, and what it claims step by step.

    - `error`: a word that commits to an operation that no step asks for, a number or sign that no step has,
      an answer that has not been worked out; of a wrong result what follows its right digits;
    - `consequence`: right given what was written before, but not what the truth has there;
    - `right`: a digit of a result, as the truth has it;
    - `copied`: operands, signs, operation words, the answer;
    - `habit`: every other word and mark: the prose, `=` and `is`.
    """

    problem: Problem
    text: str
    kinds: list[str] = field(init=False)
    written: dict[int, int] = field(init=False, default_factory=dict)
    """Step → the result that the text claims for it."""
    errors: list[tuple[int, str]] = field(init=False, default_factory=list)
    """(character, one of `ERROR_KINDS`), in order."""

    def __post_init__(self) -> None:
        self.truth = self.problem.values()
        self.kinds = ["habit"] * len(self.text)
        numbers = {n for s in self.problem.steps for n in (s.left, s.right) if n >= 0}
        at = 0
        for found in _OPENED.finditer(self.text):
            self._prose(at, found.start(), numbers)
            self._equation(found)
            at = found.end()
        self._prose(at, len(self.text), numbers)
        self.errors.sort()

    def ready(self) -> list[int]:
        """Steps that can be taken: not done, all they build on is."""
        return [
            i
            for i, step in enumerate(self.problem.steps)
            if i not in self.written and all(n in self.written for n in step.needs)
        ]

    def _mark(self, start: int, end: int, kind: str, error: str = OTHER) -> None:
        self.kinds[start:end] = [kind] * (end - start)
        if kind == "error":
            self.errors.append((start, error))

    def _prose(self, start: int, end: int, numbers: set[int]) -> None:
        """Words between equations, and the answer."""
        stretch = self.text[start:end]
        ready = self.ready()
        ops = {self.problem.steps[i].op for i in ready}
        mine = {n for i in ready for n in self.problem.steps[i].operands(self.written)}
        for word in re.finditer(r"[A-Za-z]+", stretch):
            op = OP_WORDS.get(word[0].lower())
            if op is not None and ready:
                kind = "copied" if op in ops else "error"
                self._mark(start + word.start(), start + word.end(), kind, OPERATION)
        stated = {m.start(1): m for m in _STATED.finditer(stretch)}
        for number in _NUMBER.finditer(stretch):
            place = start + number.start(), start + number.end()
            if number.start() in stated:
                self._answer(*place)
            elif self._any(number[0], mine if ready else numbers, place[1]):
                self._mark(*place, "copied")
            else:
                self._mark(*place, "error", OPERAND)

    def _equation(self, found: re.Match[str]) -> None:
        ready = self.ready()
        i = next((i for i in ready if self._fits(i, found)), None)
        if i is None:
            self._wrong(found, ready)
            return
        true = self.problem.steps[i].operands(self.truth)
        for group in (1, 3):
            if found[group] is not None:
                same = self._any(found[group], true, found.end(group))
                self._mark(*found.span(group), "copied" if same else "consequence")
        self._mark(*found.span(2), "copied")
        if found[5] is not None:
            self._result(found, compute(found[2], int(found[1]), int(found[3])), self.truth[i])
            self.written[i] = int(found[5])

    def _any(self, written: str, values: Iterable[int], end: int) -> bool:
        """Whether a number that ends there is one of these; at the end of the text it may still become it."""
        goals = map(str, values)
        return any(g == written or (end == len(self.text) and g.startswith(written)) for g in goals)

    def _fits(self, i: int, found: re.Match[str]) -> bool:
        left, op, right = int(found[1]), found[2], found[3]
        a, b = self.problem.steps[i].operands(self.written)
        pairs = ((a, b), (b, a)) if op != "-" else ((a, b),)
        return op == self.problem.steps[i].op and any(
            left == x and (right is None or self._any(right, [y], found.end(3))) for x, y in pairs
        )

    def _wrong(self, found: re.Match[str], ready: Sequence[int]) -> None:
        """No step is this: the first part that fits none is the error, what follows its consequence."""
        left, op = int(found[1]), found[2]
        steps = [self.problem.steps[i] for i in ready]
        values = [(s, *s.operands(self.written)) for s in steps]
        begun = [(s, a, b) for s, a, b in values if left == a or (s.op != "-" and left == b)]
        signed = [(s, a, b) for s, a, b in begun if s.op == op]
        group, kind = (1, OPERAND) if not begun else (2, OPERATION) if not signed else (3, OPERAND)
        start, end = found.span()
        self._mark(start, end, "consequence")
        self._mark(start, found.start(group), "copied")
        self._mark(*found.span(group), "error", kind)
        if ready and found[5] is not None:
            self.written[ready[0]] = int(found[5])  # what it claims is what later steps build on

    def _result(self, found: re.Match[str], expected: int, truth: int) -> None:
        start, end = found.span(5)
        value, right = found[5], str(truth)
        if self._any(value, [truth], end):
            self._mark(start, end, "right")
        elif self._any(value, [expected], end):
            self._mark(start, end, "consequence")
        else:
            same = _alike(value, str(expected))
            self._mark(start, start + same, "right" if value[:same] == right[:same] else "consequence")
            self._mark(start + min(same, len(value) - 1), end, "error", ARITHMETIC)

    def _answer(self, start: int, end: int) -> None:
        value, claimed = self.text[start:end], self.written.get(len(self.problem.steps) - 1)
        if self._any(value, [self.problem.answer], end):
            self._mark(start, end, "copied")
        else:
            same = claimed is not None and self._any(value, [claimed], end)
            self._mark(start, end, "consequence" if same else "error", OTHER)


def _alike(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def grade(text: str, answer: str) -> bool:
    """Whether the last answer that a response states is the right one.

    >>> grade("7 + 5 is 12. The answer is 12.", "12"), grade("It is 12.", "12")
    (True, False)
    """
    found = _STATED.findall(text)
    return bool(found) and found[-1] == answer


def rewritten(rng: random.Random, problem: Problem, attempt: str, writer: Writer) -> str:
    """What a rewriter is taught: the attempt up to its first wrong sentence, then right sentences."""
    kept = attempt[: WordProblems().first_error(problem.text, attempt)]
    done = Reading(problem, kept)
    if kept == attempt and grade(attempt, str(problem.answer)) and len(done.written) == len(problem.steps):
        return attempt.strip()
    return writer.write(rng, problem, kept="" if "answer" in kept else kept)


class WordProblems(Task):
    """The task `words`."""

    name = "words"
    splits: Mapping[str, int] = SPLITS
    checks_steps = labels_tokens = True
    error_kinds: tuple[str, ...] = ERROR_KINDS
    templates: Mapping[str, str] = {
        "rewrite": "{problem}\n\nAn attempt: {attempt}\n\nWrite the attempt anew so that it is right.",
        "rewrite_with_reference": "{problem}\n\nA right solution: {solution}\n\nAn attempt: {attempt}\n\n"
        "Write the attempt anew so that it is right.",
        "hint": "{problem}\n\nA right solution: {solution}\n\nSolve the problem in your own words.",
    }

    def rows(self, split: str, count: int) -> Iterator[Mapping[str, str]]:
        """See `Task.rows`; no problem is in two splits, since each belongs to the split of its digest."""
        for i, problem in enumerate(islice(problems(split), count)):
            solution = TEACHER.write(random.Random(f"{split}/{i}"), problem)
            told = {"prompt": problem.text, "answer": str(problem.answer), "solution": solution}
            yield {"id": f"{split}/{i}", **told}

    def grade(self, text: str, answer: str) -> bool:
        """See `Task.grade`."""
        return grade(text, answer)

    def first_error(self, problem: str, response: str) -> int | None:
        """See `Task.first_error`: the beginning of the sentence with the first wrong character."""
        found = parse(problem)
        errors = Reading(found, response).errors if found else [(0, OTHER)]
        return response.rfind(". ", 0, errors[0][0] + 1) + 1 if errors else None

    def labels(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.labels`: of a token's characters the most telling one."""
        found = parse(problem)
        if found is None:
            return ["error"] * len(tokens)
        kinds, labels, at = Reading(found, "".join(tokens)).kinds, [], 0
        for token in tokens:
            mine = kinds[at : at + len(token)]
            labels.append(min(mine, key=KINDS.index, default="habit"))
            at += len(token)
        return labels

    def skills(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """See `Task.skills`: the operation of a result's digits; elsewhere nothing."""
        text, at, found = "".join(tokens), 0, []
        results = {i: m[2] for m in _EQUATION.finditer(text) for i in range(*m.span(5))}
        for token in tokens:
            found.append(next((results[i] for i in range(at, at + len(token)) if i in results), ""))
            at += len(token)
        return found

    def error_kind(self, problem: str, tokens: Sequence[str]) -> str | None:
        """See `Task.error_kind`."""
        found = parse(problem)
        errors = Reading(found, "".join(tokens)).errors if found else [(0, OTHER)]
        return errors[0][1] if errors else None

    def stated(self, answer: str) -> str:
        """See `Task.stated`."""
        return f"The answer is {answer}."


def problems(split: str, steps: tuple[int, int] | None = None) -> Iterator[Problem]:
    """All problems of a split, none twice, none of another split; of other lengths if `steps` says so."""
    names, mine = [name for name in SPLITS if name not in HARD_OF], HARD_OF.get(split, split)
    rng, seen = random.Random(f"words/{split}"), set()
    low, high = steps or (LONGER if split.startswith("hard") else (2, 2))
    while True:
        problem = make(rng, rng.randint(low, high))
        owner = names[random.Random(problem.text).randrange(len(names))]
        if owner == mine and problem.text not in seen:
            seen.add(problem.text)
            yield problem


with contextlib.suppress(ValueError):  # loaded under two names (a study's worker, a test) it is the same task
    register(WordProblems())
