"""`onpath inspect`: stored trajectories on a terminal or as JSON lines."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from onpath.errors import UserError
from onpath.show import coloured, legend
from onpath.store import read_trajectories


def run_inspect(options: argparse.Namespace) -> int:
    """Prints the trajectories that the options ask for."""
    rows = select(options)
    if options.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    console = Console(file=sys.stdout)
    console.print(legend(console, options.colour))
    for row in rows:
        show_row(console, row, options.colour)
    return 0


def select(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Stored rows after the filters.

    Raises:
        UserError: no such run, nothing stored, no such step or column.
    """
    directory = Path(options.directory)
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: not a run directory (it has no config.yaml)")
    rows = read_trajectories(directory)
    if not rows:
        raise UserError(f"{directory}: no stored trajectories; train with run.trajectories_every above 0")
    steps = sorted({r["step"] for r in rows})
    step = steps[-1] if options.step is None else options.step
    if step not in steps:
        raise UserError(f"--step {step} is not stored; there are {', '.join(map(str, steps))}")
    numeric = sorted(k for k, v in rows[0].items() if isinstance(v, list) and v and isinstance(v[0], float))
    if options.colour not in numeric:
        raise UserError(
            f"--colour {options.colour}: no such per-token column; there are {', '.join(numeric)}"
        )
    return [r for r in rows if r["step"] == step and _matches(r, options.only)][: options.limit]


def _matches(row: dict[str, Any], only: str | None) -> bool:
    match only:
        case "right":
            return row["correct"] is True
        case "wrong":
            return row["correct"] is False
        case "edited":
            return bool(row["edit"] != "none")
        case "forks":
            return bool(json.loads(row["detail"]).get("forks"))
        case _:
            return True


def show_row(console: Console, row: dict[str, Any], quantity: str) -> None:
    """One trajectory: problem, verdict, edit, tokens."""
    colour = console.color_system is not None
    verdict = {True: "right", False: "wrong", None: "not graded"}[row["correct"]]
    console.print()
    console.print(Text(str(row["prompt"]), style="bold"), Text(f"   answer {row['answer']}", style="dim"))
    head = f"step {row['step']}  {row['prompt_id']}  {verdict}  {row['finish_reason']}  edit {row['edit']}"
    console.print(Text(f"{head} {row['reason']}".rstrip(), style="dim"))
    values = row[quantity]
    if values is None:  # recorded only: not scored
        console.print(Text(row["response_text"]), soft_wrap=True)
    else:
        console.print(coloured(row["tokens"], values, colour=colour), soft_wrap=True)
    if row["edit"] != "none" and row["origin_text"] != row["response_text"]:
        console.print(Text(f"was: {row['origin_text']}", style="dim"), soft_wrap=True)
