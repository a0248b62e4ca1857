"""A task's own checker: `gym` is the gym's."""

from onpath.data.tasks import Task
from onpath.grade.base import Grader, Verdict
from onpath.grade.exact import last_line


class TaskGrader(Grader):
    """Asks the task; what it shows as extracted is the last line."""

    def __init__(self, task: Task) -> None:
        self.task, self.name = task, task.name

    def _judge(self, text: str, answer: str) -> Verdict:
        return Verdict(correct=self.task.grade(text, answer), extracted=last_line(text))

    def stated(self, answer: str) -> str:
        """See `Grader.stated`."""
        return self.task.stated(answer)
