"""A config from YAML, a command line or Python objects, checked before anything is loaded. No torch.

Defaults are the vetted method on the embedded gym, so that `{}` is a valid config. A wrong key, a wrong value
or an impossible pair raises `UserError` with one sentence.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from onpath.config import elsewhere
from onpath.config.methods import METHODS, MethodOptions, options_class
from onpath.config.section import Section
from onpath.config.sections import Data, labelled
from onpath.config.sentences import (
    called_here,
    first_problem,
    frames_of,
    nearest,
    section_type,
    sentence,
)
from onpath.config.whole import LABELLED, Config
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.reading import parse_yaml, read_yaml
from onpath.system.text import first_line, one_line, short

_COMMAND_LINE = "the command line"


def load(
    path: str | Path | None = None,
    overrides: Sequence[tuple[str, Any]] | Mapping[str, Any] = (),
    *,
    allow_code: bool = False,
) -> Config:
    """Reads a YAML file (None: the defaults) and applies dotted overrides.

    Args:
        path: YAML mapping of sections.
        overrides: such as `{"optim.lr": 1e-4}`, or pairs; strings are read as YAML.
        allow_code: run the Python files that the config names (`method.name: mine.py:Mine`). A relative one
            is looked for in the working directory, then beside the YAML.

    Raises:
        UserError: unreadable file, wrong key, wrong value or impossible pair.
    """
    data = {} if path is None else _tree_of(path)
    given, by = dict(overrides), "overrides" if isinstance(overrides, Mapping) else _COMMAND_LINE
    for dotted, text in sorted(given.items(), key=lambda pair: pair[0] != "method.name"):
        _override(data, dotted, text, by=by)
    with code.allowed(allow_code):
        return build(data, source=str(path) if path else by, overridden=given, by=by)


def build(
    data: Mapping[str, Any],
    *,
    source: str = "config",
    overridden: Iterable[str] = (),
    by: str = _COMMAND_LINE,
) -> Config:
    """A `Config` from plain data; `UserError` says in one sentence what is wrong with it.

    Args:
        data: sections; a `Path` in them is its text.
        source: what the sentence names.
        overridden: dotted keys that did not come from there.
        by: where those came from.
    """
    data = _without_paths(data)
    try:
        config = Config.model_validate(data)
        code.load_all(config.model_dump(mode="json"))  # refused, or wrong, before anything is done
        return config
    except PydanticSerializationError as error:
        raise UserError(f"{one_line(source, 300)}: {_unwritable(config) or first_line(error)}") from None
    except ValidationError as error:
        key, said = first_problem(error, data)[1], one_line(sentence(error, data), 900)
        ours = any(_is_about(dotted, key, said) for dotted in overridden)
        told = UserError(f"{one_line(by if ours else source, 300)}: {said}")
        told.frames = frames_of(error)
        raise told from None


def _unwritable(config: Config) -> str:
    """Which option that takes anything holds what no YAML can."""
    for name in Config.model_fields:
        section = getattr(config, name)
        for option in type(section).model_fields if isinstance(section, Section) else ():
            try:
                section.model_dump(mode="json", include={option})
            except PydanticSerializationError:
                held = f"{name}.{option} is {short(getattr(section, option))}"
                return f"{held}, which config.yaml cannot hold; it holds numbers, text, lists and mappings"
    return ""


def _is_about(dotted: str, key: str, sentence: str) -> bool:
    """Whether an error is about an option: its own, or its section's or the whole config's that names it."""
    section, _, option = dotted.partition(".")
    if key not in ("", section):
        return f"{key}.".startswith(f"{dotted}.") or dotted.startswith(f"{key}.")
    names = [dotted, option] if sentence.startswith(f"{section}:") else [dotted]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", sentence) for name in names)


def _without_paths(value: Any) -> Any:
    """A tree with text for each `Path`: options that name a place are text, so that YAML holds them."""
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return str(value) if isinstance(value, PurePath) else value


def resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored config with today's defaults for the options that did not exist when it was written."""
    try:
        return build(tree).model_dump(mode="json")
    except UserError:  # an option that is no more: shown as it was
        return tree


def _tree_of(named: str | Path) -> dict[str, Any]:
    file, path = place(named), Path(named)
    if not file.is_file():
        what = "is a directory, and no config file" if file.is_dir() else "no such config file"
        raise UserError(f"{path}: {what}")
    data = read_yaml(file)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of sections ({', '.join(Config.model_fields)})")
    if "arms" in data:
        raise UserError(f"{path} is a study's, with arms, and no run's config: onpath study {path}")
    tree: dict[str, Any] = code.beside(data, path.parent)
    return tree


def _override(data: dict[str, Any], dotted: str, text: Any, *, by: str) -> None:
    section, _, key = dotted.partition(".")
    named, form = f"--{dotted}", "--section.key value"
    if by != _COMMAND_LINE:
        named, form = f"{by}: {dotted}", "section.key"
    if not key or section not in Config.model_fields:
        found = called_here(dotted) if key else elsewhere.answer(dotted)
        hint = found or nearest(section, Config.model_fields)
        raise UserError(f"{named}: options are {form}; {hint}")
    value = _read(text, _annotation(data, section, key)) if isinstance(text, str) else text
    target = data.setdefault(section, {})
    if target is None:  # its keys may all be comments
        target = data[section] = {}
    if not isinstance(target, dict):
        raise UserError(f"{section}: must be a mapping, not {target!r}")
    *path, last = key.split(".")
    for part in path:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"{named}: {section}.{part} is {inner!r}, which has no key {last}")
        target = inner
    target[last] = value


def _annotation(data: Mapping[str, Any], section: str, key: str) -> Any:
    """The type of an option, as far as it can be known before the config is built; else Any."""
    name, _, inner = key.partition(".")
    if section in LABELLED:
        fields: Mapping[str, Any] = LABELLED[section].model_fields
        name = inner
    elif section == "method":
        chosen = (data.get("method") or {}).get("name", "opd") if isinstance(data.get("method"), dict) else ""
        known = chosen in METHODS or (code.is_own(str(chosen)) and code.is_allowed())
        fields = options_class(chosen).model_fields if known else {}
        fields = {**{n: f for m in METHODS.values() for n, f in m.model_fields.items()}, **fields}
    else:
        fields = section_type(section).model_fields
    annotation = fields[name].annotation if name in fields else Any
    if inner and get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return annotation


def _read(text: str, annotation: Any) -> Any:
    """A word of the command line as a value: as it stands where an option is text, else as YAML."""
    kinds = _kinds(annotation)
    if text == "null" or (type(None) in kinds and text in ("None", "~")):
        return None
    if kinds <= {str, type(None)}:
        return text
    try:
        value = parse_yaml(text, where=_COMMAND_LINE)
    except UserError:
        return text
    if str in kinds and type(value) not in kinds:
        told = isinstance(value, list) or (isinstance(value, dict) and any(map(_is_section, kinds)))
        return value if told else text  # a list is refused by what it is, not as a text with brackets
    return None if text == "None" else value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an option takes; a mapping of texts takes one text too (data.eval)."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(args[0])
    if origin in (Union, UnionType):
        return {kind for arg in args for kind in _kinds(arg)}
    if origin is Literal:
        return {type(arg) for arg in args}
    if origin is dict and args == (str, str):
        return {dict, str}
    return {origin or annotation}


def with_own(
    config: Config | Mapping[str, Any] | str | Path | None,
    *,
    method: Any = None,
    divergence: Any = None,
    grader: Any = None,
    rewards: Mapping[str, Any] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    allow_code: bool = False,
) -> Config:
    """A config with Python objects for method, divergence, grader, rewards or data, named as a YAML does.

    Args:
        method: a class with nested `Options`, or an instance of those.
        divergence, grader, rewards: functions; rewards by label. A text, here or for `method`, is a name as a
            YAML has it.
        train_dataset, eval_dataset: see `named_rows`; the latter also several sets, by name.

    Raises:
        UserError: the config is not valid, `method` is not a method, or data are no rows.
    """
    if config is None or isinstance(config, str | Path):
        tree = {} if config is None else _tree_of(config)
    elif isinstance(config, Config):
        objects = (method, divergence, grader, rewards or None, train_dataset, eval_dataset)
        if all(given is None for given in objects):
            return config
        # What nobody set stays so: warnings of defaults that do not fit ask.
        tree = config.model_dump(mode="json", exclude_unset=True)
        tree |= {"method": {**tree.get("method", {}), "name": config.method.name}}
        tree["data"] = _without_following_sets(config.data)
        if method is not None:
            tree["method"] = _options_for(method, config.method)
    elif isinstance(config, Mapping):
        tree = {name: dict(x) if isinstance(x, Mapping | Section) else x for name, x in config.items()}
        if isinstance(given := config.get("data"), Data):
            tree["data"] = _without_following_sets(given)
        _name_trackers(tree)
    else:
        kind = type(config).__name__
        raise UserError(f"config is {kind}; it must be a Config, a mapping of sections or the path of a YAML")
    if not isinstance(rewards, Mapping | None):
        raise UserError(f"rewards is {type(rewards).__name__}; it must be a mapping, {{label: function}}")
    source = str(config) if isinstance(config, str | Path) else "config"
    named, held, asked, data = (tree.get(key) or {} for key in ("method", "rewards", "eval", "data"))
    held = labelled(held)
    if not all(isinstance(section, Mapping) for section in (named, held, asked, data)):
        return build(tree, source=source)  # which refuses it
    if train_dataset is not None:
        tree["data"] = data = {**data, "train": named_rows("data.train", train_dataset)}
    if eval_dataset is not None:
        sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"test": eval_dataset}
        found = {name: named_rows(f"data.eval.{name}", rows) for name, rows in sets.items()}
        tree["data"] = {**data, "eval": found}
    passed: dict[str, Any] = {"method.divergence": divergence, "eval.grader": grader}
    passed |= {f"rewards.{label}": function for label, function in (rewards or {}).items()}
    tree["method"] = dict(named)
    if method is not None:
        options = method if isinstance(method, MethodOptions) else None
        owner = type(options).method_class if options else method
        if not isinstance(owner, str) and (owner is None or not hasattr(owner, "Options")):
            raise UserError("method must be a class derived from onpath.methods.Method, or its Options")
        tree["method"] |= options.model_dump(exclude_unset=True) if options else {}
        passed = {"method.name": owner, **passed}
    if rewards:
        tree["rewards"] = {label: dict(r) if isinstance(r, Section) else r for label, r in held.items()}
    passed = {key: value for key, value in passed.items() if value is not None}
    for key, value in passed.items():
        if not callable(value) and not isinstance(value, str):
            raise UserError(f"{key} is {type(value).__name__}; it must be a function, or its name as in YAML")
    # First the objects in the places of their names: no two may get one, nor one that the config has.
    tree |= _placed(tree, passed)
    tree |= _placed(tree, code.register_all(passed, beside=tree))
    with code.allowed(allow_code):
        return build(tree, source=source)


def _name_trackers(tree: dict[str, Any]) -> None:
    """Classes in `run.trackers`, which Python may put there, by the names that a YAML has for them."""
    run = tree.get("run")
    if not isinstance(run, dict):
        return
    given = run.get("trackers")
    if isinstance(given, list | tuple) and any(isinstance(tracker, type) for tracker in given):
        classes = {str(i): tracker for i, tracker in enumerate(given) if isinstance(tracker, type)}
        names = code.register_all(classes)
        tree["run"] = {**run, "trackers": [names.get(str(i), x) for i, x in enumerate(given)]}


def _without_following_sets(data: Data) -> dict[str, Any]:
    """What is set of it; the evaluation sets that follow `data.train` are not, whatever set them."""
    given = data.model_dump(mode="json", exclude_unset=True)
    if given.get("eval") == Data(train=data.train).eval:
        given.pop("eval", None)
    return given


def _options_for(method: Any, before: MethodOptions) -> dict[str, Any]:
    """What a config sets for its method that another one, passed in its place, takes too: all of it if it is
    the same, else what every method has."""
    same = method == before.name or method is type(before).method_class or isinstance(method, type(before))
    given = before.model_dump(mode="json", exclude_unset=True, exclude={"name"})
    return {key: value for key, value in given.items() if same or key in MethodOptions.model_fields}


def named_rows(key: str, rows: Any) -> str:
    """The name by which a config has rows that a Python call passes: a `datasets.Dataset`, a list of mappings
    or a function that gives either. What names a source keeps its name. Other rows have another name, so that
    a run is never asked about those of a later call.

    Args:
        key: the option that they stand for.

    Raises:
        UserError: they are none of these.
    """
    if isinstance(rows, str | Path):
        return str(rows)
    if isinstance(rows, Mapping) or not (callable(rows) or isinstance(rows, Iterable)):
        which = "name one of its sets" if isinstance(rows, Mapping) else "it must be rows"
        raise UserError(f"{key} is {type(rows).__name__}; {which}: a datasets.Dataset, or a list of mappings")
    rows = rows() if callable(rows) else rows
    rows = _of_frame(rows) if type(rows).__name__ == "DataFrame" else rows
    rows = [*rows] if isinstance(rows, Iterator) else rows
    mark = f".{_content(rows)}" if hasattr(rows, "__len__") else ""  # a stream may have no end
    return code.register(f"{code.PASSED}{key}{mark}.py:rows", rows)


def _of_frame(rows: Any) -> Any:
    """The rows of a frame of pandas or polars, which is iterated over by columns: without its missing cells,
    and with lists for arrays."""
    if hasattr(rows, "to_dicts"):
        return rows.to_dicts()
    return [
        {column: _plain(cell) for column, cell in row.items() if not _is_missing(cell)}
        for row in rows.to_dict("records")
    ]


def _is_missing(cell: Any) -> bool:
    """None, and what pandas makes of it: NaN, NaT or NA."""
    none = cell is None or type(cell).__name__ in ("NAType", "NaTType")
    return none or (isinstance(cell, float) and math.isnan(cell))


def _plain(cell: Any) -> Any:
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    if isinstance(cell, dict):
        return {name: _plain(held) for name, held in cell.items()}
    return [_plain(held) for held in cell] if isinstance(cell, list) else cell


def _content(rows: Iterable[Any]) -> str:
    """What tells rows from others."""
    digest = hashlib.blake2b(digest_size=4)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _placed(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a tree with values at these dotted keys."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, option = key.partition(".")
        there = found.setdefault(section, dict(tree.get(section) or {}))
        there[option] = {"name": value} if section == "rewards" else value
    return found
