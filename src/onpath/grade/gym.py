"""`gym`: the gym's own checker."""

from onpath.grade.base import Grader, GraderName, Verdict
from onpath.grade.exact import _last_line


class GymGrader(Grader):
    """The gym's own checker; what it shows as extracted is the last line."""

    name: GraderName = "gym"

    def _judge(self, text: str, answer: str) -> Verdict:
        from onpath import gym

        return Verdict(correct=gym.grade(text, answer), extracted=_last_line(text))
