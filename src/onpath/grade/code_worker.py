"""The process in which a model's program runs, and the one that runs the tests. Started by `sandbox.py`.

    script    the program as a script: its input and output are files that the parent gave it
    program   the program as a module: answers what `tests` asks, name by name and call by call
    tests     runs the tests; what they name of the program is asked of `program` over a pipe

Tests and program share no memory. Only plain values come back from the program (numbers, text, lists, …),
built anew on the side of the tests, so that no object of the program's takes part in a comparison. The
verdict is said by `tests`, over a pipe that the program does not have.

Run by path, with the standard library alone, and little of it: there is a new process for every program.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

UNCONFINED = 97
"""Exit code: this machine cannot confine a process; stderr says why. The program has not run."""
LONGEST_REPLY = 1 << 26
"""Bytes of one message."""
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
    _beside("code_source").load_modules("\n".join(v for v in given.values() if isinstance(v, str)))
    if spec["role"] == "tests":
        importlib.import_module("ast")
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
        serve(given["program"], Peer(*spec["peer"]))
    else:
        said = judge(given, Peer(*spec["peer"]))
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


def plain(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as JSON, with a tag where JSON has no such type; `keep` numbers what has no plain form."""
    if value is None or type(value) in (bool, float):
        return value
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        whole = int.__add__(value, 0)
        return whole if abs(whole) < 1 << 62 else {"int": hex(whole)}
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [plain(v, keep) for v in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[plain(k, keep), plain(v, keep)] for k, v in dict.items(value)]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [plain(v, keep) for v in kind.__iter__(value)]}  # type: ignore[arg-type]
    return {"kept": keep(value)}


def built(message: Any, kept: Callable[[int], Any]) -> Any:
    """The value of a message, of exact built-in types; `kept` says what stands for a number of `plain`."""
    if isinstance(message, list):
        return [built(v, kept) for v in message]
    if not isinstance(message, dict):
        return message
    ((tag, held),) = message.items()
    if tag == "dict":
        return {built(k, kept): built(v, kept) for k, v in held}
    if tag in ("tuple", "set", "frozenset"):
        return getattr(builtins, tag)(built(v, kept) for v in held)
    readers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "bytes": bytes.fromhex,
        "complex": lambda pair: complex(*pair),
        "kept": kept,
    }
    return readers[tag](held)


def serve(source: str, peer: Peer) -> None:
    """The program's side: loads it, then answers until the tests have ended."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects: list[Any] = [module]

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(request: list[Any]) -> Any:
        what, number, *rest = request
        held = objects[number]
        if what == "load":
            exec(compile(source, "<program>", "exec"), module.__dict__)
            return None
        if what == "name":
            return _named(module, rest[0])
        if what == "get":
            return getattr(held, rest[0])
        if what == "call":
            return held(*arguments, **keywords)
        if what == "item":
            return held[arguments[0]]
        if what == "bool":
            return bool(held)
        return list(held) if what == "list" else len(held)

    while (request := peer.receive()) is not None:
        arguments, keywords = (built(part, objects.__getitem__) for part in request.pop())
        try:
            value = plain(answer(request), keep)
            # What a call did to its arguments, which the tests may look at.
            changed = [plain(a, keep) if isinstance(a, list | dict | set) else None for a in arguments]
            reply = {"value": value, "arguments": changed}
        except BaseException as error:
            reply = {"error": type(error).__name__, "said": str(error)[:300]}
        peer.send(reply)


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

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self._ask, self._number = ask, number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", self._number, arguments=arguments, keywords=keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self._number, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("list", self._number))

    def __len__(self) -> int:
        return int(self._ask("len", self._number))

    def __bool__(self) -> bool:
        return self._ask("bool", self._number) is True

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self._number, arguments=(key,))


class Gone(Exception):
    """The program has ended before the tests have."""


class Asking:
    """On the tests' side: what is asked of the program."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.calls = peer, 0

    def __call__(
        self, what: str, number: int, *rest: Any, arguments: Any = (), keywords: Mapping[str, Any] = {}
    ) -> Any:
        sent = [plain(list(arguments), _no_number), plain(dict(keywords), _no_number)]
        self.calls += what == "call"
        try:
            self.peer.send([what, number, *rest, sent])
            reply = self.peer.receive()
        except (OSError, ValueError):
            reply = None
        if not isinstance(reply, dict):
            raise Gone("it ended, or said what is no reply")
        if "error" in reply:
            raise _error(str(reply["error"]), str(reply.get("said")))
        for ours, theirs in zip(arguments, reply.get("arguments") or [], strict=False):
            _take_over(ours, built(theirs, self.remote))
        return built(reply.get("value"), self.remote)

    def remote(self, number: int) -> Remote:
        return Remote(self, number)


def _no_number(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test passes a {type(value).__name__}; only plain values can be passed to a program")


def _take_over(ours: Any, theirs: Any) -> None:
    if isinstance(ours, list) and isinstance(theirs, list):
        ours[:] = theirs
    elif (isinstance(ours, dict) and isinstance(theirs, dict)) or (
        isinstance(ours, set) and isinstance(theirs, set)
    ):
        ours.clear()
        ours.update(theirs)


def _error(name: str, said: str) -> Exception:
    """What the program raised, as the built-in exception of that name; no more than an Exception, and none
    that would end a loop of the tests'."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _ENDINGS):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError wants more
            return kind(said)
    return RuntimeError(f"{name}: {said}")


def judge(given: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
    """The tests' side: whether all of them hold. `fault`: the tests themselves cannot be used."""
    ask = Asking(peer)
    try:
        run = _calls(given, ask) if given.get("calls") else _assertions(given, ask)
    except (SyntaxError, ValueError, RecursionError) as error:
        return {"passed": False, "fault": True, "reason": f"{type(error).__name__}: {error}"}
    try:
        ask("load", 0)
    except Exception as error:
        return {"passed": False, "fault": False, "reason": f"the program does not load: {_told(error)}"}
    try:
        run()
    except BaseException as error:
        return {"passed": False, "fault": False, "reason": _told(error)}
    if not ask.calls:
        return {"passed": False, "fault": True, "reason": "they call nothing of the program's"}
    return {"passed": True, "fault": False, "reason": "passed"}


def _told(error: BaseException) -> str:
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" (line {line} of the tests)" if line else ""
    return f"{type(error).__name__}: {str(error)[:200]}{where}"


def _assertions(given: Mapping[str, Any], ask: Asking) -> Callable[[], None]:
    """Python tests: asserts, or a function check(candidate) with the name that it is to be called with."""
    import ast

    source, entry = given["tests"], given.get("entry_point")
    if entry and re.search(r"^def check\(", source, re.MULTILINE):
        source += "\n\ncheck(candidate)\n"
    tree = ast.parse(source, "<tests>")
    code = compile(tree, "<tests>", "exec")
    asked = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(dir(builtins))

    def run() -> None:
        space: dict[str, Any] = {"__name__": "tests"}
        try:  # a stub's imports and helpers, which tests may use
            exec(compile(given.get("setup") or "", "<setup>", "exec"), space)
        except Exception:
            space = {"__name__": "tests"}
        if entry:
            space["candidate"] = space[entry.rpartition(".")[2]] = ask("name", 0, entry)
        for name in sorted(asked - set(space)):
            try:
                space[name] = ask("name", 0, name)
            except AttributeError:
                continue  # what the tests define themselves, and what nobody does
        exec(code, space)

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
