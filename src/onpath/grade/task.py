"""A task's own checker: `gym` is the gym's."""

from onpath.data.tasks import Task
from onpath.data.thinking import answer_part
from onpath.grade.base import Grader, Verdict
from onpath.grade.exact import last_line


class TaskGrader(Grader):
    """Asks the task about what follows the thinking; what it shows as extracted is the last line."""

    def __init__(self, task: Task) -> None:
        self.task, self.name = task, task.name

    def _judge(self, text: str, answer: str) -> Verdict:
        said = answer_part(text)
        return Verdict(correct=self.task.grade(said, answer), extracted=last_line(text))

    def stated(self, answer: str) -> str:
        """See `Grader.stated`."""
        return self.task.stated(answer)
