"""What differs between the config that a run was begun with and the one that is to go on with it. No torch.

Which options may change stands at the option (`onpath.config.section.OnResume`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from onpath.config.idle import idle_options
from onpath.config.section import OnResume, Section
from onpath.config.sections import teacher_option
from onpath.config.whole import Config
from onpath.data.tasks import task_of
from onpath.system import code

Rule = Literal["neutral", "rounding", "longer", "asked"]
_OF_MASKS = ("optim.micro_batch_tokens", "parallel.shard", "parallel.balance")
"""Options that say in which order a process runs which micro-batches: student.dropout draws its masks so."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One option that has another value now.

    >>> Change(key="optim.lr", before=1e-3, after=2e-3, rule="asked").allowed
    False
    """

    key: str
    before: Any
    after: Any
    rule: Rule
    """Why a run may go on with it; asked: only if somebody says so."""

    @property
    def allowed(self) -> bool:
        """Whether a run may go on with it without being told to."""
        return self.rule != "asked"


def changes(before: Mapping[str, Any], after: Config) -> list[Change]:
    """Options that differ, by key. Another spelling of the same place is no difference.

    Args:
        before: the stored config as plain data.
    """
    then, now = _sections(before), _sections(after.model_dump(mode="json"))
    pairs = sorted({(s, k) for tree in (then, now) for s, options in tree.items() for k in options or ()})
    found = []
    for section, option in pairs:
        key = f"{section}.{option}"
        how = _how(after, section, option)
        old, new = was, is_now = _at(then, section, option), _at(now, section, option)
        if after.student.dropout and key in _OF_MASKS:
            how = None
        if how == "place":
            how, old, new = None, _placed(old), _placed(new)
        if old == new:
            continue
        shrinks = how == "longer" and not (isinstance(old, int) and new > old)
        rule: Rule = "asked" if how is None or shrinks else how
        if rule == "asked" and all(_unread(after, section, option, value) for value in (was, is_now)):
            rule = "neutral"  # what a run warns of may be taken out
        found.append(Change(key=key, before=was, after=is_now, rule=rule))
    return found


def own_code(config: Config) -> dict[str, str]:
    """Option → the own code that it names, if that decides numbers: a tracker does not."""
    named: dict[str, Any] = {
        "method.name": config.method.name,
        "method.divergence": getattr(config.method, "divergence", None),
        "eval.grader": config.eval.grader,
        **{f"rewards.{label}.name": reward.name for label, reward in config.rewards.items()},
    }
    return {key: name for key, name in named.items() if code.is_own(name)}


def _sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Section → options; each of several teachers is one."""
    several = tree.get("teachers") or {}
    return {**tree, "teachers": None, **{teacher_option(name): options for name, options in several.items()}}


def _how(config: Config, section: str, key: str) -> Any:
    """How an option may change; None: not at all."""
    options = _section(config, section)
    if not isinstance(options, Section) or key not in type(options).model_fields:
        return None
    marks = [m.how for m in type(options).model_fields[key].metadata if isinstance(m, OnResume)]
    return marks[0] if marks else None


def _unread(config: Config, section: str, option: str, value: Any) -> bool:
    """Whether an option of this value is read by nothing beside the config's others, or is not set at all."""
    tree = config.model_dump(mode="json")
    *path, last = section.split(".")
    held = tree
    for part in path:
        held = held[part]
    if not isinstance(options := held.get(last), dict) or option not in options:
        return False
    options[option] = value
    try:
        asked = Config.model_validate(tree)
    except ValidationError:  # nobody can tell what would read it
        return False
    found = _section(asked, section)
    default = type(found).model_fields[option].get_default(call_default_factory=True)
    return getattr(found, option) == default or f"{section}.{option}" in idle_options(asked)


def _section(config: Config, name: str) -> Any:
    several = {teacher_option(label): teacher for label, teacher in config.teachers.items()}
    return several.get(name, getattr(config, name, None))


def _at(tree: Mapping[str, Any], section: str, key: str) -> Any:
    return (tree.get(section) or {}).get(key)


def _placed(value: Any) -> Any:
    """Paths as they are from the root; a task's names and those of a hub stay alike too."""
    if isinstance(value, Mapping):
        return {name: _placed(place) for name, place in value.items()}
    if not isinstance(value, str) or task_of(value):
        return value
    return os.path.abspath(os.path.expanduser(value))
