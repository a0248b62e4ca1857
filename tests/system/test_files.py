"""Whole or not at all: on a full disk, on one that is not ours, and when the writer is killed."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onpath.commands.study.jobs import locked as lock_of_a_study
from onpath.system import files
from onpath.system.errors import UserError
from onpath.system.files import (
    append_lines,
    lock,
    make_directory,
    remove_leftovers,
    unwritable,
    write_text,
    written,
)


@contextmanager
def lock_of_a_run(directory: Path) -> Iterator[int]:
    descriptor = lock(directory)
    yield descriptor
    os.close(descriptor)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_file_takes_its_place_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with written(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"
    write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert names(path.parent) == ["a.txt"]


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with written(target, sync=True) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / content).write_text(content)
    assert names(target) == ["inner", "new"]
    assert names(tmp_path) == ["model"]


def test_a_directory_that_cannot_take_its_place_leaves_the_other_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    write_text(tmp_path / "model" / "old", "")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if (source / "new").exists():
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    denied = pytest.raises(UserError, match="model: cannot write: Permission denied")
    with denied, written(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


@pytest.mark.parametrize("error", [KeyError("a fault of ours"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_fails_leaves_what_was_there(kind: str, error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")

    def fail() -> None:
        with written(path) as temporary:
            temporary.mkdir() if kind == "directory" else temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_no_space_is_one_sentence(tmp_path: Path) -> None:
    def fail(error: Exception, **options: object) -> None:
        with written(tmp_path / "a.txt", **options) as temporary:  # type: ignore[arg-type]
            temporary.write_text("half")
            raise error

    advice = "free some space and start the same command again"
    with pytest.raises(UserError) as raised:
        fail(OSError(28, "No space left on device"))
    assert str(raised.value) == f"{tmp_path}/a.txt: cannot write: No space left on device; {advice}"
    with pytest.raises(UserError) as raised:
        fail(LookupError("I/O error: 28\nand more"), what="the weights", also=(LookupError,))
    assert str(raised.value) == f"{tmp_path}/a.txt: cannot write the weights: I/O error: 28; {advice}"
    with pytest.raises(LookupError):
        fail(LookupError("not named, so a fault of ours"))
    assert names(tmp_path) == []


def test_what_no_space_cures_is_said_otherwise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write: .*; choose another place, or make this one writable$"
    ):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "taken"):
        with pytest.raises(UserError, match=rf"{path}: cannot write"):
            write_text(path, "x")
    with pytest.raises(UserError, match="file: cannot write"):
        make_directory(tmp_path / "file")
    assert names(tmp_path) == ["file", "taken"]
    assert names(tmp_path / "taken") == []


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("mount") is None, reason="no mount")
def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mount is not permitted")
    try:
        write_text(disk / "a.txt", "before")
        with pytest.raises(UserError, match=r"a\.txt: cannot write: No space left on device"):
            write_text(disk / "a.txt", "x" * 1_000_000)
        assert (disk / "a.txt").read_text() == "before"
        assert names(disk) == ["a.txt"]
    finally:
        subprocess.run(["umount", disk], check=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from onpath.system.files import written
with written(Path(sys.argv[1])) as temporary:
    if sys.argv[2] == "directory":
        temporary.mkdir()
    (temporary / "inner" if sys.argv[2] == "directory" else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_writer_leaves_the_old_and_something_to_remove(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    write_text(path, "before")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "before"
    assert len(names(path.parent)) == 2, "it must have been killed with half of it written"
    remove_leftovers(tmp_path)
    assert names(path.parent) == ["a"]


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = [".lock", ".hidden.tmp", "a.tmp-1", "step_1/.x"]
    for name in (*kept, f".a.txt.tmp-{os.getpid()}"):
        write_text(tmp_path / name, "x")
    remove_leftovers(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors alone makes files for their owner."""
    monkeypatch.setattr(files, "_UMASK", 0o027)
    with written(tmp_path / "model") as temporary:
        temporary.mkdir()
        save_file({"w": torch.zeros(2)}, temporary / "model.safetensors")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_writing_leaves_the_umask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that another thread makes meanwhile would be anybody's to write."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"umask({mask:o})"))
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~files._UMASK


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_what_has_no_name_is_not_written(name: str) -> None:
    with pytest.raises(UserError, match="is a directory; name what is to be written there"):
        write_text(Path(name), "a")


@pytest.mark.parametrize(("number", "cure"), [(2, "choose another place"), (28, "free some space")])
def test_space_is_asked_for_where_it_lacks(number: int, cure: str) -> None:
    assert cure in str(unwritable(Path("a"), OSError(number, "Why")))


@pytest.mark.parametrize(
    ("there", "left"), [(None, "c\n"), ("", "c\n"), ("a\n", "a\nc\n"), ("a\nb", "a\nb\nc\n")]
)
def test_a_line_is_not_glued_to_one_that_a_killed_writer_left(
    there: str | None, left: str, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "lines.jsonl"
    if there is not None:
        path.parent.mkdir()
        path.write_text(there)
    append_lines(path, ["c"])
    append_lines(path, [])
    assert path.read_text() == left


def test_what_cannot_be_appended_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        append_lines(tmp_path, ["c"])


@pytest.mark.parametrize("taken", [lock_of_a_run, lock_of_a_study])
def test_a_file_system_without_locks_keeps_nobody_out(
    taken: Callable[[Path], AbstractContextManager[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taken(tmp_path), pytest.raises(UserError, match="is at work"), taken(tmp_path):
        pass

    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with taken(tmp_path), taken(tmp_path):
        pass
