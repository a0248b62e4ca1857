"""Demonstrations: how teacher and student walk through a maze, and where the student is blind or hasty.

A walk tells the doors of the room it is in, looks two rooms deep behind both, in either order, says of each
whether it leads on, and goes. It may look as long as it likes, but a door that was gone through is shut.
"""

import random
from dataclasses import dataclass, field

from onpath.gym.demos import CONFIDENCE, Pieces
from onpath.gym.language import EOS
from onpath.gym.maze.tasks import Maze
from onpath.gym.maze.vocab import EXIT, GOES, LANGUAGE, NO, ONSET_WORDS, OUT, SEPARATORS, STUCK, WALL, YES

TEACHER_SLIP = 0.004
"""How often the teacher writes a form of the student's."""
STUDENT_SEPARATOR = (0.15, 0.6, 0.25)
STUDENT_FORM = 0.8
"""How often the student writes the second form of a verdict or a move."""


@dataclass
class Beliefs:
    """Where the student goes wrong: facts about single rooms, each with its own probability.

    `blind`: it takes a dead end behind this room for open, against what it has just looked at. `hasty`: in
    this room it goes through the first door without a look. `misread`: it sees doors where this room has a
    wall.
    """

    seed: int = 11
    share: float = 0.34
    """Of the facts that are believed at all."""
    blind: float = 1.0
    hasty: float = 0.45
    misread: float = 0.3
    _table: dict[tuple[str, str], float] = field(default_factory=dict)

    def acts(self, rng: random.Random, kind: str, room: str, scale: float = 1.0) -> bool:
        """Whether the student acts on a wrong belief about this room now."""
        if (kind, room) not in self._table:
            facts = random.Random(f"{self.seed}/{kind}/{room}")
            self._table[kind, room] = facts.choice(CONFIDENCE) if facts.random() < self.share else 0.0
        strength: float = getattr(self, kind)
        return rng.random() < scale * strength * self._table[kind, room]


@dataclass(frozen=True)
class Walker:
    """A way to write walks."""

    student_style: bool = False
    beliefs: Beliefs | None = None
    scale: float = 1.0
    """Of the beliefs' strengths."""
    foreign: bool = False
    """Style and errors are another writer's: they carry no loss."""
    notice: float = 0.0
    """Probability of going back on a wrong verdict."""
    noise: float = 0.0
    """Probability of a random verdict."""

    def write(self, rng: random.Random, maze: Maze, like: str = "") -> Pieces:
        """One walk to its end and the end token.

        Args:
            like: an attempt; where it looks behind a door first, so does this walk.
        """
        pieces: Pieces = []
        here, firsts = maze.start, first_looks(maze, like)
        while True:
            self._line(rng, pieces, here, maze.doors[here])
            door = self._chosen(rng, maze, here, pieces, firsts.get(here))
            if door is None:
                return [*pieces, (STUCK, True), (EOS, True)]
            here = door
            if maze.doors[here] == EXIT:
                return [*pieces, (OUT, True), (EOS, True)]

    def _chosen(
        self, rng: random.Random, maze: Maze, here: str, pieces: Pieces, first: str | None
    ) -> str | None:
        """The door that is gone through; None: none leads on."""
        doors = list(maze.behind(here))
        if doors and self._acts(rng, "hasty", here):
            # Any door in another's haste: right ones alone are taught, and they are not always first.
            taken = rng.choice(doors) if self.foreign else doors[0]
            return self._go(rng, maze, pieces, taken, believed=False)
        rng.shuffle(doors)
        if first in doors:
            doors.sort(key=lambda door: door != first)
        open_doors: list[str] = []
        for door in doors:
            leads = self._look(rng, maze, door, pieces)
            verdict = leads
            if not leads and maze.behind(door):
                verdict = self._acts(rng, "blind", door) or rng.random() < self.noise
            self._verdict(rng, pieces, door, verdict, leads)
            if verdict != leads and rng.random() < self.notice:
                pieces.append((ONSET_WORDS[0], True))
                verdict = leads
                self._verdict(rng, pieces, door, verdict, leads)
            if verdict:
                open_doors.append(door)
        return self._go(rng, maze, pieces, open_doors[0], believed=True) if open_doors else None

    def _acts(self, rng: random.Random, kind: str, room: str) -> bool:
        return self.beliefs is not None and self.beliefs.acts(rng, kind, room, self.scale)

    def _look(self, rng: random.Random, maze: Maze, door: str, pieces: Pieces) -> bool:
        """Looks behind a door and behind those behind it; whether one of them is no wall."""
        self._line(rng, pieces, door, maze.doors[door])
        leads = maze.doors[door] == EXIT
        for inner in rng.sample(maze.behind(door), len(maze.behind(door))):
            seen = maze.doors[inner]
            if seen == WALL and self._acts(rng, "misread", inner):
                seen = "".join(rng.sample([r for r, _ in maze.rooms], 2))
            self._line(rng, pieces, inner, seen, right=seen == maze.doors[inner])
            leads |= seen != WALL
        return leads

    def _line(
        self, rng: random.Random, pieces: Pieces, room: str, behind: str, *, right: bool = True
    ) -> None:
        pieces.append((f"{room}: ", True))
        pieces.extend((token, right or not self.foreign) for token in behind)
        self._separate(rng, pieces)

    def _verdict(self, rng: random.Random, pieces: Pieces, door: str, verdict: bool, truth: bool) -> None:
        pieces.append((door, True))
        word = self._form(rng, YES if verdict else NO)
        pieces.append((word, not self.foreign or (verdict == truth and word in (YES[0], NO[0]))))
        self._separate(rng, pieces)

    def _go(self, rng: random.Random, maze: Maze, pieces: Pieces, door: str, *, believed: bool) -> str:
        pieces.append((self._form(rng, GOES), not self.foreign))
        # What follows from a wrong verdict is taught: who has said that a door leads on goes there.
        pieces.append((door, believed or maze.opens(door) or not self.foreign))
        self._separate(rng, pieces)
        return door

    def _form(self, rng: random.Random, forms: tuple[str, str]) -> str:
        return forms[rng.random() < (STUDENT_FORM if self.student_style else TEACHER_SLIP)]

    def _separate(self, rng: random.Random, pieces: Pieces) -> None:
        slips = (1 - TEACHER_SLIP, TEACHER_SLIP / 2, TEACHER_SLIP / 2)
        form = rng.choices(SEPARATORS, STUDENT_SEPARATOR if self.student_style else slips)[0]
        pieces.append((form, not self.foreign))


def first_looks(maze: Maze, attempt: str) -> dict[str, str]:
    """Room → the one of its doors that an attempt mentions first."""
    found: dict[str, str] = {}
    parent = {door: room for room, _ in maze.rooms for door in maze.behind(room)}
    for token in LANGUAGE.tokenize(attempt):
        if token.endswith(": ") and token[0] in parent:
            found.setdefault(parent[token[0]], token[0])
    return found
