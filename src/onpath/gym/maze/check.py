"""The maze's truth: is a walk right, where is its first wrong step, and what is every token of it.

Nothing here raises on any text: what cannot be read is an error of the response.
"""

import re
from collections.abc import Sequence
from typing import Literal

from onpath.gym.language import EOS
from onpath.gym.maze.tasks import Maze, parse_maze
from onpath.gym.maze.vocab import (
    EXIT,
    GOES,
    HEADS,
    LANGUAGE,
    NO,
    ONSET_WORDS,
    OUT,
    ROOMS,
    SEPARATORS,
    STUCK,
    WALL,
    YES,
)

Kind = Literal["error", "consequence", "right", "habit", "choice", "copied"]
HASTY, VERDICT, OTHER = ERROR_KINDS = ("wrong door", "wrong verdict", "other")
"""Of first errors: gone through a door that is a dead end, unsaid before; a door misjudged; anything else."""
_MOVE = re.compile("(?:" + "|".join(map(re.escape, GOES)) + ")([a-z])")


def grade(text: str, answer: str) -> bool:
    """Whether the moves of a walk are those of the way out, and it says that it is out."""
    return text.rstrip().endswith(OUT) and "".join(_MOVE.findall(text)) == answer


def first_error_token(prompt: str, tokens: Sequence[str]) -> int | None:
    """Index of the first wrong token; None if there is none."""
    return next((i for i, kind in enumerate(label_tokens(prompt, tokens)) if kind == "error"), None)


def first_error(prompt: str, response: str) -> int | None:
    """Character offset at which the first wrong line starts; all before it is sound. None: no error."""
    tokens = LANGUAGE.tokenize(response)
    wrong = first_error_token(prompt, tokens)
    if wrong is None:
        return None
    start = next((i + 1 for i in range(wrong - 1, -1, -1) if tokens[i] in SEPARATORS), 0)
    return len("".join(tokens[:start]))


def error_kind(prompt: str, tokens: Sequence[str]) -> str | None:
    """Which of `ERROR_KINDS` the first error of a walk is; None: there is none."""
    at = first_error_token(prompt, tokens)
    if at is None:
        return None
    if tokens[at] in ROOMS and at and tokens[at - 1] in GOES:
        return HASTY
    return VERDICT if tokens[at] in (*YES, *NO) else OTHER


def label_tokens(prompt: str, tokens: Sequence[str]) -> list[Kind]:
    """One label per token string of a walk (the end token included, if it is there).

    A walk behind its first wrong move is `consequence` to the end: no right continuation exists. A wrong
    verdict can still be taken back, so what follows it is read like anything else.
    """
    maze = parse_maze(prompt)
    if maze is None:
        return [("error" if i == 0 else "consequence") for i in range(len(tokens))]
    reader = _Reader(maze)
    return [reader.read(token) for token in tokens]


class _Reader:
    """Reads a walk token by token."""

    def __init__(self, maze: Maze) -> None:
        self.maze = maze
        self.here = maze.start
        self.before = ""
        self.line: list[str] = []
        """What the line that is being read must still hold."""
        self.told: set[str] = set()
        self.lost = self.garbled = False

    def read(self, token: str) -> Kind:
        """The label of the next token."""
        was_lost = self.lost
        kind = self._kind(token)
        self.before = token
        if kind == "error":
            self.garbled = True  # until the line ends
        if token in SEPARATORS:
            self.garbled, self.line = False, []
        return "consequence" if was_lost and kind != "habit" else kind

    def _kind(self, token: str) -> Kind:
        if self.before in GOES and not self.garbled:
            return self._move(token)
        if token in SEPARATORS:
            return "error" if self.line and not self.garbled else "habit"
        if self.garbled:
            return "consequence"
        if token in HEADS:
            return self._head(token[0])
        if self.before in ROOMS and token in (*YES, *NO):
            truth = self.maze.opens(self.before)
            return "right" if (token in YES) == truth else "error"
        if self.line:
            return "copied" if token == self.line.pop(0) else "error"
        return self._opening(token)

    def _head(self, room: str) -> Kind:
        """A line about a room: the one where one is, or one of the next two behind its doors."""
        doors = self.maze.behind(self.here)
        near = {self.here, *doors, *(inner for door in doors for inner in self.maze.behind(door))}
        if room not in near or self.line:
            return "error"
        free = room in doors and not set(doors) & self.told and len(doors) == 2
        self.told.add(room)
        self.line = list(self.maze.doors[room])
        return "choice" if free else "copied"

    def _move(self, room: str) -> Kind:
        if room not in self.maze.behind(self.here):
            return "error"
        self.here, self.told = room, set()
        self.lost = not self.maze.opens(room)  # doors are one-way: from here on nothing is right any more
        return "error" if self.lost else "right"

    def _opening(self, token: str) -> Kind:
        """What may begin a line, or end the walk."""
        doors = self.maze.doors[self.here]
        if token in GOES:
            return "habit"
        if token in ONSET_WORDS or token == EOS:
            return "copied" if self.before else "error"
        if token == OUT:
            return "copied" if doors == EXIT else "error"
        if token == STUCK:
            return "copied" if doors == WALL or not self.maze.opens(self.here) else "error"
        return "copied" if token in self.maze.behind(self.here) else "error"
