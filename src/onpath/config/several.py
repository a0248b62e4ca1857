"""What goes together with several teachers. No torch."""

import math
from typing import Any

from onpath.config.sections import Teacher, check_names
from onpath.data.rows import DEFAULT_TEACHER
from onpath.data.tasks import task_of


def check_several(config: Any) -> None:
    """Looks at the whole config (`onpath.config.Config`) for what cannot go together with `teachers`.

    Raises:
        ValueError: it cannot; one sentence that names the keys and says what would be right.
    """
    column, method = config.data.teacher_column, config.method
    if not config.teachers:
        if config.teacher.mixture is not None:
            raise ValueError("teacher.mixture is of several teachers; name them and the mixture in teachers")
        if column is not None:
            raise ValueError(
                f"data.teacher_column is {column!r}, but there are no teachers to name: set "
                "teachers: {name: {model: …}, …}, or take the column out"
            )
        if config.parallel.teacher == "offload":
            raise ValueError(
                "parallel.teacher: offload is for several teachers, and there is one; use same or copy"
            )
        if method.asks_teachers:
            raise ValueError(
                f"method.rewriter is {method.asks_teachers[0]!r}, but there are no teachers to choose from; "
                "set teachers, or leave it null"
            )
        return
    check_names(config.teachers)
    _check_mixtures(config)
    if config.teacher != Teacher():
        raise ValueError(
            "teacher and teachers are both set; put the one teacher under a name into teachers, or take "
            "teachers out"
        )
    if method.self_taught:
        raise ValueError(
            f"teachers: with method.name {method.name} the student is its own teacher; take teachers out"
        )
    for name, teacher in config.teachers.items():
        if teacher.engine == "chat":
            raise ValueError(f"teachers.{name}.engine: chat is for the only teacher of a run; use hf or vllm")
    of_default = config.mixtures.get(DEFAULT_TEACHER, ())
    if column is None and {*config.teachers} != {DEFAULT_TEACHER, *of_default}:
        raise ValueError(
            "teachers: set data.teacher_column to the column of the training rows that names each one's "
            "teacher"
        )
    if column is not None and task_of(config.data.train) is not None:
        raise ValueError(
            f"data.teacher_column is {column!r}, but the rows of {config.data.train} name no teacher; "
            "use a file with that column"
        )
    unknown = [name for name in method.asks_teachers if name not in config.taught_by]
    if unknown:
        known = ", ".join(map(str, config.taught_by))
        raise ValueError(f"method.rewriter is {unknown[0]!r}; it must be one of teachers: {known}")


def _check_mixtures(config: Any) -> None:
    for name, weights in config.mixtures.items():
        key = f"teachers.{name}.mixture"
        if config.teachers[name] != Teacher(mixture=weights):
            raise ValueError(f"{key}: a mixture has no options of its own; set them where its teachers are")
        if wrong := [one for one in weights if one not in config.taught_by]:
            known = ", ".join(map(str, config.taught_by)) or "there is none"
            raise ValueError(f"{key} names {wrong[0]!r}; it must be one of teachers that is a model: {known}")
        total = sum(weights.values())
        least = min(weights.values(), default=0.0)
        if len(weights) < 2 or total == math.inf or not (least > 0 and least / total > 0):
            raise ValueError(f"{key} is {weights}; give two teachers or more a weight above 0 each")
        if served := [one for one in weights if config.teachers[one].engine != "hf"]:
            raise ValueError(
                f"{key}: {served[0]} is on a server, which does not send its whole distribution; mix "
                "teachers with engine: hf"
            )
        if config.parallel.teacher == "offload":
            raise ValueError(
                f"{key}: its teachers score the same token, and parallel.teacher: offload has one of them at "
                "a time; use same or copy"
            )
        if config.method.teacher_writes:
            raise ValueError(
                f"{key}: with method.name {config.method.name} the teacher writes, and a mixture only "
                "scores; take opd, branch, truncate without forks, or trd with method.rewriter and no "
                "method.locate: fork"
            )
