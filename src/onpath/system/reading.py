"""Files that somebody else wrote, or a disk spoilt: one reader per kind. Whatever is wrong with a file
becomes a sentence that names it and the place in it."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from onpath.system.errors import UserError
from onpath.system.text import one_line

_MOST_BYTES = 64 * 2**20
"""Of a file that is read whole: configs, summaries, states."""
_MOST_NODES, _MOST_LEVELS, _MOST_DIGITS = 100_000, 50, 30
"""Of YAML, aliases counted as often as they are used: a few lines can mean billions."""
_SURELY_FLAT = 500
"""Levels that libyaml is asked for."""
_ODD = re.compile(r"[\t\ufeff!]|[|>][-+0-9]*#")
"""What libyaml reads otherwise than PyYAML's own parser: tabs, marks of byte order, tags, comments at `|`."""
_YAML_FAILURES = (
    yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, LookupError, AttributeError,
)  # fmt: skip
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
"""Dates stay text."""


def read_text(path: Path, *, most: int = _MOST_BYTES) -> str:
    """UTF-8.

    Raises:
        UserError: no file, not readable, too long, or no text.
    """
    return _decoded(path, read_bytes(path, most=most))


def read_bytes(path: Path, *, most: int = _MOST_BYTES) -> bytes:
    """See `read_text`."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{_name(path)}: cannot be read: {_reason(error)}") from None
    if len(data) > most:
        raise UserError(f"{_name(path)}: longer than {most / 2**20:.0f} MiB, which no such file is")
    return data


def read_json(path: Path, *, keys: Mapping[str, type | tuple[type, ...]] | None = None) -> Any:
    """JSON; with `keys` an object that has at least these, of these types.

    Raises:
        UserError: see `read_text`; or not JSON, or not such an object.
    """
    data = read_bytes(path)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise UserError(f"{_name(path)}: damaged: {error}") from None
    if keys is not None:
        check_keys(value, keys, where=_name(path))
    return value


def parse_json(data: str | bytes) -> Any:
    """JSON of whatever somebody sends.

    Raises:
        ValueError: it is none; in a few words, with the place.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text.rstrip(" \t\r\n"))  # an end that is missing is missed where the text ends
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at {where}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    except ValueError:
        raise ValueError("not usable JSON: a number of thousands of digits") from None


def check_keys(value: Any, keys: Mapping[str, type | tuple[type, ...]], *, where: str) -> None:
    """An object must have these keys, with values of these types; True is no number.

    Raises:
        UserError: it has not.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: damaged: {type(value).__name__} in place of an object")
    for key, kind in keys.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        found = value.get(key)
        if (isinstance(found, bool) and bool not in kinds) or not isinstance(found, kinds):
            what = "is missing" if key not in value else f"is {one_line(repr(found), 40)}"
            raise UserError(f"{where}: damaged: {key} {what}")


def json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Line number, line and value of each line that is JSON; a killed writer's last line is passed over, as
    is what a disk spoilt.

    Raises:
        UserError: see `read_bytes`.
    """
    lines = read_bytes(path, most=2**34).decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield number, line, parse_json(line)
        except ValueError:
            continue


def read_yaml(path: Path) -> Any:
    """YAML in which a key stands once, dates are text, and nothing is endless.

    Raises:
        UserError: see `read_text`; or not such YAML, with the line.
    """
    return parse_yaml(read_text(path), where=_name(path))


def parse_yaml(text: str, *, where: str) -> Any:
    """See `read_yaml`; `where` names the text in errors."""
    try:
        if _levels(text) <= _SURELY_FLAT and not _ODD.search(text):
            with suppress(yaml.YAMLError):  # what is wrong is said by PyYAML's own parser
                return _parsed(text, _FastLoader)
        return _parsed(text, _Loader)
    except _YAML_FAILURES as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {_reason(error, 200)}") from None


def _parsed(text: str, kind: Any) -> Any:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _levels(text: str) -> int:
    """At least as many as its collections can be nested: libyaml follows them on the C stack, without end."""
    flow = text.count("[") + text.count("{")
    lines = text.splitlines()
    block = (len(x) - len(x.lstrip(" ")) + sum(map(x.count, ("- ", "? ", ": "))) for x in lines)
    return flow + 2 * max(block, default=0)


class _Once(yaml.constructor.SafeConstructor):
    """In which a key stands once: YAML's own readers keep the last one and lose the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} stands here a second time", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MOST_DIGITS:
            raise yaml.constructor.ConstructorError(
                problem=f"a number of {len(node.value)} digits", problem_mark=node.start_mark
            )
        return int(super().construct_yaml_int(node))


_Once.add_constructor("tag:yaml.org,2002:int", _Once.construct_yaml_int)  # type: ignore[type-var]


class _Loader(_Once, yaml.SafeLoader):
    """PyYAML's own parser."""

    yaml_implicit_resolvers = _RESOLVERS


class _FastLoader(_Once, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's, ten times as fast, where PyYAML was built with it."""

    yaml_implicit_resolvers = _RESOLVERS


def _check_size(root: yaml.Node) -> None:
    """Counts what the text means once every alias is written out.

    Raises:
        yaml.YAMLError: more than any config is, or a node within itself.
    """
    sizes: dict[int, int] = {}
    open_nodes: dict[int, int] = {}

    def size(node: yaml.Node, level: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes or level > _MOST_LEVELS:
            why = "a value that holds itself" if id(node) in open_nodes else "nested too deeply"
            raise yaml.constructor.ConstructorError(problem=why, problem_mark=node.start_mark)
        open_nodes[id(node)] = level
        total = 1 + sum(size(inner, level + 1) for inner in _inner(node))
        del open_nodes[id(node)]
        if total > _MOST_NODES:
            raise yaml.constructor.ConstructorError(
                problem="aliases that stand for more than any file would hold", problem_mark=node.start_mark
            )
        sizes[id(node)] = total
        return total

    size(root, 0)


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{_name(path)}, line {line}: not UTF-8 text") from None


def _name(path: Path) -> str:
    return one_line(str(path), 300)


def _reason(error: Exception, most: int = 120) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = getattr(error, "problem", None) or getattr(error, "strerror", None)  # PyYAML's, the system's
    return one_line(str(said or error), most)


def safely(read: Callable[[], Any], *, where: str) -> Any:
    """The result of a reader that was written for whole files, told in a sentence where this one is not.

    Raises:
        UserError: it failed on what the file holds.
    """
    try:
        return read()
    except UserError:
        raise
    except OF_CONTENT as error:
        raise UserError(f"{where}: damaged ({type(error).__name__}: {_reason(error)})") from None


OF_CONTENT: tuple[type[Exception], ...] = (
    *(TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError),
    *(ZeroDivisionError, OSError),
)
"""What libraries raise over content that they did not expect."""
