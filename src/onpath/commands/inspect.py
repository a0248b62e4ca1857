"""`onpath inspect`: stored trajectories on a terminal or as JSON lines."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from onpath.commands.report.text import cell, known_tokens, sides, was_changed
from onpath.commands.terminal import coloured, console_for, forks, legend, rewritten
from onpath.run.trajectories import Row, quantities, read_rows, step_of, trajectory_files
from onpath.system.errors import UserError

VERDICTS = {True: "right", False: "wrong", None: "not graded"}
_MATCHES: dict[str | None, Callable[[Row], bool]] = {
    "right": lambda row: row["correct"] is True,
    "wrong": lambda row: row["correct"] is False,
    "repaired": lambda row: cell(row) == "wrong_to_right",
    "harmed": lambda row: cell(row) == "right_to_wrong",
    "edited": lambda row: row["edit"] != "none",
    "dropped": lambda row: not row["kept"],
    "forks": lambda row: any(f["decision"] == "fork" for f in row["detail"].get("forks") or ()),
    None: lambda row: True,
}
_SORT_KEYS: dict[str, Callable[[Row], float]] = {
    "kl": lambda row: -max(row.get("reverse_kl") or [0.0]),
    "length": lambda row: -len(row["response"]),
}


def run_inspect(options: argparse.Namespace) -> int:
    """Prints the trajectories that the options ask for."""
    stored = stored_rows(options)
    rows = select(stored, options)
    if options.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    console = console_for(sys.stdout)
    if not rows:
        console.print("no stored trajectory matches", highlight=False)
        return 0
    colour = options.colour or default_colour(rows)
    console.print(legend(console, colour))
    known = known_tokens(stored)
    for row in rows:
        show_row(console, row, colour, known)
    return 0


def default_colour(rows: Sequence[Row]) -> str:
    """reverse_kl where it was measured, else the first quantity that was."""
    names = sorted({name for row in rows for name in quantities(row)})
    return "reverse_kl" if "reverse_kl" in names or not names else names[0]


def stored_rows(options: argparse.Namespace) -> list[Row]:
    """All rows of the step that is asked for.

    Raises:
        UserError: no such run, nothing stored, no such step, or a damaged file.
    """
    directory = Path(options.directory)
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: not a run directory (it has no config.yaml)")
    files = {step_of(path): path for path in trajectory_files(directory)}
    if not files:
        raise UserError(f"{directory}: no stored trajectories; train with run.trajectories_every above 0")
    step = max(files) if options.step is None else options.step
    if step not in files:
        raise UserError(f"--step {step} is not stored; there are {', '.join(map(str, files))}")
    return list(read_rows(files[step], contexts=True))


def select(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """Rows after the filters, in the order asked for, as many as asked for.

    Raises:
        UserError: no such per-token column or prompt.
    """
    names = sorted({name for row in rows for name in quantities(row)})
    if names and options.colour not in (None, *names):
        raise UserError(f"--colour {options.colour}: no such per-token column; there are {', '.join(names)}")
    if options.id is not None and all(row["prompt_id"] != options.id for row in rows):
        raise UserError(
            f"--id {options.id}: no such prompt at this step; the first one is {rows[0]['prompt_id']!r}"
        )
    if options.limit < 1:
        raise UserError(f"--limit is {options.limit}; ask for 1 or more")
    matching = [r for r in rows if _MATCHES[options.only](r) and options.id in (None, r["prompt_id"])]
    if options.sort != "stored":
        matching.sort(key=_SORT_KEYS[options.sort])
    return matching[: options.limit]


def show_row(console: Console, row: Row, quantity: str, known: dict[int, str]) -> None:
    """One trajectory: problem, verdict, edit, tokens, what was changed, forks with both futures."""
    colour = console.color_system is not None
    console.print()
    console.print(Text(str(row["prompt"]), style="bold"), Text(f"   answer {row['answer']}", style="dim"))
    console.print(Text("  ".join(facts(row)), style="dim"))
    values = row.get(quantity)
    if values is None:  # recorded only: not scored
        say(console, [Text(row["response_text"])])
    else:
        say(console, [coloured(row["tokens"], values, colour=colour)])
    if was_changed(row):
        say(console, rewritten(*sides(row, known), colour=colour))
    say(console, forks(row["detail"].get("forks") or (), colour=colour))


def facts(row: Row) -> list[str]:
    """What stands above the tokens."""
    verdict = cell(row).replace("_to_", " → ") if was_changed(row) else VERDICTS[row["correct"]]
    edit = f"edit {row['edit']} {row['reason']}".rstrip()
    return [f"step {row['step']}", str(row["prompt_id"]), verdict, str(row["finish_reason"]), edit]


def say(console: Console, lines: Iterable[Text]) -> None:
    """Text as it is: no markup, no wrapping of ours."""
    for line in lines:
        console.print(line, soft_wrap=True)
