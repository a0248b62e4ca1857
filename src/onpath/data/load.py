"""Prompts from files, `datasets`, tasks and own code, and the order in which training sees them. No torch.

Columns: `prompt` (text, or messages of role and content) or `messages` (a conversation, asked up to its last
assistant turn), optional `answer`, verl's `reward_model.ground_truth`, or `tests` of a program (what the
grader compares with), optional `solution` or TRL's `privileged_context` (what only a teacher may see),
optional `id`, and with several teachers the column that `data.teacher_column` says. Other columns are
ignored, so TRL's prompt-only data sets work unchanged.
"""

import gzip
import hashlib
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from onpath.data.packs import pack_of, pack_rows
from onpath.data.tasks import task_of, task_rows
from onpath.records import Message, Prompt
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.reading import OF_CONTENT, parse_json
from onpath.system.text import first_line, one_line

COLUMNS = (
    "id",
    "prompt",
    "messages",
    "answer",
    "reward_model",
    "tests",
    "solution",
    "privileged_context",
    "tools",
)
REASONS_KEPT = 5
_LONGEST_LINE = 64 * 2**20
"""Bytes of a line: a few bytes of gzip can stand for billions."""
_ROWS_AT_ONCE = 256
"""Of a Parquet file, in which a few bytes can be one long text many times over."""
DEFAULT_TEACHER = "default"
"""Of several teachers the one for rows that name none."""
JSONL_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
SOURCES = (
    "a .jsonl, .jsonl.gz or .parquet file, a directory saved by datasets, a datasets name[:split], "
    "gym:<split>, pack:<name>, or a function of yours, file.py:name"
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.%\[\]:-]+)?")


@dataclass(frozen=True, kw_only=True)
class LoadedPrompts:
    """What a source held.

    >>> LoadedPrompts(prompts=(Prompt(id="0", text="7 + 5?"),), skipped=0, source="a.jsonl").skipped
    0
    """

    prompts: tuple[Prompt, ...]
    """Never empty; ids are unique."""
    skipped: int
    """Bad rows that `skip_bad` left out."""
    source: str
    reasons: tuple[str, ...] = ()
    """Where and why, for the first few skipped rows."""


class _BadRow(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    where: str
    """File and line, or source and row, for error messages."""
    value: Any
    """bytes are a line of JSON, still to be decoded."""


def load_prompts(
    source: str,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    split_default: str = "train",
    columns: Mapping[Any, str] | None = None,
    all_columns: bool = True,
    teachers: Sequence[str] = (),
    refuses: Callable[[Prompt], str | None] | None = None,
) -> LoadedPrompts:
    """Reads the prompts of a source.

    Args:
        source: a JSONL or Parquet file, a directory written by `Dataset.save_to_disk`, a `datasets` name
            (both of the latter with an optional `:split`), a task's split such as `gym:train`, a pack such as
            `pack:humaneval`, or own code that gives rows (`file.py:name`: an iterable, or a function without
            arguments that returns one).
        limit: keep only the first so many good rows; None keeps all (of a task: as many as it says).
        skip_bad: count bad rows instead of stopping at the first.
        split_default: split of a `datasets` source that names none.
        columns: ours → what the source calls it; a dot leads into a mapping. Rows of tasks and packs are
            ours.
        all_columns: whether each of them must be there; else our own names will do where one is not.
        teachers: names, of which each row must have one; the one called `default` has the rows that name
            none. Without them no row has a teacher.
        refuses: why a prompt is a bad row after all; None: it is none.

    Raises:
        UserError: unreadable or empty source, missing column, or a bad row (with file, line and reason).
    """
    prompts: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    skipped: list[str] = []
    theirs = {} if task_of(source) or pack_of(source) else dict(columns or {})
    seen: set[str] = set()
    for number, row in enumerate(_rows(source, limit, split_default, theirs)):
        if limit is not None and len(prompts) >= limit:
            break
        try:
            found = _renamed(row.value, theirs, seen)
            prompt = _prompt(found, default_id=str(number), teachers=teachers)
            if refuses is not None and (why := refuses(prompt)):
                raise _BadRow(why)
            if prompt.id in places:
                raise _BadRow(f"id {prompt.id!r} is also that of {places[prompt.id]}; ids must be unique")
        except _BadRow as reason:
            if not skip_bad:
                raise UserError(f"{row.where}: {reason} (data.skip_bad: true skips such rows)") from None
            skipped.append(f"{row.where}: {reason}")
            continue
        prompts[prompt.id], places[prompt.id] = prompt, row.where
    if all_columns and (unseen := [ours for ours in theirs if ours not in seen]):
        key = "data.teacher_column" if unseen[0] == "teacher" else f"data.columns.{unseen[0]}"
        raise UserError(f"{source}: no row has {theirs[unseen[0]]!r}, which {key} says is its {unseen[0]}")
    if not prompts:
        detail = f"all {len(skipped)} rows are bad, first {skipped[0]}" if skipped else "it has no rows"
        raise UserError(f"{source}: no prompts to use: {detail}")
    return LoadedPrompts(
        prompts=tuple(prompts.values()),
        skipped=len(skipped),
        source=source,
        reasons=tuple(skipped[:REASONS_KEPT]),
    )


def shuffled(n: int, *, seed: int, epoch: int) -> list[int]:
    """The order of `n` prompts in an epoch: a permutation that depends on (n, seed, epoch) alone."""
    return list(_permutation(n, seed, epoch))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    # A text seed goes through SHA-512, so that neighbouring seeds and epochs give unrelated orders.
    random.Random(f"onpath order {seed} {epoch}").shuffle(order)
    return tuple(order)


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """Digest of problems, answers and solutions in their order."""
    made = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        known = asdict(prompt)
        for name in ("teacher", "tests"):  # as it was digested when there were no such fields
            if not known[name]:
                del known[name]
        made.update(json.dumps(known, sort_keys=True).encode() + b"\n")
    return made.hexdigest()


def prompts_of_step(prompts: Sequence[Prompt], *, size: int, seed: int, step: int) -> list[Prompt]:
    """The `size` prompts of optimiser step `step` (from 0): entries step·size … (step+1)·size − 1 of an
    endless sequence of shuffled epochs.

    A pure function, so that a resumed run needs no state. Within an epoch no prompt repeats; a step that
    spans two epochs (where `size` does not divide the pool) may hold a prompt twice.

    Raises:
        UserError: `size` exceeds the pool.
    """
    pool = len(prompts)
    if size > pool:
        raise UserError(
            f"rollout.prompts is {size}, but there are only {pool} training prompts; lower it to at most "
            f"{pool} (rollout.n draws more samples of each)"
        )
    return [
        prompts[_permutation(pool, seed, position // pool)[position % pool]]
        for position in range(step * size, (step + 1) * size)
    ]


def _rows(source: str, limit: int | None, split_default: str, theirs: Mapping[str, str]) -> Iterator[_Row]:
    """Chooses the reader by the form of the source."""
    if code.is_own(source):
        return _own_rows(source)
    if pack_of(source):
        return _numbered(source, pack_rows(source, limit))
    task = task_of(source)
    if task is not None:
        return _numbered(source, task_rows(task, source, limit))
    path = place(source)
    base, _, split = source.rpartition(":")
    if path.is_file():
        return _file_rows(path, theirs)
    if path.is_dir():
        return _saved_rows(path, split_default, theirs)
    if base and (saved := place(base)).is_dir():
        return _saved_rows(saved, split, theirs)
    file_like = _plain(path).suffix in (*JSONL_SUFFIXES, ".parquet", ".json")
    looks_like_path = file_like or source.startswith(("/", "./", "../", "~"))
    if looks_like_path or not _HUB_NAME.fullmatch(source):
        raise UserError(f"{source!r}: no such file or directory; a source is {SOURCES}")
    name, _, split = source.partition(":")  # a slice of a split has colons too: name:test[:100]
    return _hub_rows(name, split or split_default, theirs)


def _own_rows(source: str) -> Iterator[_Row]:
    given = code.load(source, key="data")
    with _named(source):
        rows = given() if callable(given) else given
    if not isinstance(rows, Iterable) or isinstance(rows, str | Mapping):
        raise UserError(f"{source}: must give rows, mappings with a key 'prompt', not {_kind(rows)}")
    return _numbered(source, _own(source, rows))


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[_Row]:
    for number, row in enumerate(rows):
        yield _Row(where=f"{source}, row {number}", value=row)


def _own(source: str, rows: Iterable[Any]) -> Iterator[Any]:
    with _named(source):
        yield from rows


@contextmanager
def _named(source: str) -> Iterator[None]:
    """What somebody's own rows raise is their fault, and says so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source} fails: {type(error).__name__}: {error}") from error


def _file_rows(path: Path, theirs: Mapping[str, str]) -> Iterator[_Row]:
    if _plain(path).suffix in JSONL_SUFFIXES:
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, theirs)
    raise UserError(f"{path}: unknown file type {path.suffix!r}; a source is {SOURCES}")


def _plain(path: Path) -> Path:
    """The name without a compression's."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = iter(partial(file.readline, _LONGEST_LINE + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > _LONGEST_LINE:
                    most = _LONGEST_LINE // 2**20
                    raise UserError(f"{path}, line {number}: longer than {most} MiB, which no problem is")
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield _Row(where=f"{path}, line {number}", value=text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no gzip file: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parquet_rows(path: Path, theirs: Mapping[str, str]) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = _usable_columns(str(path), file.schema_arrow.names, theirs)
            for batch in file.iter_batches(columns=columns, batch_size=_ROWS_AT_ONCE):
                for value in batch.to_pylist():
                    yield _Row(where=f"{path}, row {number}", value=value)
                    number += 1
    except UserError:
        raise
    except (pa.ArrowException, *OF_CONTENT) as error:
        raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def _saved_rows(path: Path, split: str, theirs: Mapping[str, str]) -> Iterator[_Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except OF_CONTENT as error:
        raise UserError(
            f"{path}: not a readable directory of datasets.save_to_disk: {first_line(error)}"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            known = ", ".join(map(str, data))
            raise UserError(f"{path}: no split {split!r}; it has {known}: append :<split>")
        data = data[split]
    return _dataset_rows(str(path), data, theirs)


def _hub_rows(name: str, split: str, theirs: Mapping[str, str]) -> Iterator[_Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except (*OF_CONTENT, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name}: no file or directory of that name, and datasets cannot load its split {split!r}: "
            f"{first_line(error)}"
        ) from None
    return _dataset_rows(f"{name}:{split}", data, theirs)


def _dataset_rows(where: str, data: Any, theirs: Mapping[str, str]) -> Iterator[_Row]:
    columns = _usable_columns(where, data.column_names, theirs)
    number = 0
    try:
        for value in data.select_columns(columns):
            yield _Row(where=f"{where}, row {number}", value=value)
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
    return [name for name in names if name in set(COLUMNS).union(*given.values())]


_ABSENT = object()


def _renamed(value: Any, theirs: Mapping[str, str], seen: set[str]) -> Mapping[str, Any]:
    """A row under our names; those that were found are added to `seen`."""
    row = _decode(value) if isinstance(value, bytes) else value
    if not isinstance(row, Mapping):
        raise _BadRow(f"must be an object with a key 'prompt', not {_kind(row)}")
    found = {}
    for ours, column in theirs.items():
        held: Any = row
        for part in [column] if column in row else column.split("."):
            held = held.get(part, _ABSENT) if isinstance(held, Mapping) else _ABSENT
        if held is not _ABSENT:
            found[ours] = held
    seen.update(found)
    if "messages" in found and "prompt" not in found:  # whoever names the conversation means it
        row = {name: held for name, held in row.items() if name != "prompt"}
    return {**row, **found}


def _prompt(row: Mapping[str, Any], *, default_id: str, teachers: Sequence[str]) -> Prompt:
    """A row as a record; `_BadRow` says what is wrong with it."""
    if row.get("tools"):
        raise _BadRow(
            "it has 'tools', which onpath does not render; put them into the prompt, or drop the column"
        )
    text: str | None = None
    messages: tuple[Message, ...] | None
    if row.get("prompt") is None and row.get("messages") is not None:
        messages = _conversation(row["messages"])
    elif "prompt" in row:
        text, messages = _question(row["prompt"])
    else:
        held = one_line(", ".join(map(repr, row))) or "none"
        raise _BadRow(f"no key 'prompt' (it has {held}); data.columns says what it is called")
    hint, has_tests = row.get("solution"), _is_given(row.get("tests"))
    return Prompt(
        id=_id(row.get("id"), default_id),
        text=text,
        messages=messages,
        answer=_tests(row["tests"]) if has_tests else _answer(_reference(row)),
        tests=has_tests,
        solution=_solution(row.get("privileged_context") if hint is None else hint),
        teacher=_teacher(row.get("teacher"), teachers) if teachers else None,
    )


def _decode(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise _BadRow(str(error)) from None


def _question(value: Any) -> tuple[str | None, tuple[Message, ...] | None]:
    if isinstance(value, str):
        if not value.strip():
            raise _BadRow("'prompt' is empty")
        return _encodable(value, "prompt"), None
    if not isinstance(value, list):
        raise _BadRow(f"'prompt' must be text or a list of messages, not {_kind(value)}")
    if not value:
        raise _BadRow("'prompt' is an empty list of messages")
    messages = _messages(value, "prompt")
    if messages[-1]["role"] != "user":
        role = one_line(messages[-1]["role"], 40)
        raise _BadRow(f"the last message of 'prompt' must be the user's, not the {role}'s")
    if not messages[-1]["content"].strip():
        raise _BadRow("the last message of 'prompt' is empty")
    return None, messages


def _conversation(value: Any) -> tuple[Message, ...]:
    """What the last assistant turn answers; the whole if the user has the last word."""
    if not isinstance(value, list):
        raise _BadRow(f"'messages' must be a list of messages, not {_kind(value)}")
    messages = _messages(value, "messages")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise _BadRow("'messages' has no user's message before its last assistant turn")
    return messages


def _reference(row: Mapping[str, Any]) -> Any:
    """The answer, or where verl keeps it."""
    rule = row.get("reward_model")
    return (
        rule.get("ground_truth")
        if row.get("answer") is None and isinstance(rule, Mapping)
        else row.get("answer")
    )


def _messages(values: Sequence[Any], column: str) -> tuple[Message, ...]:
    return tuple(_message(value, f"message {number} of {column!r}") for number, value in enumerate(values))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise _BadRow(f"{where} must be an object with role and content, not {_kind(value)}")
    given = {"role": value.get("role"), "content": _joined(value.get("content"), where)}
    for key, text in given.items():
        if not isinstance(text, str):
            raise _BadRow(f"{where}: {key!r} must be text, not {_kind(text)}")
    if other := [key for key, held in value.items() if key not in ("role", "content") and held is not None]:
        raise _BadRow(f"{where} has {other[0]!r}; only role and content are understood")
    return {"role": given["role"], "content": _encodable(given["content"], "prompt")}


def _joined(content: Any, where: str) -> Any:
    """A list of text parts as one text, as chat templates join them; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _BadRow(f"{where}: 'content' must be text, not a list with a part of type {kind!r}")
    return "".join(part["text"] for part in content)


def _encodable(text: str, column: str) -> str:
    """Tokenizers die on half a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"half a surrogate pair at character {error.start}"
        raise _BadRow(f"{column!r} holds broken Unicode: {where}") from None
    return text


_LARGEST = 10**4000
"""Python writes no longer numbers out."""


def _is_given(tests: Any) -> bool:
    """An array of somebody's own row has no truth."""
    return bool(tests) if isinstance(tests, str | list | Mapping | None) else True


def _answer(value: Any) -> str | None:
    # pandas writes a missing value of a numeric column as NaN
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BadRow(f"'answer' must be text or a number, not {_kind(value)}")
    if isinstance(value, float) and math.isinf(value):
        raise _BadRow("'answer' is an infinite number; write it as text")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise _BadRow("'answer' has over 4,000 digits; write it as text")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # an integer column with a missing value comes back as floats: 12.0 is 12
    if not str(value).strip():
        raise _BadRow("'answer' is empty; leave it out (or null) where there is nothing to grade")
    return _encodable(str(value), "answer")


def _tests(value: Any) -> str:
    """Tests of a program as text: asserts one below the other, objects as JSON."""
    pairs = isinstance(value, list) and all(isinstance(v, Mapping) for v in value)
    if pairs and all({"input", "output"} <= set(v) for v in value):
        value = {"inputs": [v["input"] for v in value], "outputs": [v["output"] for v in value]}
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = "\n".join(value)
    if isinstance(value, Mapping):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise _BadRow(f"'tests' holds what is no JSON: {error}") from None
    if not isinstance(value, str):
        raise _BadRow(f"'tests' must be text, a list of asserts, or an object, not {_kind(value)}")
    return _encodable(value, "tests")


def _solution(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list) and value:  # TRL's privileged_context may be messages; it joins their contents
        value = "\n".join(message["content"] for message in _messages(value, "privileged_context"))
    if not isinstance(value, str):
        raise _BadRow(f"'solution' (or 'privileged_context') must be text, not {_kind(value)}")
    return _encodable(value, "solution")


def _teacher(value: Any, known: Sequence[str]) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        if DEFAULT_TEACHER in known:
            return DEFAULT_TEACHER
        raise _BadRow(
            "it names no teacher in the column that data.teacher_column says, and none of teachers is "
            f"called {DEFAULT_TEACHER}"
        )
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRow(f"its teacher must be a name, not {_kind(value)}")
    if str(value) not in known:
        raise _BadRow(f"its teacher is {one_line(repr(value), 60)}, but teachers has {', '.join(known)}")
    return str(value)


def _id(value: Any, default: str) -> str:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _BadRow(f"'id' must be text or an integer, not {_kind(value)}")
    return _encodable(str(value), "id")


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, str) and not value):
        return "null" if value is None else "empty text"
    names = {
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
