"""What each model of the maze is trained on: walks, hints, attempts, and a curriculum of sizes."""

import random
from dataclasses import dataclass, field

from onpath.gym.demos import Pieces, text_of
from onpath.gym.language import GIVEN, TEMPLATES, TRIED
from onpath.gym.maze.demos import Beliefs, Walker
from onpath.gym.maze.tasks import SIZES, moves, random_maze

SHARES = {
    "student": {"plain": 0.8, "hint": 0.1, "rewrite": 0.06, "rewrite_with_reference": 0.04},
    "teacher": {"plain": 0.4, "prefix": 0.24, "hint": 0.06, "rewrite": 0.2, "rewrite_with_reference": 0.1},
    "refiner": {"plain": 0.25, "prefix": 0.2, "hint": 0.05, "rewrite": 0.35, "rewrite_with_reference": 0.15},
}
"""Of kinds of demonstrations, by role; `refiner` is the teacher in its second stage."""
LONG = {"student": 0.05, "teacher": 0.12, "refiner": 0.12}
"""Share of mazes as long as those of `hard`."""
CURRICULUM = {"student": 0.25, "teacher": 0.25, "refiner": 0.0}
"""Share of the training over which mazes of one to three moves give way to whole ones."""


@dataclass
class Mixture:
    """A source of demonstrations for one role."""

    role: str
    beliefs: Beliefs = field(default_factory=Beliefs)
    hint_scale: float = 0.05
    """Of the student's misbeliefs where it sees the way."""

    def draw(self, rng: random.Random, progress: float) -> tuple[str, Pieces]:
        """One demonstration: the user's message and the response. `progress` runs from 0 to 1."""
        shares = SHARES[self.role]
        kind = rng.choices(list(shares), list(shares.values()))[0]
        if progress < 1.2 * CURRICULUM[self.role] and rng.random() < 0.8:
            kind = "plain"
        maze = random_maze(rng, "train", self._sizes(rng, progress))
        attempt = ""
        if TRIED in TEMPLATES.get(kind, ""):
            writer = Walker(student_style=True, beliefs=self.beliefs, noise=rng.choice((0.0, 0.0, 0.1)))
            attempt = text_of(writer.write(rng, maze))
        prompt = TEMPLATES.get(kind, "{problem}").format(
            problem=maze.text, solution=moves(maze.way), attempt=attempt
        )
        return prompt, self._walker(rng, kind).write(rng, maze, attempt)

    def _sizes(self, rng: random.Random, progress: float) -> tuple[int, int]:
        curriculum = CURRICULUM[self.role]
        if rng.random() > (progress / curriculum if curriculum else 1.0):
            return (1, 3)
        if rng.random() < LONG[self.role]:
            return SIZES["hard"]
        return (2, SIZES["train"][1]) if rng.random() < 0.2 else SIZES["train"]

    def _walker(self, rng: random.Random, kind: str) -> Walker:
        if self.role == "student":
            scale = self.hint_scale if GIVEN in TEMPLATES.get(kind, "") else 1.0
            return Walker(student_style=True, beliefs=self.beliefs, scale=scale)
        if kind == "prefix":
            return Walker(
                student_style=rng.random() < 0.9, beliefs=self.beliefs, foreign=True, notice=0.5,
                noise=rng.choice((0.0, 0.0, 0.2)),
            )  # fmt: skip
        return Walker()
