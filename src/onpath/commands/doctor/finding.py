"""What one check found, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onpath.system import distributed
from onpath.system.errors import UserError

Status = Literal["ok", "warning", "fail", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    >>> Finding(name="context", status="ok", message="longest prompt 60 tokens").status
    'ok'
    """

    name: str
    """Stable: scripts read it."""
    status: Status
    message: str
    """What was measured, with its number."""
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers, JSON-ready, with units in their names; None where something could not be measured."""


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check's finding; a `UserError` on the way is one too, so that the checks after it still run."""
    try:
        return check()
    except UserError as error:
        alone(error)
        return Finding(name=name, status="fail", message=str(error))


def alone(error: Exception) -> None:
    """What goes wrong is a finding where no other process waits for this one.

    Raises:
        Exception: there are others; `distributed.one_fate` tells them.
    """
    if distributed.world() > 1:
        raise error


def about(teacher: str | None, finding: Finding) -> Finding:
    """Of one of several teachers; None: there is one, or it is of all."""
    if teacher is None:
        return finding
    values = {"teacher": teacher, **finding.values}
    return replace(finding, message=f"teachers.{teacher}: {finding.message}", values=values)


def skipped(name: str, why: str) -> Finding:
    return Finding(name=name, status="skipped", message=why)
