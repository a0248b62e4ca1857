"""`exact`: the last line."""

from onpath.data.thinking import answer_part
from onpath.grade.base import Grader, Verdict


class ExactGrader(Grader):
    """Right if the last line that is not blank equals the answer, after runs of white space in both have
    become one space and those at the ends have gone. Case and punctuation count. Only what follows the
    thinking is read. A blank text is wrong."""

    name = "exact"

    def _judge(self, text: str, answer: str) -> Verdict:
        extracted = last_line(answer_part(text))
        return Verdict(correct=extracted == " ".join(answer.split()), extracted=extracted)


def last_line(text: str) -> str | None:
    """The last line that is not blank, its white space made single; None: there is none."""
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split()) if lines else None
