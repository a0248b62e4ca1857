"""What Python text says before it runs: which modules it will load.

Loaded by path in the processes of programs too, with the standard library alone, and little of it.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import re
import sys

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
