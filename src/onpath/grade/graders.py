"""Graders by name."""

from collections.abc import Sequence

from onpath.grade.base import Grader
from onpath.grade.exact import ExactGrader
from onpath.grade.gym import GymGrader
from onpath.grade.math import MathGrader
from onpath.system.errors import UserError

GRADERS: dict[str, type[Grader]] = {"gym": GymGrader, "math": MathGrader, "exact": ExactGrader}


def make_grader(name: str) -> Grader:
    """The grader of that name: `gym`, `math` or `exact`.

    Raises:
        UserError: another name.
    """
    if name not in GRADERS:
        raise UserError(f"eval.grader is {name!r}; it must be one of {', '.join(GRADERS)}")
    return GRADERS[name]()


def grader_for(name: str, sources: Sequence[str]) -> Grader:
    """`make_grader` with `auto`: the gym's checker where every source is the gym, else math."""
    if name != "auto":
        return make_grader(name)
    return make_grader("gym" if sources and all(source.startswith("gym:") for source in sources) else "math")
