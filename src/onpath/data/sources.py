"""Rows of a source, whatever its form: files, `datasets`, tasks, packs, own code. No torch."""

import csv
import difflib
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from onpath.data.packs import pack_of, pack_rows
from onpath.data.rows import COLUMNS, kind_of
from onpath.data.tasks import Task, modules_of, task_names, task_of, task_rows
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.reading import OF_CONTENT, parse_json, read_bytes
from onpath.system.text import first_line, one_line

_LONGEST_LINE = 64 * 2**20
"""Bytes of a line: a few bytes of gzip can stand for billions."""
_LONGEST_ARRAY = 2**30
"""Bytes of a file that is read whole."""
_ROWS_AT_ONCE = 256
"""Of a Parquet file, in which a few bytes can be one long text many times over."""
_QUOTED = re.compile(r'(?:^|(?<=[,\r\n]))"(?:[^"]|"")*+(?P<end>"(?=[,\r\n]|\Z))?')
"""A cell of CSV; without an end it is not whole."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_JSONL_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
_SOURCES = (
    "a .jsonl, .jsonl.gz, .json, .csv or .parquet file, a directory saved by datasets, a datasets "
    "name[:split], gym:<split>, pack:<name>, or a function of yours, file.py:name"
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.%\[\]:-]+)?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row, as it was found."""

    where: str
    """File and line, or source and row, for error messages."""
    value: Any
    """bytes are a line of JSON, still to be decoded."""
    wrong: str = ""
    """Why it is no row at all."""


def rows_of(
    source: str, limit: int | None, split_default: str, theirs: Mapping[str, str], key: str = ""
) -> Iterator[Row]:
    """Chooses the reader by the form of the source; `key` is what names one that is not there."""
    if code.is_own(source):
        return _own_rows(source)
    if pack_of(source):
        return _numbered(source, pack_rows(source, limit))
    task = task_of(source)
    if task is not None:
        return _numbered(source, _of_task(task, source, limit))
    path = place(source)
    base, _, split = source.rpartition(":")
    if path.is_file():
        return _file_rows(path, theirs)
    if path.is_dir():
        return _saved_rows(path, None, split_default, theirs)
    if base and (saved := place(base)).is_dir():
        return _saved_rows(saved, split, split_default, theirs)
    file_like = _plain(path).suffix in (*_JSONL_SUFFIXES, ".json", ".csv", ".parquet")
    looks_like_path = file_like or source.startswith(("/", "./", "../", "~"))
    if looks_like_path or not _HUB_NAME.fullmatch(source):
        named = f"{key}: {source!r}" if key else repr(source)
        where = "" if path.is_absolute() and source.startswith(("/", "~")) else f" in {Path.cwd()}"
        raise UserError(f"{named}: no such file or directory{where}; a source is {_SOURCES}")
    name, _, split = source.partition(":")  # a slice of a split has colons too: name:test[:100]
    return _hub_rows(name, split or split_default, theirs)


def _own_rows(source: str) -> Iterator[Row]:
    given = code.load(source, key="data")
    with _named(source, given):
        rows = given() if callable(given) else given
    if not isinstance(rows, Iterable) or isinstance(rows, str | Mapping):
        raise UserError(f"{source}: must give rows, mappings with a key 'prompt', not {kind_of(rows)}")
    return _numbered(source, _own(source, rows, given))


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield Row(where=f"{source}, row {number}", value=row)


def _own(source: str, rows: Iterable[Any], given: Any) -> Iterator[Any]:
    with _named(source, given):
        yield from rows


@contextmanager
def _named(source: str, given: Any) -> Iterator[None]:
    """What somebody's own rows raise is their fault, and says so."""
    try:
        yield
    except UserError:
        raise
    except code.FAILURES as error:
        raise code.failure(source, error, code.modules_of(given)) from error


def _of_task(task: Task, source: str, limit: int | None) -> Iterator[Mapping[str, Any]]:
    with code.blamed(source, modules_of(task)):
        yield from task_rows(task, source, limit)


def _file_rows(path: Path, theirs: Mapping[str, str]) -> Iterator[Row]:
    if _plain(path).suffix in _JSONL_SUFFIXES:
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, theirs)
    if path.suffix == ".json":
        return _json_rows(path)
    if path.suffix == ".csv":
        return _csv_rows(path, theirs)
    raise UserError(f"{path}: unknown file type {path.suffix!r}; a source is {_SOURCES}")


def _plain(path: Path) -> Path:
    """The name without a compression's."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = iter(partial(file.readline, _LONGEST_LINE + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > _LONGEST_LINE:
                    most = _LONGEST_LINE // 2**20
                    raise UserError(f"{path}, line {number}: longer than {most} MiB, which no problem is")
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield Row(where=f"{path}, line {number}", value=text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no gzip file: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    """An array of rows; or JSON lines under another name."""
    data = read_bytes(path, most=_LONGEST_ARRAY).removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] != b"[":
        yield from _jsonl_rows(path)
        return
    try:
        rows = parse_json(data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    yield from _numbered(str(path), rows)


def _csv_rows(path: Path, theirs: Mapping[str, str]) -> Iterator[Row]:
    """Below a line of names; an empty cell is none. A row is named by the line that it ends in."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_LINE))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _Lines(path, file)
            named = next(lines.rows(), [])
            names = [name if name in theirs.values() else name.strip() for name in named]
            _usable_columns(str(path), names, theirs)
            for cells in lines.rows():
                more = len(cells) > len(names)
                yield Row(
                    where=f"{path}, line {lines.number}",
                    value={name: cell or None for name, cell in zip_longest(names, cells[: len(names)])},
                    wrong="more cells than the first line names; quote what holds commas" if more else "",
                )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a readable CSV file in UTF-8: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class _Lines:
    """Of a CSV file, one after the other."""

    def __init__(self, path: Path, file: Iterable[str]) -> None:
        self.path, self.number = path, 0
        self._file = iter(file)
        self._of_row: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        self._of_row.append(line)
        return line

    def rows(self) -> Iterator[list[str]]:
        """Cells of each row that is left; a quoted cell may go over several lines.

        Raises:
            UserError: one has no end, or goes on behind it.
        """
        try:
            for cells in csv.reader(self, strict=True):
                self._of_row.clear()
                if cells:
                    yield cells
        except csv.Error as error:
            raise UserError(self._why(error)) from None

    def _why(self, error: csv.Error) -> str:
        """The quoted cell that is wrong, by the line in which it begins."""
        text = "".join(self._of_row)
        cell = next((c for c in _QUOTED.finditer(text) if c["end"] is None), None)
        if cell is None:
            return f"{self.path}, line {self.number}: not readable as CSV: {first_line(error)}"
        line = self.number - len(self._of_row) + 1 + len(_LINE_END.findall(text[: cell.start()]))
        wrong = "goes on behind its last quote" if cell.end() < len(text) else "has no end"
        return (
            f"{self.path}, line {line}: the quoted cell that begins here {wrong}; a quote within quotes is "
            'written twice, ""'
        )


def _parquet_rows(path: Path, theirs: Mapping[str, str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _usable_columns(str(path), file.schema_arrow.names, theirs)
            batches = file.iter_batches(columns=columns, batch_size=_ROWS_AT_ONCE)
            yield from _numbered(str(path), (value for batch in batches for value in batch.to_pylist()))
    except UserError:
        raise
    except (pa.ArrowException, *OF_CONTENT) as error:
        raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def _saved_rows(
    path: Path, asked: str | None, split_default: str, theirs: Mapping[str, str]
) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except OF_CONTENT as error:
        raise UserError(
            f"{path}: not a readable directory of datasets.save_to_disk: {first_line(error)}"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        split = split_default if asked is None else asked
        if split not in data:
            known = ", ".join(map(str, data))
            raise UserError(f"{path}: no split {split!r}; it has {known}: append :<split>")
        data = data[split]
    elif asked is not None:
        raise UserError(f"{path}: one data set without splits was saved there; leave out :{asked}")
    return _dataset_rows(str(path), data, theirs)


def _hub_rows(name: str, split: str, theirs: Mapping[str, str]) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except (*OF_CONTENT, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name}: no file or directory of that name, and datasets cannot load its split {split!r}: "
            f"{first_line(error)}{_meant(name, split)}"
        ) from None
    return _dataset_rows(f"{name}:{split}", data, theirs)


def _meant(name: str, split: str) -> str:
    close = difflib.get_close_matches(name, [*task_names(), "pack"], n=1)
    return f" (did you mean {close[0]}:{split}?)" if close else ""


def _dataset_rows(where: str, data: Any, theirs: Mapping[str, str]) -> Iterator[Row]:
    columns = _usable_columns(where, data.column_names, theirs)
    number = 0
    try:
        for value in data.select_columns(columns):
            yield Row(where=f"{where}, row {number}", value=value)
            number += 1
    except OF_CONTENT as error:
        raise UserError(f"{where}, row {number}: damaged: {first_line(error)}") from None


def _usable_columns(where: str, names: Sequence[str], theirs: Mapping[str, str]) -> list[str]:
    given = {ours: {column, column.partition(".")[0]} for ours, column in theirs.items()}
    if not {"prompt", "messages", *given.get("prompt", ()), *given.get("messages", ())} & set(names):
        held = one_line(", ".join(names)) or "none"
        if asked := theirs.get("prompt") or theirs.get("messages"):
            raise UserError(f"{where}: no column {asked!r}, which data.columns names; it has {held}")
        raise UserError(
            f"{where}: no column 'prompt' (it has {held}); say which one has the problem: "
            "data.columns: {prompt: …}"
        )
    used = [name for name in names if name in set(COLUMNS).union(*given.values())]
    if twice := next((name for name in used if used.count(name) > 1), None):
        raise UserError(f"{where}: two columns are called {twice!r}, of which one would be lost; rename it")
    return used
