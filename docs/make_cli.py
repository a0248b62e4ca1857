"""Writes docs/cli.md from every subcommand's `--help`; `--check` fails if the file is out of date."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"

from onpath.commands.cli import main, make_parser

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# The command line

Made from `--help` by `make docs`; `make check` fails if it is out of date. Exit codes: 0 done, 2 something
that you can fix (one sentence says what), 1 a fault of onpath's (doctor: a check failed), 130 interrupted.
The options of a config, which `train`, `doctor` and `config` take, stand at the [end](#options-of-a-config).
"""


def said_by(*arguments: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(arguments)
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.M).strip()


def page() -> str:
    """The whole page."""
    parser = make_parser()
    commands = next(a for a in parser._actions if hasattr(a, "choices") and a.choices)
    parts = [INTRODUCTION, f"```\n{said_by('--help')}\n```\n"]
    for name in commands.choices:  # type: ignore[union-attr]
        parts.append(f"## onpath {name}\n\n```\n{said_by(name, '--help')}\n```\n")
        for sub in ("tasks", "train", "measure") if name == "gym" else ():
            parts.append(f"### onpath gym {sub}\n\n```\n{said_by('gym', sub, '--help')}\n```\n")
    parts.append(f"## Options of a config\n\n```\n{said_by('config', '--options')}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("docs/cli.md is out of date with --help: run make docs")
    else:
        PAGE.write_text(text)
