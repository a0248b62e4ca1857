"""Puts the data, the styles and the scripts into one HTML file that loads nothing."""

import base64
import hashlib
from importlib.resources import files
from typing import Any

from onpath.commands.report.charts import COLOURS
from onpath.commands.report.pack import script_json

SCRIPTS = ("base", "chart", "plots", "tokens", "forks", "viewer", "main")
"""Files in `assets`, in the order in which they are joined."""
NOTHING_ELSE = "base-uri 'none'; form-action 'none'"


def page(data: dict[str, Any]) -> str:
    """The whole document. Its policy forbids every request and every script but ours."""
    script = joined_script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; {NOTHING_ELSE}"
    parts = {
        "policy": policy,
        "style": _colours() + asset("page.css"),
        "script": script,
        "data": script_json({**data, "colours": len(COLOURS)}),
    }
    before, *rest = asset("page.html").split("{{")
    return before + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def joined_script() -> str:
    """All scripts in one function of their own: nothing leaks into the page's globals."""
    body = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}}})();\n'


def _colours() -> str:
    """Each as a variable, and the class of what is drawn in it."""
    pairs = [f"--c{i}: light-dark({light}, {dark});" for i, (light, dark) in enumerate(COLOURS)]
    classes = [f".c{i} {{ --c: var(--c{i}); }}" for i in range(len(COLOURS))]
    return f":root {{ {' '.join(pairs)} }}\n{' '.join(classes)}\n"


def asset(name: str) -> str:
    """A package file as text."""
    return (files("onpath.commands.report") / "assets" / name).read_text(encoding="utf-8")
