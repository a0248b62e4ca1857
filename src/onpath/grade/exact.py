"""`exact`: the last line."""

from onpath.grade.base import Grader, GraderName, Verdict


class ExactGrader(Grader):
    """Right if the last line that is not blank equals the answer, after runs of white space in both have
    become one space and those at the ends have gone. Case and punctuation count. A blank text is wrong."""

    name: GraderName = "exact"

    def _judge(self, text: str, answer: str) -> Verdict:
        extracted = _last_line(text)
        return Verdict(correct=extracted == " ".join(answer.split()), extracted=extracted)


def _last_line(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split()) if lines else None
