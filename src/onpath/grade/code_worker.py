"""The process in which a model's program runs, and the one that runs the tests. Started by `sandbox.py`.

    script    the program as a script: its input and output are files that the parent gave it
    program   the program as a module: answers what `tests` asks, name by name and call by call
    tests     runs the tests; what they name of the program is asked of `program` over a pipe

Tests and program share no memory. Only plain values come back from the program (numbers, text, lists, dates,
…), built anew on the side of the tests, so that no object of the program's takes part in a comparison. The
verdict is said by `tests`, over a pipe that the program does not have.

Run by path, with the standard library alone, and little of it: there is a new process for every program.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import signal
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

UNCONFINED = 97
"""Exit code: this machine cannot confine a process; stderr says why. The program has not run."""
LONGEST_REPLY = 1 << 26
"""Bytes of one message."""
MODULES = ("fractions", "decimal", "datetime")
"""Of the standard library's values that are plain too; loaded in both processes where one of them uses it."""
_ENDINGS = (StopIteration, StopAsyncIteration)
"""Exceptions that end a loop of the tests', as if all of it had been seen."""


def main(spec: Mapping[str, Any]) -> int:
    """Reads what to run, gives everything up, and runs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    seccomp = _beside("seccomp")
    with os.fdopen(spec["source"], "rb") as file:
        given = json.loads(file.read())
    seccomp.limit(memory=spec["memory"], cpu_seconds=spec["cpu"], file_bytes=spec["file_bytes"])
    sys.argv = ["program"]  # a module may look at it when it is loaded
    source = _beside("code_source")
    source.load_modules("\n".join(text for text in given.values() if isinstance(text, str)))
    for name in (*spec["modules"], *(("ast", "symtable") if spec["role"] == "tests" else ())):
        importlib.import_module(name)
    read = functools.cache(source.PythonTests)
    if spec["role"] == "tests" and isinstance(given.get("tests"), str):
        source.load_borrowed(read, given["tests"], given.get("entry_point") or "")
    os.environ.clear()
    if spec["confined"]:
        try:
            seccomp.confine()
        except seccomp.Unconfined as error:
            sys.stderr.write(str(error))
            return UNCONFINED
    if spec["role"] == "script":
        _as_main(given["program"])
    elif spec["role"] == "program":
        serve(given["program"], Peer(*spec["peer"]), spec["modules"])
    else:
        said = judge(given, Peer(*spec["peer"]), spec["modules"], read)
        os.write(spec["verdict"], json.dumps(said).encode())
    return 0


def _beside(name: str) -> Any:
    """A file beside this one, by its path: onpath itself is not imported."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _as_main(source: str) -> None:
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # as `site` has it, which is not here
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(source, "<program>", "exec"), module.__dict__)


class Peer:
    """The other process: a line of JSON each way.

    Args:
        reading, writing: descriptors.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._in: BinaryIO = os.fdopen(reading, "rb")
        self._out: BinaryIO = os.fdopen(writing, "wb")

    def send(self, message: Any) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def receive(self) -> Any:
        """None: it has ended, or says too much."""
        line = self._in.readline(LONGEST_REPLY)
        return json.loads(line) if line.endswith(b"\n") else None


class Named(tuple):  # type: ignore[type-arg]
    """A namedtuple of the other side's: a tuple whose values have names."""

    @classmethod
    def of(cls, number: int | None, fields: Sequence[str], values: Sequence[Any]) -> Named:
        """`number`: of the object that it stands for; None: it is no object of the other side's."""
        made = cls(values)
        # A name of a tuple's own, such as `count`, is a value's too, but no function of the program's is.
        named = {
            name: value
            for name, value in zip(fields, values, strict=True)
            if not (hasattr(cls, name) and isinstance(value, Remote))
        }
        made.__dict__.update({**named, "_fields": tuple(fields)})
        made.__dict__["_number"] = number
        return made

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self.__dict__["_fields"], self, strict=True))


class Wire:
    """Values as JSON, and back: of exact types of Python's own, with a tag where JSON has no such type.

    Lists, dicts and other values that can change are numbered in the order in which they are met, the same on
    both sides: so the same list is the same one there, and what is done to it comes back.

    Args:
        keep: numbers what has no plain form; kept: what stands for such a number.
        modules: of `MODULES`, those that both sides have.
    """

    def __init__(
        self, keep: Callable[[Any], int | None], kept: Callable[[int], Any], modules: Sequence[str]
    ) -> None:
        self._keep, self._kept, self._modules = keep, kept, modules
        self.shared: list[Any] = []
        self._places: dict[int, int] = {}

    def pack(self, value: Any) -> Any:
        """A value as JSON."""
        if value is None or type(value) in (bool, float):
            return value
        if isinstance(value, int):
            whole = int.__add__(value, 0)
            return whole if abs(whole) < 1 << 62 else {"int": hex(whole)}
        if isinstance(value, float):
            return float.__add__(value, 0.0)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bytes):
            return {"bytes": bytes(value).hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, _CHANGING):
            return self._pack_changing(value)
        for kind in (tuple, frozenset):
            if isinstance(value, kind):
                values = [self.pack(v) for v in kind.__iter__(value)]  # type: ignore[arg-type]
                return self._pack_named(value, values) or {kind.__name__: values}
        if type(value) is range:
            return {"range": [self.pack(part) for part in (value.start, value.stop, value.step)]}
        name = type(value).__name__
        if name in _LIBRARY and type(value) is self._of_library(name):
            return {name: [self.pack(part) for part in _LIBRARY[name][1](value)]}
        return {"kept": self._keep(value)}

    def _pack_named(self, value: Any, values: list[Any]) -> Any:
        fields = getattr(type(value), "_fields", None)
        if isinstance(value, Named):
            fields = value.__dict__["_fields"]
            if value.__dict__["_number"] is not None:
                return {"kept": value.__dict__["_number"]}
        if type(value) is tuple or not isinstance(fields, tuple) or len(fields) != len(values):
            return None
        return {"named": [self._keep(value), list(map(str, fields)), values]}

    def _pack_changing(self, value: Any) -> Any:
        if id(value) in self._places:
            return {"same": self._places[id(value)]}
        self._share(value)
        if isinstance(value, list):
            return self.contents(value)
        kind = next(k for k in _CHANGING if type(value) is k or (k in _PLAIN and isinstance(value, k)))
        more: Any = None
        if kind is deque:
            more = value.maxlen
        if kind is defaultdict and value.default_factory in _FACTORIES:
            more = value.default_factory.__name__
        return {kind.__name__: [self.contents(value), more]}

    def _share(self, value: Any) -> None:
        self._places[id(value)] = len(self.shared)
        self.shared.append(value)  # which keeps it, and so its id

    def contents(self, value: Any) -> Any:
        """What is in a value that can change, as JSON."""
        if isinstance(value, bytearray):
            return bytes(value).hex()
        if isinstance(value, dict):
            # Its own order, which is not that of its dict.
            items = OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value)
            return [[self.pack(k), self.pack(v)] for k, v in items]
        kind: Any = next(k for k in (list, set, deque) if isinstance(value, k))
        return [self.pack(v) for v in kind.__iter__(value)]

    def fill(self, value: Any, contents: Any) -> None:
        """Makes these the contents of a value that can change."""
        if isinstance(value, bytearray):
            value[:] = bytes.fromhex(contents)
        elif isinstance(value, list):
            value[:] = [self.unpack(v) for v in contents]
        elif isinstance(value, dict):
            pairs = [(self.unpack(k), self.unpack(v)) for k, v in contents]
            value.clear()
            for key, held in pairs:
                value[key] = held
        else:
            values = [self.unpack(v) for v in contents]
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(values)

    def unpack(self, message: Any) -> Any:
        """The value of what `pack` made."""
        if isinstance(message, list):
            message = {"list": [message, None]}
        if not isinstance(message, dict):
            return message
        ((tag, held),) = message.items()
        if tag in _EMPTY:
            made = _EMPTY[tag](held[1])
            self._share(made)
            self.fill(made, held[0])
            return made
        if tag == "named":
            number, fields, values = held
            return Named.of(number, list(map(str, fields)), [self.unpack(v) for v in values])
        if tag in _LIBRARY:
            return _LIBRARY[tag][2](self._of_library(tag), [self.unpack(part) for part in held])
        readers: dict[str, Callable[[Any], Any]] = {
            "same": self.shared.__getitem__,
            "int": lambda text: int(text, 16),
            "bytes": bytes.fromhex,
            "complex": lambda pair: complex(*pair),
            "tuple": lambda values: tuple([self.unpack(v) for v in values]),
            "frozenset": lambda values: frozenset([self.unpack(v) for v in values]),
            "range": lambda parts: range(*(self.unpack(part) for part in parts)),
            "kept": self._kept,
        }
        return readers[tag](held)

    def _of_library(self, name: str) -> Any:
        module = _LIBRARY[name][0]
        return getattr(sys.modules[module], name) if module in self._modules else None


_CHANGING = (list, Counter, OrderedDict, defaultdict, dict, set, deque, bytearray)
_PLAIN = (dict, set, deque, bytearray)
"""What a class derived from them is taken for."""
_FACTORIES = (int, float, str, bool, list, dict, set, tuple)
_EMPTY: dict[str, Callable[[Any], Any]] = {
    "list": lambda _: [],
    "dict": lambda _: {},
    "set": lambda _: set(),
    "bytearray": lambda _: bytearray(),
    "Counter": lambda _: Counter(),
    "OrderedDict": lambda _: OrderedDict(),
    "deque": lambda longest: deque(maxlen=longest),
    "defaultdict": lambda name: defaultdict({kind.__name__: kind for kind in _FACTORIES}.get(name)),
}
_LIBRARY: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "Fraction": ("fractions", lambda v: [v.numerator, v.denominator], lambda kind, parts: kind(*parts)),
    "Decimal": ("decimal", lambda v: [str(v)], lambda kind, parts: kind(*parts)),
    "timedelta": (
        "datetime",
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda kind, parts: kind(*parts),
    ),
    **{
        name: ("datetime", lambda v: [v.isoformat()], lambda kind, parts: kind.fromisoformat(*parts))
        for name in ("date", "time", "datetime")
    },
}
"""Name of a type → its module, its parts, and how it is made of them."""


@contextlib.contextmanager
def _depth() -> Iterator[None]:
    """Room for nested values: a level takes four calls here, where a program needs one."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 5_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def serve(source: str, peer: Peer, modules: Sequence[str]) -> None:
    """The program's side: loads it, then answers until the tests have ended."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects: list[Any] = [module]
    numbers: dict[int, int] = {}

    def keep(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)  # which keeps it, and so its id
        return numbers[id(value)]

    def answer(what: str, held: Any, rest: Sequence[Any]) -> Any:
        if what == "load":
            exec(compile(source, "<program>", "exec"), module.__dict__)
            return None
        if what == "name":
            return _named(module, rest[0])
        if what == "call":
            return held(*arguments, **keywords)
        return _OPERATIONS[what](held, *rest, *arguments)

    while (request := peer.receive()) is not None:
        wire = Wire(keep, objects.__getitem__, modules)
        with _depth():
            arguments, keywords = wire.unpack(request.pop())
        given = len(wire.shared)
        what, number, *rest = request
        reply: dict[str, Any] = {}
        try:
            value = answer(what, objects[number], rest)
        except BaseException as error:
            reply = _raised(error)
        try:
            with _depth():  # what a call did to its arguments, which the tests may look at, comes first
                reply["changed"] = [wire.contents(each) for each in wire.shared[:given]]
                if "error" not in reply:
                    reply["value"] = wire.pack(value)
        except BaseException as error:
            reply = reply if "error" in reply else _raised(error)
        peer.send(reply)


def _raised(error: BaseException) -> dict[str, Any]:
    return {"error": type(error).__name__, "said": _words(error)}


def _words(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:  # of its own, or of an object of the program's in it
        return ""


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "item": lambda held, key: held[key],
    "set item": lambda held, key, value: held.__setitem__(key, value),
    "contains": lambda held, value: value in held,
    "bool": bool,
    "len": len,
    "list": list,
    "str": str,
    "repr": repr,
}
"""What the tests may do to an object of the program's, besides calling it."""


def _named(module: types.ModuleType, path: str) -> Any:
    """A name of the program's, such as `f`, or `Solution().f`; also a method of its class Solution."""
    first, *rest = path.split(".")
    if not rest and not hasattr(module, first) and hasattr(module, "Solution"):
        first, rest = "Solution()", [first]
    value = getattr(module, first.removesuffix("()"))
    value = value() if first.endswith("()") else value
    for part in rest:
        value = getattr(value, part)
    return value


class Remote:
    """On the tests' side: an object of the program's that is no plain value. Equal to itself alone."""

    __slots__ = ("__ask", "__number")
    __ask: Callable[..., Any]
    __number: int

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_Remote__ask", ask)
        object.__setattr__(self, "_Remote__number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__ask("call", self.__number, arguments=arguments, keywords=keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_Remote__")):
            raise AttributeError(name)
        return self.__ask("get", self.__number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__ask("set", self.__number, name, arguments=(value,))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__ask("list", self.__number))

    def __len__(self) -> int:
        return int(self.__ask("len", self.__number))

    def __bool__(self) -> bool:
        return self.__ask("bool", self.__number) is True

    def __contains__(self, value: Any) -> bool:
        return self.__ask("contains", self.__number, arguments=(value,)) is True

    def __getitem__(self, key: Any) -> Any:
        return self.__ask("item", self.__number, arguments=(key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__ask("set item", self.__number, arguments=(key, value))

    def __str__(self) -> str:
        return str.__str__(self.__ask("str", self.__number))

    def __repr__(self) -> str:
        return str.__str__(self.__ask("repr", self.__number))


class Gone(Exception):
    """The program has ended before the tests have."""


class Untested(Exception):
    """The tests came to their end, and tested nothing of the program's.

    Args:
        fault: whatever it does, they would not.
    """

    def __init__(self, reason: str, *, fault: bool) -> None:
        super().__init__(reason)
        self.fault = fault


class Asking:
    """On the tests' side: what is asked of the program."""

    def __init__(self, peer: Peer, modules: Sequence[str]) -> None:
        self.peer, self._modules = peer, modules
        self.calls, self.others = 0, 0
        """Calls, and what else was asked, names aside."""
        self._remotes: dict[int, Remote] = {}

    def __call__(
        self, what: str, number: int, *rest: Any, arguments: Any = (), keywords: Mapping[str, Any] = {}
    ) -> Any:
        wire = Wire(_number_of, self.remote, self._modules)
        with _depth():
            sent = wire.pack((list(arguments), dict(keywords)))
        given = wire.shared[:]
        self.calls += what == "call"
        self.others += what not in ("call", "name", "load")
        try:
            self.peer.send([what, number, *rest, sent])
            reply = self.peer.receive()
        except (OSError, ValueError):
            reply = None
        if not isinstance(reply, dict):
            raise Gone("it ended, or said what is no reply")
        with _depth():
            for ours, theirs in zip(given, reply.get("changed") or [], strict=False):
                wire.fill(ours, theirs)
            if "error" in reply:
                raise _error(str(reply["error"]), str(reply.get("said")))
            return wire.unpack(reply.get("value"))

    def remote(self, number: int) -> Remote:
        """The same for the same object, so that it is equal to itself."""
        return self._remotes.setdefault(number, Remote(self, number))


def _number_of(value: Any) -> int | None:
    if isinstance(value, Remote):
        return int(object.__getattribute__(value, "_Remote__number"))
    if isinstance(value, tuple):  # a namedtuple of the tests' own
        return None
    raise TypeError(f"a test passes a {type(value).__name__}; only plain values can be passed to a program")


def _error(name: str, said: str) -> Exception:
    """What the program raised, as the built-in exception of that name; no more than an Exception, and none
    that would end a loop of the tests'."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _ENDINGS):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError wants more
            return kind(said)
    return RuntimeError(f"{name}: {said}")


def judge(given: Mapping[str, Any], peer: Peer, modules: Sequence[str], read: Any) -> dict[str, Any]:
    """The tests' side: whether all of them hold. `fault`: the tests themselves cannot be used.

    Args:
        given: `tests`, Python text, with `setup`, what the program completes; or `calls`, a list of
            (arguments, result); and `entry_point`.
        read: `code_source.PythonTests`, once for the same text.
    """
    ask = Asking(peer, modules)
    try:
        run = _calls(given, ask) if given.get("calls") else _assertions(given, ask, read)
    except (SyntaxError, ValueError, RecursionError) as error:
        return {"passed": False, "fault": True, "reason": f"{type(error).__name__}: {error}"}
    try:
        ask("load", 0)
    except Exception as error:
        return {"passed": False, "fault": False, "reason": f"the program does not load: {_told(error)}"}
    try:
        run()
    except Untested as error:
        return {"passed": False, "fault": error.fault, "reason": str(error)}
    except BaseException as error:
        return {"passed": False, "fault": False, "reason": _told(error)}
    return {"passed": True, "fault": False, "reason": "passed"}


def _told(error: BaseException) -> str:
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" (line {line} of the tests)" if line else ""
    return f"{type(error).__name__}: {_words(error)[:200]}{where}"


def _assertions(given: Mapping[str, Any], ask: Asking, read: Any) -> Callable[[], None]:
    """Python tests: see `PythonTests`."""
    entry = given.get("entry_point")
    tests = read(given["tests"], entry or "")

    def run() -> None:
        space: dict[str, Any] = {"__name__": "__main__"}
        try:  # a stub's imports and helpers, which tests may use
            exec(compile(given.get("setup") or "", "<setup>", "exec"), space)
        except Exception:
            space = {"__name__": "__main__"}
        space = {**{name: importlib.import_module(name) for name in tests.borrowed}, **space}
        needed = (tests.needed | tests.entry) - (set(space) - tests.entry)
        came: dict[str, Any] = dict.fromkeys(tests.entry, ask("name", 0, entry)) if entry else {}
        for name in sorted(tests.asked - set(space) - tests.entry):
            try:
                came[name] = ask("name", 0, name)
            except AttributeError:
                continue  # what the tests define themselves, and what nobody does
        if plain := [name for name in tests.functions & set(came) if not isinstance(came[name], Remote)]:
            raise Untested(f"{min(plain)} is no function", fault=False)
        space.update(came)
        exec(tests.code, space)
        for name in tests.uncalled:
            space[name]()
        if not ask.calls and (tests.calls or not needed or needed - set(came)):
            # Had the program any part in it? It has none where all that is asked for are its functions.
            functions = all(isinstance(came.get(name), Remote) for name in needed)
            raise Untested("they call nothing of the program's", fault=functions and not ask.others)

    return run


def _calls(given: Mapping[str, Any], ask: Asking) -> Callable[[], None]:
    """Arguments and results as JSON has them: tuples are lists, and a result may stand in a list of one."""
    calls = [(list(arguments), expected) for arguments, expected in given["calls"]]

    def run() -> None:
        function = ask("name", 0, given["entry_point"])
        for number, (arguments, expected) in enumerate(calls):
            found = json.loads(json.dumps(function(*arguments)))
            if found != expected and [found] != expected:
                raise AssertionError(f"test {number} gives {str(found)[:60]}, not {str(expected)[:60]}")

    return run
