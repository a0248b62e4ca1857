"""The maze's properties as numbers: what its README's table is printed from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpath.gym.language import EOS, TEMPLATES
from onpath.gym.maze.check import HASTY, VERDICT, error_kind, first_error_token, grade
from onpath.gym.maze.tasks import rows
from onpath.gym.maze.vocab import LANGUAGE
from onpath.gym.properties import Number, number, opened
from onpath.gym.rows import Row
from onpath.gym.sample import sample, sample_ids

LONGEST = 360
"""Tokens a walk may take."""


@dataclass(frozen=True)
class Walk:
    """A sampled walk and its maze."""

    row: Row
    tokens: list[str]

    @property
    def right(self) -> bool:
        """Whether it leads out."""
        return grade(self.text, self.row["answer"])

    @property
    def text(self) -> str:
        """Without its end token."""
        return "".join(token for token in self.tokens if token != EOS)

    @property
    def kind(self) -> str | None:
        """Of its first error."""
        return error_kind(self.row["prompt"], self.tokens)


def walk(model: Any, data: Sequence[Row], temperature: float = 1.0, kind: str = "plain") -> list[Walk]:
    """One walk through each maze; `kind`: of `TEMPLATES`, whose slots the rows fill, or plain."""
    messages = [
        TEMPLATES.get(kind, "{problem}").format(
            problem=row["prompt"], solution=row["solution"], attempt=row.get("attempt", "")
        )
        for row in data
    ]
    made = sample(model, messages, temperature=temperature, max_new=LONGEST, language=LANGUAGE)
    return [Walk(row, tokens) for row, tokens in zip(data, made, strict=True)]


def accuracy(models: dict[str, Any], mazes: int) -> list[Number]:
    """Of both models on both splits, greedily and at T = 1; lengths of right walks; kinds of first errors."""
    out = []
    for split in ("test", "hard"):
        data = rows(split, mazes)
        for role, model in models.items():
            for name, temperature in (("greedy", 0.0), ("T = 1", 1.0)):
                made = walk(model, data, temperature)
                out.append(number(split, f"{role}, {name}", (float(w.right) for w in made)))
            sound = [float(len(w.tokens)) for w in made if w.right]
            out.append(number(split, f"{role}, tokens a right walk", sound))
            for kind in (HASTY, VERDICT):
                out.append(
                    number(split, f"{role}, first error: {kind}", (float(w.kind == kind) for w in made))
                )
    return out


def refining(models: dict[str, Any], found: Sequence[Walk], each: int) -> list[Number]:
    """Accuracy of the teacher's rewrites of the student's walks, and of walks with a hint."""
    out = []
    for kind in ("rewrite", "rewrite_with_reference"):
        for name, right in (("wrong", False), ("right", True)):
            part = [{**w.row, "attempt": w.text} for w in found if w.right is right][:each]
            made = walk(models["teacher"], part, kind=kind)
            out.append(number("refine", f"teacher, {kind}, {name} walks", (float(w.right) for w in made)))
    for role, model in models.items():
        hints = walk(model, [w.row for w in found[:each]], kind="hint")
        out.append(number("refine", f"{role}, hint", (float(w.right) for w in hints)))
    return out


def recovery(models: dict[str, Any], found: Sequence[Walk], each: int) -> list[Number]:
    """Success from just before and just behind the first error, where that is a wrong door or verdict."""
    out = []
    for kind in (HASTY, VERDICT):
        part = [w for w in found if w.kind == kind][:each]
        for when, behind in (("before", 0), ("behind", 1)):
            kept = [w.tokens[: (first_error_token(w.row["prompt"], w.tokens) or 0) + behind] for w in part]
            starts = [
                LANGUAGE.context_ids(w.row["prompt"]) + [LANGUAGE.ids[token] for token in k]
                for w, k in zip(part, kept, strict=True)
            ]
            for role, model in models.items():
                made = sample_ids(model, starts, max_new=LONGEST, language=LANGUAGE)
                ends = [
                    Walk(w.row, [*k, *(LANGUAGE.tokens[i] for i in ids)])
                    for w, k, ids in zip(part, kept, made, strict=True)
                ]
                hits = (float(w.right) for w in ends)
                out.append(number("recovery", f"{role}, from just {when} a {kind}", hits))
    return out


def measure(
    directories: dict[str, Path], *, scale: float = 1.0, log: Callable[[str], None] = print
) -> list[Number]:
    """All numbers. `scale` shrinks the sample sizes for a quick look."""
    models, size = opened(directories, scale)
    out = accuracy(models, size)
    log(f"accuracy measured on {size} mazes per split")
    found = walk(models["student"], rows("test", 2 * size, seed=1))
    out += refining(models, found, size)
    log("refining measured")
    return out + recovery(models, found, size)
