"""A grader of the user's own: `mine.py:grade`, a function of (text, answer) → bool."""

import inspect
from collections.abc import Callable

import numpy as np

from onpath.grade.base import Grader, Verdict
from onpath.grade.exact import last_line
from onpath.system import code
from onpath.system.errors import UserError


class OwnGrader(Grader):
    """Calls the function; what it shows as extracted is the last line.

    Args:
        name: of the function, as configs and results call it.
    """

    def __init__(self, function: Callable[[str, str], bool], *, name: str) -> None:
        if not callable(function):
            raise UserError(f"eval.grader: {name} must be a function of (text, answer), not {function!r}")
        try:
            inspect.signature(function).bind("text", "answer")
        except TypeError as error:
            raise UserError(f"eval.grader: {name} must be a function of (text, answer): {error}") from None
        except ValueError:
            pass  # some builtins have none
        self.function, self.name = function, name

    def _judge(self, text: str, answer: str) -> Verdict:
        try:
            said = self.function(text, answer)
        except code.FAILURES as error:
            on, modules = f"for the answer {answer[:60]!r}", code.modules_of(self.function)
            raise code.failure(f"eval.grader: {self.name}", error, modules, on=on) from error
        if not isinstance(said, bool | int | np.bool_) or said not in (0, 1):
            raise UserError(f"eval.grader: {self.name} must give True or False, not {said!r}")
        return Verdict(correct=bool(said), extracted=last_line(text))
