"""What goes together with several teachers. No torch."""

from typing import Any

from onpath.config.sections import Teacher, check_names
from onpath.data.load import DEFAULT_TEACHER
from onpath.data.tasks import task_of


def check_several(config: Any) -> None:
    """Looks at the whole config (`onpath.config.Config`) for what cannot go together with `teachers`.

    Raises:
        ValueError: it cannot; one sentence that names the keys and says what would be right.
    """
    column, method = config.data.teacher_column, config.method
    if not config.teachers:
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
    if column is None and list(config.teachers) != [DEFAULT_TEACHER]:
        raise ValueError(
            "teachers: set data.teacher_column to the column of the training rows that names each one's "
            "teacher"
        )
    if column is not None and task_of(config.data.train) is not None:
        raise ValueError(
            f"data.teacher_column is {column!r}, but the rows of {config.data.train} name no teacher; "
            "use a file with that column"
        )
    unknown = [name for name in method.asks_teachers if name not in config.teachers]
    if unknown:
        known = ", ".join(config.teachers)
        raise ValueError(f"method.rewriter is {unknown[0]!r}; it must be one of teachers: {known}")
