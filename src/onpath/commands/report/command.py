"""`onpath report`: one self-contained page of a run or a study; docs/report.md says what is on it."""

import argparse
from pathlib import Path

from onpath.commands.report.page import page
from onpath.commands.report.run import gather_run
from onpath.commands.report.study import gather_study
from onpath.system.errors import UserError
from onpath.system.files import write_text

__all__ = ["run_report", "write_report"]


def run_report(options: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    path = write_report(Path(options.directory), Path(options.out) if options.out else None)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def write_report(directory: Path, out: Path | None = None) -> Path:
    """One HTML file (default: `directory/report.html`); returns its path.

    Raises:
        UserError: neither a run nor a study, a damaged file in it, or a target that cannot be written.
    """
    if (directory / "study.json").is_file():
        data = gather_study(directory)
    elif (directory / "config.yaml").is_file():
        data = gather_run(directory)
    else:
        raise UserError(f"{directory}: neither a run (no config.yaml) nor a study (no study.json)")
    path = out or directory / "report.html"
    if not path.parent.is_dir():  # a mistyped path, more likely than a wish for a new directory
        raise UserError(f"{path}: there is no directory {path.parent}")
    write_text(path, page(data))
    return path
