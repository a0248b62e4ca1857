"""A user's own code that a config names: `mine.py:Mine`. It runs only where somebody has said that it may.

A config that came from elsewhere must not run anything by itself. So a name of this form is looked up only
after `allow()` (the command line's `--allow-code`), within `allowed()` (the Python calls' `allow_code=True`),
or if this process has loaded it already.
"""

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from onpath.system.errors import UserError, is_lack_of_memory
from onpath.system.text import first_line

PASSED = "passed."
"""How the names of rows begin that a Python call passed: no file has them."""
_PASSED_AGAIN = "; a function without a name is found in no file: pass it again, or another one"
FAILURES = (Exception, SystemExit)
"""What own code may raise that is a failure of it: its sys.exit() would end the process without a word."""
_SPEC = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_process_wide = False
_here: ContextVar[bool] = ContextVar("own code allowed", default=False)
_loaded: dict[str, Any] = {}
_loading: ContextVar[bool] = ContextVar("an own file is being loaded", default=False)


def allow() -> None:
    """From now on this process runs code that a config names."""
    global _process_wide
    _process_wide = True


@contextmanager
def allowed(yes: bool = True) -> Iterator[None]:
    """In this block code that a config names may run; with False nothing changes."""
    token = _here.set(yes or _here.get())
    try:
        yield
    finally:
        _here.reset(token)


def is_allowed() -> bool:
    """Whether own code may run here."""
    return _process_wide or _here.get()


def flag() -> str:
    """What a command line needs so that own code may run as it may here: for commands that results name."""
    return " --allow-code" if is_allowed() else ""


def is_own(name: object) -> bool:
    """Whether a name means own code.

    >>> is_own("mine.py:Mine"), is_own("gym:train"), is_own("opd")
    (True, False, False)
    """
    return isinstance(name, str) and _SPEC.fullmatch(name) is not None


def beside(tree: Any, directory: Path) -> Any:
    """A config's tree in which a relative own file that is not in the working directory, but in the config's,
    is named by where it is."""
    if isinstance(tree, Mapping):
        return {key: beside(value, directory) for key, value in tree.items()}
    if isinstance(tree, list):
        return [beside(value, directory) for value in tree]
    found = _SPEC.fullmatch(tree) if isinstance(tree, str) else None
    if found is None or Path(found["file"]).is_file() or not (directory / found["file"]).is_file():
        return tree
    return f"{directory / found['file']}:{found['name']}"


def load_all(tree: Any) -> None:
    """Loads every own file that a config's tree names, so that it is known from now on. Rows that a call
    passed are looked up when they are read: a finished run is asked without them.

    Raises:
        UserError: see `load`.
    """
    for where, name in names_in(tree):
        if not name.startswith(PASSED):
            load(name, key=where)


def names_in(tree: Any, *, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and name of each object of an own file that a config's tree names."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from names_in(value, key=f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from names_in(value, key=key)
    elif is_own(tree):
        yield key, tree


def register(name: str, value: Any) -> str:
    """Makes an object that a Python call passed known under a name that a config can hold."""
    _loaded[name] = value
    return name


def register_all(values: Mapping[str, Any], *, beside: Any = ()) -> dict[str, str]:
    """`register` for all objects that one call passes, each under a name of its own: two lambdas have one
    `__name__`. Text is a name already.

    Args:
        beside: a config's tree: what it names keeps its meaning.
    """
    taken = {name: _loaded.get(name) for _, name in names_in(beside)}
    found = {}
    for label, value in values.items():
        if isinstance(value, str):
            found[label] = value
            continue
        name = name_of(value)
        while taken.get(name, value) is not value:
            name += "_"
        taken[name] = value
        found[label] = register(name, value)
    return found


def name_of(value: Any) -> str:
    """What a config calls an object that a Python call passed: `file.py:Name`, or `module:Name`."""
    name = str(getattr(value, "__name__", type(value).__name__))
    try:
        file = inspect.getsourcefile(value)
    except TypeError:
        file = None
    where = file if file and file.endswith(".py") else f"{getattr(value, '__module__', 'own')}.py"
    return f"{where}:{re.sub(r'[^0-9A-Za-z_]', '_', name)}"


def load(name: str, *, key: str) -> Any:
    """The object that `file.py:Name` means.

    Args:
        key: the option that holds the name, for errors.

    Raises:
        UserError: it may not run here, there is no such file or name, or the file fails.
    """
    if name in _loaded:
        return _loaded[name]
    found = _SPEC.fullmatch(name)
    if found is None:
        raise UserError(f"{key} is {name!r}; own code is named file.py:Name")
    if name.startswith(PASSED):
        raise UserError(
            f"{key}: {name} was passed by a Python call; pass it again, or name a file in its place"
        )
    if not is_allowed():
        raise UserError(
            f"{key}: {name} is Python code that the config names, and nothing may run it yet: read it, then "
            "add --allow-code to the command (from Python: allow_code=True)"
        )
    module = _module(Path(found["file"]).expanduser(), key)
    if not hasattr(module, found["name"]):
        known = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
        raise UserError(
            f"{key}: {found['file']} has no {found['name']}; it defines {', '.join(known) or 'nothing'}"
            f"{_PASSED_AGAIN if found['name'].endswith('_lambda_') else ''}"
        )
    return _loaded.setdefault(name, getattr(module, found["name"]))


def not_while_loading(call: str) -> None:
    """Refuses a call that works or writes while an own file is loaded, which is done to look up one name.

    Raises:
        UserError: such a file makes it.
    """
    if _loading.get():
        raise UserError(f'it calls {call} when it is loaded; put that below `if __name__ == "__main__":`')


def digest(name: str) -> str | None:
    """Digest of what a loaded object does, as far as its file says: its own source, and that of what it names
    of the same file; numbers and text likewise. What it imports is not looked at.

    Returns:
        None: it has no source, as what was typed at a prompt.
    """
    pieces: dict[str, str] = {}
    try:
        _collect(_loaded[name], pieces)
    except (OSError, TypeError, SyntaxError):
        return None
    told = "\0".join(pieces[label] for label in sorted(pieces))
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def digests(names: Mapping[str, str]) -> dict[str, str]:
    """Label → digest of the object of that name, of those that have a source."""
    found = {label: digest(name) for label, name in names.items()}
    return {label: known for label, known in found.items() if known is not None}


def _collect(value: Any, pieces: dict[str, str]) -> None:
    """Adds the source of an object, and of what it names in its module."""
    if isinstance(value, partial):
        value = value.func
    made = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    if made.__qualname__ in pieces:
        return
    source = textwrap.dedent(inspect.getsource(made))
    pieces[made.__qualname__] = source
    module = vars(sys.modules.get(made.__module__, object))
    for named in _names(source):
        other = module.get(named)
        if _is_constant(other):
            pieces[f"{named} ="] = repr(other)
        elif getattr(other, "__module__", None) == made.__module__:
            _collect(other, pieces)


def _is_constant(value: Any) -> bool:
    """Numbers and text, also in tuples: what nothing fills while a process runs, as it does a list."""
    return isinstance(value, int | float | str) or (
        isinstance(value, tuple) and all(map(_is_constant, value))
    )


def _names(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda within a call: its line is no statement
        return set(re.findall(r"[A-Za-z_]\w*", source))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@contextmanager
def blamed(what: str, modules: Collection[str]) -> Iterator[None]:
    """What own code raises in this block is a UserError that names it, with the frames from its own on. What
    has no frame of it, a lack of memory and another process's end pass as they are.

    Args:
        what: failed, for the sentence.
        modules: that hold the own code (`modules_of`).
    """
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        from onpath.system.distributed import lost_a_peer  # torch, which a config does without

        told = failure(what, error, modules)
        passes = isinstance(error, Exception) and (is_lack_of_memory(error) or lost_a_peer(error))
        if not told.frames or passes:
            raise
        raise told from error


def failure(what: str, error: BaseException, modules: Collection[str], *, on: str = "") -> UserError:
    """What own code has raised, as a sentence; with the frames from its own on, where it has one.

    Args:
        on: what it was given, as in `for the answer 7`.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") not in modules:
        trace = trace.tb_next
    said = dict.fromkeys([type(error).__name__, first_line(error)])  # one word where it says nothing
    told = UserError(f"{what} fails{on and ' '}{on}: {': '.join(said)}")
    told.frames = "".join(traceback.format_tb(trace))
    return told


def modules_of(value: Any) -> set[str]:
    """The modules that hold what an object does, those of its class's bases included; onpath's own, and
    pydantic's, are not the user's."""
    while isinstance(value, partial):
        value = value.func
    made = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
    found = {str(part.__module__) for part in (made.__mro__ if isinstance(made, type) else [made])}
    return {name for name in found if not name.startswith(("onpath.", "pydantic."))}


def check_takes(what: str, own: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Whether what is bound can be called as ours is, which is not.

    Raises:
        UserError: it takes other arguments.
    """
    _, *asked = inspect.signature(ours).parameters.values()
    named = {p.name: p for p in asked if p.kind is p.KEYWORD_ONLY}
    placed = [p.name for p in asked if p.name not in named]
    try:
        takes = inspect.signature(own)
    except ValueError:  # a builtin's, which nobody can tell
        return
    try:
        takes.bind(*placed, **named)
    except TypeError:
        told = ", ".join(["self", *placed, *(["*", *named] if named else [])])
        raise UserError(f"{what} must take ({told}), as docs/extending.md says") from None


def _module(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise UserError(
            f"{key}: there is no file {path}"
            + (
                "; what a script from stdin has passed must be passed again"
                if path.stem == "__main__"
                else ""
            )
        )
    label = f"onpath_own_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if label in sys.modules:
        return sys.modules[label]
    spec = importlib.util.spec_from_file_location(label, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # dataclasses and pydantic look a class's module up by name
    token = _loading.set(True)
    if (home := str(path.resolve().parent)) not in sys.path:
        sys.path.append(home)  # its neighbours; behind all others, so that none of them hides a package
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:  # a script's own argparse ends with the latter
        del sys.modules[label]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        where = f"{key}: {path}" + (f", line {lines[-1]}" if lines else "")
        if isinstance(error, UserError):
            raise UserError(f"{where}: {error}") from error
        raise UserError(f"{where} fails: {type(error).__name__}: {error}") from error
    finally:
        _loading.reset(token)
    return module
