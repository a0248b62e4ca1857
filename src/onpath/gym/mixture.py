"""What each model is trained on: solutions, hints, attempts, and a curriculum of sizes."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from onpath.gym.demos import TEACHER_SLIP, Beliefs, Pieces, Writer, corrupt, order_like, text_of
from onpath.gym.language import GIVEN, TEMPLATES, TRIED
from onpath.gym.tasks import Problem, parse_problem, random_order, random_problem, solution

TEACHER_SHARES = {
    "plain": 0.42,
    "prefix": 0.26,
    "hint": 0.06,
    "rewrite": 0.14,
    "rewrite_with_reference": 0.12,
}
STUDENT_SHARES = {"plain": 0.7, "hint": 0.1, "rewrite": 0.1, "rewrite_with_reference": 0.1}


@dataclass
class Mixture:
    """A source of demonstrations for one role."""

    role: str
    beliefs: Beliefs = field(default_factory=Beliefs)
    pool: list[tuple[str, str]] = field(default_factory=list)
    """Real attempts of the student: (problem text, response text)."""
    curriculum: float = 0.1
    """Share of the training over which one- and two-step drills give way to whole problems."""
    slips: Mapping[str, float] = field(default_factory=lambda: TEACHER_SLIP)
    """The teacher's, by operation."""
    habits: bool = True
    """Whether the student writes its own surface forms, or the teacher's."""
    hint_scale: float = 0.05
    """Of the student's misbeliefs where it sees the reference solution."""

    def draw(self, rng: random.Random, progress: float) -> tuple[str, Pieces]:
        """One demonstration: the user's message and the response. `progress` runs from 0 to 1."""
        shares = TEACHER_SHARES if self.role == "teacher" else STUDENT_SHARES
        kind = rng.choices(list(shares), list(shares.values()))[0]
        if progress < 1.2 * self.curriculum:
            kind = "plain" if rng.random() < 0.8 else kind
        problem = random_problem(rng, "train", self._sizes(rng, progress))
        attempt = ""
        if TRIED in TEMPLATES.get(kind, ""):
            problem, attempt = self._attempt(rng, problem)
        order = order_like(rng, problem, attempt) if attempt else random_order(rng, problem)
        reference = solution(problem, random_order(rng, problem))
        prompt = TEMPLATES.get(kind, "{problem}").format(
            problem=problem.text, solution=reference, attempt=attempt
        )
        return prompt, self._writer(rng, kind).write(rng, problem, order)

    def _sizes(self, rng: random.Random, progress: float) -> tuple[int, int]:
        if rng.random() > (progress / self.curriculum if self.curriculum else 1.0):
            return (1, 2)
        if rng.random() < (0.12 if self.role == "teacher" else 0.05):
            return (6, 7)
        return (1, 5) if rng.random() < 0.2 else (3, 5)

    def _writer(self, rng: random.Random, kind: str) -> Writer:
        if self.role == "student":
            scale = self.hint_scale if GIVEN in TEMPLATES.get(kind, "") else 1.0
            return Writer(student_style=self.habits, beliefs=self.beliefs, scale=scale)
        if kind == "prefix":
            noise = rng.choice((0.0, 0.0, 0.3))
            return Writer(
                student_style=rng.random() < 0.9, beliefs=self.beliefs, foreign=True, notice=0.5, noise=noise,
                slips=self.slips,
            )  # fmt: skip
        return Writer(slips=self.slips)

    def _attempt(self, rng: random.Random, problem: Problem) -> tuple[Problem, str]:
        """An attempt to refine: real where there is a pool, else by the same misbeliefs; some are damaged."""
        if self.pool and rng.random() < 0.6:
            text, attempt = rng.choice(self.pool)
            real = parse_problem(text)
            assert real is not None, "the pool holds the gym's own problems"
            return real, attempt
        writer = Writer(student_style=True, beliefs=self.beliefs, noise=rng.choice((0.0, 0.0, 0.2)))
        attempt = text_of(writer.write(rng, problem, random_order(rng, problem)))
        if self.role == "student" or rng.random() < 0.6:
            return problem, attempt
        other = random_problem(rng, "train")
        return problem, corrupt(rng, attempt, text_of(writer.write(rng, other, random_order(rng, other))))
