"""`onpath cache`: a directory of kept teacher scores (`teacher.cache`), looked at and made smaller."""

from dataclasses import replace
from pathlib import Path

from onpath.engines.score_cache import Usage, prune, usage
from onpath.system.errors import UserError
from onpath.system.files import place


def kept_scores(directory: str | Path, *, keep_gb: float | None = None) -> Usage:
    """What a directory of scores holds, after it was made smaller if that is asked.

    Args:
        keep_gb: bytes ÷ 10⁹ that may stay: files used longest ago go first, damaged ones always; None removes
            nothing.

    Raises:
        UserError: there is no such directory, it holds other things and no scores, or `keep_gb` is below 0.
    """
    path = place(directory)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; it is what teacher.cache names")
    found = usage(path)
    if not found.files and any(path.iterdir()):
        raise UserError(f"{path}: no scores are kept there, but other files; name what teacher.cache names")
    if keep_gb is None:
        return found
    if not keep_gb >= 0:
        raise UserError(f"--keep-gb is {keep_gb:g}; it must be 0 or more")
    removed = prune(path, most=keep_gb * 1e9, damaged=True)
    return replace(usage(path), removed=removed)
