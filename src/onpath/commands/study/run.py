"""A study's YAML, run: one study, or one per level of a strength."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from onpath.commands.study.command import StudyResult, carry_out, load_study
from onpath.commands.study.doses import carry_out_doses, dose_sheets, load_doses
from onpath.commands.study.tables import print_sheet, print_study
from onpath.system import code


def run_study(path: str | Path, *, allow_code: bool = False, quiet: bool = False) -> StudyResult:
    """Runs what is left of a study and writes its results.

    Args:
        path: the study's YAML.
        allow_code: run the Python files that it names.
        quiet: no progress; the files are written all the same.

    Raises:
        UserError: something that the user can fix. Where only some runs failed, the results of the others are
            written first.
    """
    code.not_while_loading("onpath.run_study")
    with code.allowed(allow_code):
        found = from_yaml(path, quiet=quiet)
    found.check()
    return found


def from_yaml(path: str | Path, *, quiet: bool = False) -> StudyResult:
    """What is left of the study, or of the study per level, that a YAML asks for."""
    command = f"onpath study {path}{code.flag()}"
    doses = load_doses(path)
    if doses is not None:
        return carry_out_doses(doses, command=command, quiet=quiet)
    return carry_out(load_study(path), command=command, quiet=quiet)


def print_found(console: Console, data: Mapping[str, Any]) -> None:
    """Tables, sentences and notes on a terminal."""
    if "levels" not in data:
        print_study(console, data)
        return
    for sheet in dose_sheets(data):
        print_sheet(console, sheet)
