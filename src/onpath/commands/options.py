"""The options of a config as text: those that a first config needs, and all."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator

from onpath.config.describe import Option, describe
from onpath.config.methods import MethodOptions

FIRST = (
    "student.model", "student.lora_rank", "teacher.model", "data.train", "data.eval", "method.name",
    "rollout.prompts", "rollout.max_new_tokens", "optim.steps", "optim.lr", "eval.grader", "run.name",
)  # fmt: skip
"""What a first config needs."""
HOW = "In YAML: section, then key. On the command line: --section.key value, in YAML (null, true)."
_OF_ONE_METHOD = re.compile(r"method\[(.+?)\]")
_WIDEST = 110


def first_options(own: type[MethodOptions] | None = None) -> str:
    """Those of a first config, those of a method of one's own, and where the others are."""
    known = {option[0]: option for option in describe(own)}
    lines = ["options of a first config:", "", *_printed(known[key] for key in FIRST), ""]
    if own is not None:
        name = own.__qualname__
        mine = [(key.replace(f"[{name}]", "", 1), *rest) for key, *rest in known.values() if name in key]
        lines += [f"{name}, its own or other defaults:", "", *_printed(mine), ""]  # type: ignore[arg-type]
    return "\n".join([*lines, *_wrapped(HOW), "All options: onpath config --options"])


def all_options(own: type[MethodOptions] | None = None) -> str:
    """Every option once: a first config's, then the others section by section.

    Args:
        own: options of a method of the user's own.
    """
    groups: dict[str, list[Option]] = {"a first config": []}
    for key, *rest in describe(own):
        groups.setdefault(_group_of(key), []).append((_OF_ONE_METHOD.sub("method", key), *rest))  # type: ignore[arg-type]
    lines = _wrapped(HOW)
    for name, options in groups.items():
        lines += ["", f"{name}:", "", *_printed(options)]
    return "\n".join(lines)


def _group_of(key: str) -> str:
    if key in FIRST:
        return "a first config"
    section = key.partition(".")[0]
    if section == "method":
        return "method, whatever its name"
    own = _OF_ONE_METHOD.fullmatch(section)
    return f"method.name {own[1]}, its own or other defaults" if own else section


def _printed(options: Iterable[Option]) -> Iterator[str]:
    for key, kind, default, text in options:
        yield from _wrapped(f"{key}  ({kind}; default {default})", 2, then=8)
        yield from _wrapped(text, 6)


def _wrapped(text: str, indent: int = 0, *, then: int | None = None) -> list[str]:
    """Lines of a paragraph as wide as the terminal."""
    return textwrap.wrap(
        text,
        min(_WIDEST, shutil.get_terminal_size().columns),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if then is None else then),
        break_long_words=False,
        break_on_hyphens=False,
    )
