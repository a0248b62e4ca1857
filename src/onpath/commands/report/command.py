"""`onpath report`: one self-contained page of a run or a study; docs/report.md says what is on it."""

from contextlib import suppress
from pathlib import Path

from onpath.commands.report.doses import draw_doses, gather_doses
from onpath.commands.report.page import page
from onpath.commands.report.run import gather_run
from onpath.commands.report.study import gather_study
from onpath.system import code, reading
from onpath.system.errors import UserError
from onpath.system.files import place, write_text

_BEGINS = b"<!doctype html"


def write_report(directory: str | Path, out: str | Path | None = None) -> Path:
    """Writes one HTML page with curves, comparisons and trajectories; it loads nothing.

    Args:
        directory: of a run or of a study; one by levels also gets the picture `doses.png`.
        out: the page; None: `directory/report.html`.

    Returns:
        The page's path.

    Raises:
        UserError: neither a run nor a study, a damaged file in it, or a target that cannot be written.
    """
    code.not_while_loading("onpath.write_report")
    directory = place(directory)
    if (directory / "doses.json").is_file():
        data = reading.safely(lambda: gather_doses(directory), where=str(directory))
        reading.safely(lambda: draw_doses(directory), where=str(directory))
    elif (directory / "study.json").is_file():
        data = reading.safely(lambda: gather_study(directory), where=str(directory))
    elif (directory / "config.yaml").is_file():
        data = reading.safely(lambda: gather_run(directory), where=str(directory))
    else:
        raise UserError(
            f"{directory}: neither a run (no config.yaml) nor a study (no study.json, no doses.json)"
        )
    path = directory / "report.html" if out is None else place(out, key="--out")
    if not path.parent.is_dir():  # a mistyped path, more likely than a wish for a new directory
        raise UserError(f"{path}: there is no directory {path.parent}")
    with suppress(FileNotFoundError), path.open("rb") as there:
        if not there.read(len(_BEGINS)).lower().startswith(_BEGINS):
            raise UserError(f"{path} is there, and is no page of onpath's; name another file with --out")
    write_text(path, page(data))
    return path
