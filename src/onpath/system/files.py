"""Files and directories that are there whole or not at all: written beside their place, then renamed."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onpath.system.errors import UserError
from onpath.system.text import one_line

_UMASK = os.umask(0o077)
os.umask(_UMASK)
"""Read once: it belongs to the whole process, and a checkpoint is written by a thread of its own."""

_MARK = ".tmp-"
_BEFORE = ".before"
"""Ends the name of a directory that makes room for its successor: a process killed right then leaves it."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
"""What space would cure; a library's own exception has no number."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes; of all common file systems."""


def place(name: str | Path, *, key: str = "") -> Path:
    """A path as somebody typed it, with ~ written out.

    Args:
        key: names the option in errors.

    Raises:
        UserError: nothing can lie there: it is empty, too long, holds a NUL or half a character, or is the
            home of nobody; or it is no path at all.
    """
    text, of = str(name), f"{key}: " if key else ""
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"{of}{one_line(repr(name), 60)} is no path, but {type(name).__name__}")
    if not text:  # an unset variable of a shell; Path makes it the working directory
        raise UserError(f"{of}'' is no path: it is empty (. is the working directory)")
    try:
        data, path = os.fsencode(text), Path(text).expanduser()
    except UnicodeEncodeError:
        raise UserError(f"{of}{one_line(text)} is no path: it holds half a character") from None
    except RuntimeError:
        raise UserError(f"{of}{one_line(text)} is no path: there is no such user") from None
    if b"\0" in data:
        raise UserError(f"{of}{one_line(text)} is no path: it holds a NUL")
    if len(data) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in data.split(b"/")):
        raise UserError(f"{of}{one_line(text, 80)} is no path: it is too long")
    return path


@contextmanager
def written(
    path: Path,
    *,
    what: str = "",
    sync: bool = False,
    also: tuple[type[Exception], ...] = (),
    by: str = "",
) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what the block writes there, a file or a directory, takes the
    place of `path` when the block ends. Whatever happens, nothing half-written stays, and what was there
    before stays until the new one is whole. Directories on the way are made.

    Args:
        what: is written, for the sentence; empty: the path says it.
        sync: also after a loss of power (fsync).
        also: exceptions beside OSError that mean a disk cannot be written.
        by: for `half_written`, where several processes write it; empty: this one alone.

    Raises:
        UserError: it cannot be written.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path} is a directory; name what is to be written there")
    temporary = half_written(path, by or str(os.getpid()))
    failures: tuple[type[Exception], ...] = (OSError, *also)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of a killed process that had this number
        yield temporary
        _readable(temporary)
        if sync:
            _sync(temporary)
        _take_place(temporary, path)
        if sync:
            sync_file(path.parent)
    except failures as error:
        raise unwritable(path, error, what=what) from None
    finally:
        with suppress(OSError):
            _remove(temporary)


def half_written(path: Path, by: str) -> Path:
    """Where something is until it is whole."""
    return path.with_name(f".{path.name}{_MARK}{by}")


def _take_place(new: Path, path: Path) -> None:
    """A directory takes no other's place: that one makes room, and comes back if the new one fails."""
    if not (new.is_dir() and path.is_dir()):
        os.replace(new, path)
        return
    before = path.with_name(f".{path.name}{_BEFORE}")
    os.replace(path, before)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(before, path)
        raise
    _remove(before)


def _readable(path: Path) -> None:
    """For whom the umask lets read them: safetensors makes files for their owner alone, and servers of other
    users read weights too."""
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if file.is_file() and file.stat().st_mode & 0o077 == 0:
            file.chmod(0o666 & ~_UMASK)


def write_text(path: Path, text: str) -> None:
    """A whole file of UTF-8, or what was there before.

    Raises:
        UserError: it cannot be written.
    """
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_directory(path: Path) -> None:
    """Before hours of work: the directory that their result goes to.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def lock(directory: Path) -> int:
    """A descriptor that keeps every other process out of a directory until it is closed, or the process ends.

    Raises:
        UserError: another process has it, or it cannot be written.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise unwritable(directory, error) from None
    if not try_lock(descriptor):
        os.close(descriptor)
        raise UserError(
            f"{directory}: another process is at work on this run; wait until it has ended, or choose "
            "another run.name"
        )
    return descriptor


def try_lock(descriptor: int) -> bool:
    """Locks an open file or directory until it is closed; False: another process holds it. On a file system
    without locks nobody is kept out, and that is no reason not to work there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def unwritable(path: Path, error: Exception, *, what: str = "") -> UserError:
    """The sentence for a disk that is full or not ours to write on."""
    if isinstance(error, shutil.Error):  # one reason for each file of a tree, as text with its number
        error = OSError(re.sub(r"^\[Errno \d+\] ([^:]*).*", r"\1", str(error.args[0][0][-1])))
    reason = str(getattr(error, "strerror", None) or error).split("\n")[0]
    deed = f"cannot write {what}" if what else "cannot write"
    if getattr(error, "errno", None) not in _FULL:
        return UserError(f"{path}: {deed}: {reason}; choose another place, or make this one writable")
    return UserError(f"{path}: {deed}: {reason}; free some space and start the same command again")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends to a file of lines, behind the end of one that a killed writer left half-written. Directories
    on the way are made.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            torn = file.tell() > 0
            if torn:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write(("\n" if torn else "").encode() + "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise unwritable(path, error) from None


def remove_leftovers(directory: Path) -> None:
    """Removes what killed writers left in a directory and those below it, and puts back what they had not yet
    replaced. Nobody else may be writing there.

    Raises:
        UserError: it cannot be removed.
    """
    for path in [*directory.rglob(f".*{_MARK}*"), *directory.rglob(f".*{_BEFORE}")]:
        whole = path.with_name(path.name.removeprefix(".").removesuffix(_BEFORE))
        try:
            if path.name.endswith(_BEFORE) and not whole.exists():
                os.replace(path, whole)
            else:
                _remove(path)
        except OSError as error:
            raise unwritable(path, error) from None


def remove_all_but(path: Path) -> None:
    """Removes what lies beside a file or directory.

    Raises:
        UserError: it cannot be removed.
    """
    for other in path.parent.iterdir():
        if other != path:
            try:
                _remove(other)
            except OSError as error:
                raise unwritable(other, error) from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for inner in sorted(path.rglob("*")) if path.is_dir() else ():
        sync_file(inner)
    sync_file(path)


def sync_file(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
