"""Dose against response: one study per level of a strength (`x`), each of them an ordinary study.

    x: {name: late, levels: [0, 0.5, 1]}                    in a study's YAML, and wherever it says {x}
    base: {data: {train: "gym:train?late={x}&spoil=0.8"}}   the level stands in each level's study

<dir>/<name>/<x>-<level>/     a study per level, resumed like any other
<dir>/<name>/doses.json       all levels, as gathered when the command ended last
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from onpath.commands.study.command import NothingFinished, StudyResult, carry_out, check
from onpath.commands.study.config import StudyConfig, read_study, study_of, text
from onpath.commands.study.tables import Sheet, measured
from onpath.config.section import Section
from onpath.system.errors import UserError
from onpath.system.files import place, write_text
from onpath.system.reading import read_json

MARK = "{x}"


class Axis(Section):
    """What is varied."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    """For tables, pictures and directories."""
    levels: list[float] = Field(min_length=2)
    """Its values, each a study of its own."""

    @field_validator("levels")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        if sorted(set(value)) != value:
            raise ValueError(f"levels must ascend, each once, not {value}")
        return value


@dataclass(frozen=True, kw_only=True)
class Doses:
    """A study at several levels."""

    name: str
    directory: Path
    axis: Axis
    studies: Mapping[float, StudyConfig]


def load_doses(path: str | Path) -> Doses | None:
    """Reads a study's YAML; None: it has no `x`, and is one study.

    Raises:
        UserError: a wrong `x`, or whatever is wrong at one of its levels.
    """
    path = place(path)
    tree, name = read_study(path)
    if "x" not in tree:
        return None
    try:
        axis = Axis.model_validate(tree.pop("x"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("x", *first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    if unquoted := _unquoted(tree):
        raise UserError(f"{path}: {unquoted} is {MARK} without quotes, a mapping in YAML: write '{MARK}'")
    if MARK not in json.dumps(tree, default=str):
        raise UserError(f"{path}: x is {axis.name}, but nothing says {MARK}: put it where the level belongs")
    directory = place(text(tree.pop("dir", "studies"), path, "dir"), key="dir") / name
    studies = {
        level: study_of(
            {**_with_level(tree, level), "dir": str(directory), "name": f"{axis.name}-{level_text(level)}"},
            path,
        )
        for level in axis.levels
    }
    return Doses(name=name, directory=directory, axis=axis, studies=studies)


def _unquoted(tree: Any, key: str = "") -> str:
    """Where a mark stands without quotes; empty: nowhere."""
    if tree == {"x": None}:
        return key
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    found = (_unquoted(value, f"{key}.{name}" if key else str(name)) for name, value in pairs)
    return next(filter(None, found), "")


def _with_level(tree: Any, level: float) -> Any:
    """The tree with the level in place of each mark; a text that is nothing else becomes a number."""
    if isinstance(tree, Mapping):
        return {key: _with_level(value, level) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_level(value, level) for value in tree]
    if not isinstance(tree, str):
        return tree
    if tree != MARK:
        return tree.replace(MARK, level_text(level))
    return int(level) if level.is_integer() else level  # seeds: 2


def level_text(level: float) -> str:
    """A level as one writes it, and no other number.

    >>> level_text(0.5), level_text(1.0), level_text(1_000_000.0), level_text(0.12345678)
    ('0.5', '1', '1000000', '0.12345678')
    """
    return f"{level:.0f}" if level == int(level) and abs(level) < 1e15 else repr(level)


def carry_out_doses(doses: Doses, *, command: str, quiet: bool = False) -> StudyResult:
    """Runs what is left of every level, in order, and gathers all after each: a command that was stopped
    leaves what is there.

    Raises:
        UserError: a level that cannot run, before any of them does.
    """
    for study in doses.studies.values():
        check(study)
    failed: dict[str, str] = {}
    data: dict[str, Any] = {}
    for level, study in doses.studies.items():
        try:
            found = carry_out(study, command=command, quiet=quiet)
        except NothingFinished as error:  # the other levels may yet
            failed[f"{doses.axis.name} {level:g}"] = str(error)
            continue
        failed |= {f"{doses.axis.name} {level:g}, {name}": why for name, why in found.failed.items()}
        data = gather_doses(doses, command=command)
        write_text(doses.directory / "doses.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    result = StudyResult(directory=doses.directory, data=data, failed=failed)
    if not data:
        raise NothingFinished(result.why())
    return result


def gather_doses(doses: Doses, *, command: str) -> dict[str, Any]:
    """doses.json: the levels that have results, with their arms."""
    levels = []
    for level, study in doses.studies.items():
        path = study.directory / "study.json"
        if path.is_file():
            found = read_json(path)
            held = {key: found[key] for key in ("study", "arms", "notes", "environment")}
            levels.append({"x": level, "directory": study.name, **held})
    return {"name": doses.name, "x": doses.axis.name, "command": command, "levels": levels}


def dose_sheets(data: Mapping[str, Any]) -> list[Sheet]:
    """A table per evaluation set: arms by levels, means and paired differences from the base arm."""
    levels = data["levels"]
    splits = dict.fromkeys(split for level in levels for split in level["study"]["splits"])
    return [_sheet(data, split) for split in splits]


def _sheet(data: Mapping[str, Any], split: str) -> Sheet:
    levels = [level for level in data["levels"] if split in level["study"]["splits"]]
    about = levels[0]["study"]
    samples, problems = (counted(data, key, split) for key in ("samples", "problems"))
    arms = dict.fromkeys(arm["arm"] for level in levels for arm in level["arms"])
    rows = []
    for name in arms:
        for level in levels:
            arm = next((a for a in level["arms"] if a["arm"] == name), None)
            if arm is not None:
                cells = measured(arm["evals"][split]["avg_at_k"])
                rows.append((f"{name}, {data['x']} {level['x']:g}", str(len(arm["seeds"]) or "-"), *cells))
    name = f"avg@{samples}"
    return Sheet(
        title=f"{split}: {problems} problems, by {data['x']}",
        columns=(f"arm, {data['x']}", "seeds", name, "95%", f"− {about['base_arm']}", "95%", ""),
        rows=tuple(rows),
    )


def counted(data: Mapping[str, Any], key: str, split: str) -> str:
    """Samples or problems of a set, which may depend on the level."""
    found = sorted({level["study"][key][split] for level in data["levels"] if split in level["study"][key]})
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
