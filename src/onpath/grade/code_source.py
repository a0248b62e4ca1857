"""What Python text says before it runs: which modules it will load, and what tests ask of a program.

Loaded by path in the processes of programs too, with the standard library alone, and little of it.
"""

from __future__ import annotations

import builtins
import codecs
import contextlib
import importlib
import re
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import symtable
    from collections.abc import Callable, Iterable
    from typing import Any

FILE = "<tests>"
"""What tests are called in tracebacks."""
_IMPORTS = re.compile(
    r"""(?:^|[;:"'])[ \t]*(?:import[ \t]+([\w., \t]+)"""
    r"""|from[ \t]+([\w.]+)[ \t]+import\b[ \t]*(\([^)]*|[\w, \t]*))"""
    r"""|(?:__import__|import_module)\(\s*["']([\w.]+)["']""",
    re.MULTILINE,
)
_GAPS = re.compile(r"#.*|\(")
"""What may stand between the names of an import."""
_CODECS = re.compile(r"[\"']([\w-]{2,24})[\"']")
_UNHELPFUL = {
    *("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "ensurepip"),
    *("lib2to3", "test", "tests", "__main__"),
}
"""Parts of the standard library that do something when they are loaded, or need a screen. A `__main__` is a
program: it would run before this process is confined."""
_HELP = "argparse shutil textwrap locale copy"
_LATE = {
    "strptime": "_strptime",
    "most_common": "heapq",
    "statistics": "heapq",
    "singledispatch": "weakref typing",
    "UserDict": "copy",
    "argparse": _HELP,
    "optparse": "locale",
    "gettext": "locale struct copy",
    "unittest": f"{_HELP} unittest._log",
    "doctest": f"{_HELP} unittest._log",
    "from_decimal": "decimal",
    "get_docstring": "inspect",
    "ThreadPoolExecutor": "concurrent.futures.thread",
    "Profile": "pstats",
    "idna": "encodings.idna encodings.punycode",
    "etree": "encodings.ascii",
    "minidom": "xml.dom.expatbuilder",
    "pulldom": "xml.dom.minidom xml.sax.expatreader",
    "xml.sax": "xml.sax.expatreader",
    "message_from": "email.parser email.message",
    "set_int_max_str_digits": "_pylong",
    "\\N{": "unicodedata",
}
"""What Python itself loads at first use, by the text that uses it."""
_LENT = {
    *("math", "cmath", "re", "json", "itertools", "functools", "collections", "operator", "datetime"),
    *("decimal", "fractions", "statistics", "copy", "heapq", "bisect", "sys"),
}
"""Modules by which tests judge. Others are asked of the program: it may have a queue, or a calendar, of its
own, and its random is seeded for it alone."""
_FOREIGN = {"np", "numpy", "pd", "pandas", "torch"}
"""What tests may use as if a program had imported it, which none can."""
_OF_SITE = {"exit", "quit", "copyright", "credits", "license", "help"}
_BUILTINS = set(dir(builtins)) - _OF_SITE


def load_modules(source: str) -> None:
    """Loads what a source imports from the standard library, while files can still be opened."""
    names = [module for word, modules in _LATE.items() if word in source for module in modules.split()]
    if not source.isascii():
        names.append("unicodedata")  # for names, which Python normalises
    for plain, whole, of, called in _IMPORTS.findall(source.replace("\\\n", " ")):
        parts = [part.split()[0] for part in _GAPS.sub(" ", plain or of).split(",") if part.strip()]
        names += parts if plain else [called or whole, *(f"{whole}.{part}" for part in parts)]
    for name in dict.fromkeys(names):
        parts, (package, _, last) = name.split("."), name.rpartition(".")
        if parts[0] in sys.stdlib_module_names and _UNHELPFUL.isdisjoint(parts):
            with contextlib.suppress(Exception):  # the program will see it itself
                # What a package loads at first use it loads now: concurrent.futures does so.
                if not package or not hasattr(importlib.import_module(package), last):
                    importlib.import_module(name)
    if re.search("codec|encod|decod", source):
        for name in dict.fromkeys(_CODECS.findall(source)):
            with contextlib.suppress(Exception):  # most words name none
                codecs.lookup(name)


class PythonTests:
    """Tests as Python text: asserts, a function check(candidate), functions test_… as pytest calls them.

    Args:
        entry: the function that they test, where they say so; `check` gets it, as `candidate`.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: they are no Python.

    >>> PythonTests("x = 1\\nassert add(x, 2) == max(3, 0)").needed
    {'add'}
    """

    def __init__(self, source: str, entry: str = "") -> None:
        import ast
        import symtable

        if entry and re.search(r"^def check\(", source, re.MULTILINE):
            source += "\n\ncheck(candidate)\n"
        tree = ast.parse(source, FILE)
        self.code = compile(tree, FILE, "exec", dont_inherit=True)
        scopes = _Scopes(symtable.symtable(source, FILE, "exec"))
        modules = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
        modules += [n.module or "." for n in tree.body if isinstance(n, ast.ImportFrom)]
        self.foreign = {m for m in modules if m.partition(".")[0] not in sys.stdlib_module_names}
        """Modules that they import, and that no process of a program has."""
        tests = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        needy = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and _needs_arguments(n.args)}
        by_itself = scopes.reached(())
        self.uncalled = [name for name in dict.fromkeys(tests) if name not in by_itself | needy]
        """Functions that pytest would call, and the tests do not."""
        reached = scopes.reached(self.uncalled)
        self.entry = {"candidate", entry.rpartition(".")[2]} if entry else set()
        """How they call the function that they test."""
        free = reached - (_BUILTINS - self.entry) - scopes.bound
        spaces = _spaces(tree) & free - self.entry
        self.borrowed = spaces & _LENT if entry or free - _LENT else set()
        """Modules that they use and do not import: what they say is no program's to give."""
        self.strangers = spaces & _FOREIGN
        """Others that they use so, and that no process of a program has."""
        self.asked = reached - _BUILTINS - self.entry - self.borrowed
        """Global names that they look up: the program's, and some that they define themselves."""
        self.needed = free - self.borrowed
        """Those of them that they do not define."""
        nodes = list(ast.walk(tree))
        called = [node.func for node in nodes if isinstance(node, ast.Call)]
        names = {function.id for function in called if isinstance(function, ast.Name)}
        if not self.needed and not entry:
            asserted = {id(n) for a in nodes if isinstance(a, ast.Assert) for n in ast.walk(a.test)}
            tested = {f.id for f in called if isinstance(f, ast.Name) and id(f) in asserted}
            own = names & _BUILTINS - scopes.bound
            # A function of the program's may be called like a built-in one, if that is the only one which the
            # tests call: none on which a verdict rests can be replaced.
            if len(own) == 1 and own <= tested & reached:
                self.asked = self.needed = own
        self.functions = names & (self.needed | self.entry)
        """Those that they call by their names."""
        parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.calls = bool(entry or set(map(_root, called)) & (self.needed | parameters))
        """Whether they call something of the program's; else its values are all that they look at."""


def load_borrowed(read: Callable[[str, str], PythonTests], source: str, entry: str) -> None:
    """Loads what tests use without importing it, while files can still be opened.

    Args:
        read: `PythonTests`.
    """
    try:
        borrowed = read(source, entry).borrowed
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # it is said where they run
    for name in borrowed:
        importlib.import_module(name)


def _spaces(tree: Any) -> set[str]:
    """Names of which nothing but attributes is asked, as of a module."""
    import ast

    nodes = list(ast.walk(tree))
    named = [n.value for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    inside = {id(name) for name in named}
    return {name.id for name in named} - {
        n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in inside
    }


def _needs_arguments(arguments: Any) -> bool:
    return bool(arguments.posonlyargs or arguments.args or arguments.kwonlyargs)


def _root(node: Any) -> str:
    """`Solution` of `Solution().f`, `s` of `s.held[0]`."""
    while not hasattr(node, "id"):
        node = getattr(node, "func", None) or getattr(node, "value", None)
        if node is None:
            return ""
    return str(node.id)


class _Scopes:
    """The global names of a module: which it defines, and which are looked up where."""

    def __init__(self, module: symtable.SymbolTable) -> None:
        every = [module]
        for table in every:
            every += table.get_children()
        self.bound = {
            symbol.get_name()
            for table in every
            for symbol in table.get_symbols()
            if (symbol.is_assigned() or symbol.is_imported())
            and (table is module or symbol.is_declared_global())
        }
        self._named: dict[str, list[symtable.SymbolTable]] = {}
        self._at_once = _globals(module)
        for child in module.get_children():
            if child.get_name() in self.bound:
                self._named.setdefault(child.get_name(), []).append(child)
            else:  # a lambda, or a comprehension
                self._at_once |= _globals_within(child)
            if child.get_type() == "class":  # its body runs, and its methods do not
                self._at_once |= _globals(child)

    def reached(self, called: Iterable[str]) -> set[str]:
        """Names that are looked up if the module is run, and these functions of it are called."""
        reached: set[str] = set()
        queue = [*self._at_once, *called]
        while queue:
            name = queue.pop()
            if name not in reached:
                reached.add(name)
                for table in self._named.get(name, ()):
                    queue += _globals_within(table)
        return reached


def _globals(table: symtable.SymbolTable) -> set[str]:
    return {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}


def _globals_within(table: symtable.SymbolTable) -> set[str]:
    return _globals(table).union(*map(_globals_within, table.get_children()))
