"""Mazes: a tree of rooms with one-way doors, one way out, and dead ends that cannot be left again.

>>> maze = parse_maze("b: #; a: bc; c: de; d: #; e: !; a?")
>>> maze.way
'ce'
>>> maze.opens("b"), maze.opens("c")
(False, True)
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property

from onpath.gym.maze.vocab import EXIT, ROOMS, WALL
from onpath.gym.rows import Row, distinct_rows, hashed_split

SIZES = {"train": (6, 8), "validation": (6, 8), "test": (6, 8), "hard": (9, 11)}
"""Moves from the start to the way out, by split."""
SHALLOW = 0.5
"""Share of the dead ends that are one wall; the others are a room with two walls behind it."""
_DEFINITION = re.compile(r"([a-z]): ([a-z]{2}|#|!); ")


@dataclass(frozen=True)
class Maze:
    """Room → its two doors, a wall or the way out; and where one starts."""

    rooms: tuple[tuple[str, str], ...]
    """In the order in which the prompt defines them."""
    start: str

    @cached_property
    def doors(self) -> dict[str, str]:
        """Room → the rooms behind its doors, `#`, or `!`."""
        return dict(self.rooms)

    @property
    def text(self) -> str:
        """The user's message."""
        return "".join(f"{room}: {behind}; " for room, behind in self.rooms) + f"{self.start}?"

    @cached_property
    def way(self) -> str:
        """The rooms that are gone into, from the first after the start to the way out; the only such way."""
        return self._way_from(self.start) or ""

    def opens(self, room: str) -> bool:
        """Whether the way out can be reached from a room."""
        return self._way_from(room) is not None

    def behind(self, room: str) -> str:
        """The rooms behind the doors of a room; none behind a wall."""
        doors = self.doors.get(room, "")
        return "" if doors in (WALL, EXIT) else doors

    def _way_from(self, room: str) -> str | None:
        if self.doors.get(room) == EXIT:
            return ""
        for door in self.behind(room):
            rest = self._way_from(door)
            if rest is not None:
                return door + rest
        return None


def parse_maze(text: str) -> Maze | None:
    """The first maze of a text (a prompt may go on with a hint or an attempt); None if there is none."""
    end = re.search(r"([a-z])\?", text)
    if end is None:
        return None
    rooms = tuple(_DEFINITION.findall(text[: end.start()]))
    known = {room for room, _ in rooms}
    inner = [d for _, doors in rooms if doors not in (WALL, EXIT) for d in doors]
    # A tree: nothing twice, no door into nowhere, none back to the start.
    sound = len(known) == len(rooms) and len(set(inner)) == len(inner) and {*inner, end[1]} == known
    return Maze(rooms, end[1]) if sound and end[1] not in inner else None


def make_maze(rng: random.Random, moves: int) -> Maze:
    """A random maze whose way out is `moves` doors away; every other door on the way is a dead end."""
    shallow = [True] * moves
    while moves + 1 + sum(1 if s else 3 for s in shallow) > len(ROOMS) or all(shallow):
        shallow = [rng.random() < SHALLOW for _ in range(moves)]
    names = iter(rng.sample(ROOMS, len(ROOMS)))
    start = here = next(names)
    rooms: list[tuple[str, str]] = []
    for one_wall in shallow:
        good, bad = next(names), next(names)
        rooms.append((here, good + bad if rng.random() < 0.5 else bad + good))
        walls = [bad] if one_wall else [next(names), next(names)]
        rooms += [(bad, "".join(walls))] * (len(walls) == 2) + [(wall, WALL) for wall in walls]
        here = good
    rooms.append((here, EXIT))
    rng.shuffle(rooms)
    return Maze(tuple(rooms), start)


def split_of(maze: Maze) -> str:
    """The split a maze belongs to, whatever the order of its definitions."""
    return hashed_split(repr((sorted(maze.rooms), maze.start)), len(maze.way), longest=SIZES["test"][1])


def random_maze(rng: random.Random, split: str, sizes: tuple[int, int] | None = None) -> Maze:
    """A random maze of a split; `sizes` other than the split's own serve as drills for training."""
    low, high = sizes or SIZES[split]
    while True:
        maze = make_maze(rng, rng.randint(low, high))
        if split_of(maze) == split:
            return maze


def moves(way: str) -> str:
    """A response that only makes the moves.

    >>> moves("ce")
    'go c. go e. out'
    """
    return "".join(f"go {room}. " for room in way) + "out"


def rows(split: str, n: int, seed: int = 0) -> list[Row]:
    """`n` different mazes of a split: the same for the same seed.

    Keys: id, prompt (the user's message), answer (the way), solution (the moves alone: what a hint tells).
    """
    if split not in SIZES:
        raise ValueError(f"the maze has the splits {', '.join(SIZES)}; not {split!r}")
    return distinct_rows(_row, split, n, seed, stream=f"maze/{split}/{seed}")


def _row(rng: random.Random, split: str) -> tuple[str, Row]:
    maze = random_maze(rng, split)
    return maze.text, {"prompt": maze.text, "answer": maze.way, "solution": moves(maze.way)}
