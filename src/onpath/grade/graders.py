"""Graders by name."""

from collections.abc import Callable, Iterable, Mapping

from onpath.data.packs import pack_of
from onpath.data.tasks import misread, task_of
from onpath.grade.base import Grader
from onpath.grade.code import CodeGrader
from onpath.grade.exact import ExactGrader
from onpath.grade.math import MathGrader
from onpath.grade.own import OwnGrader
from onpath.grade.task import TaskGrader
from onpath.records import Prompt
from onpath.system import code
from onpath.system.errors import UserError


def _gym() -> Grader:
    task = task_of("gym:")
    assert task is not None
    return TaskGrader(task)


GRADERS: dict[str, Callable[[], Grader]] = {
    "gym": _gym,
    "math": MathGrader,
    "exact": ExactGrader,
    "code": CodeGrader,
}


def make_grader(name: str) -> Grader:
    """The grader of that name: one of `GRADERS`, or a function of the user's own as file.py:name.

    Raises:
        UserError: another name, or own code that may not run.
    """
    if code.is_own(name):
        return OwnGrader(code.load(name, key="eval.grader"), name=name)
    if name not in GRADERS:
        raise UserError(
            f"eval.grader is {name!r}; it must be auto, one of {', '.join(GRADERS)}, or file.py:function"
        )
    return GRADERS[name]()


def grader_for(name: str, prompts: Mapping[str, Iterable[Prompt]]) -> Grader:
    """`make_grader` with `auto`: a task's own checker where every source is that task's, what the packs say,
    code where rows bring tests, else math.

    Args:
        prompts: by where they come from.

    Raises:
        UserError: `auto` with packs, or rows, that need different graders; the gym's with another task.
    """
    if why := next(filter(None, (misread(name, source) for source in prompts)), None):
        raise UserError(why)
    if name != "auto":
        return make_grader(name)
    tasks = [task_of(source) for source in prompts]
    first = tasks[0] if tasks else None
    if first is not None and all(task is not None and task.name == first.name for task in tasks):
        return TaskGrader(first)
    needed: dict[str, str] = {}
    for source, some in prompts.items():
        pack, bring_tests = pack_of(source), {p.tests for p in some if p.answer is not None}
        names = {pack.grader} if pack else {"code" if tests else "math" for tests in bring_tests}
        needed |= dict.fromkeys(names, source)
    if len(needed) > 1:
        told = ", ".join(f"{grader} for {source}" for grader, source in needed.items())
        raise UserError(f"eval.grader is auto, which cannot be {told} at a time; name one grader")
    return make_grader(next(iter(needed), "math"))
