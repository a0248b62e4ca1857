"""What a grader is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL")
"""All that a grader's process sees of the environment: no tokens, no keys."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a grader says of one text.

    >>> ExactGrader().grade("7 + 5 is\\n 12 ", "12")
    Verdict(correct=True, extracted='12')
    """

    correct: bool
    extracted: str | None
    """The answer found in the text, for people; None if there was none."""


class Grader:
    """Compares texts with reference answers. Close it, or use it in a `with` block."""

    name: str
    """As `eval.grader` calls it."""

    def grade(self, text: str, answer: str) -> Verdict:
        """Judges one text.

        Raises:
            ValueError: the text or the answer is not a string (a prompt without an answer cannot be graded).
        """
        if not isinstance(answer, str):
            raise ValueError(f"there is no answer to grade against: it must be text, not {answer!r}")
        if not isinstance(text, str):
            raise ValueError(f"the graded text must be a string, not {type(text).__name__}")
        return self._judge(text, answer)

    def grade_many(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (text, answer) pairs, in order; equal pairs are judged once."""
        asked = list(pairs)
        different = list(dict.fromkeys(asked))
        verdicts = dict(zip(different, self._grade_each(different), strict=True))
        return [verdicts[pair] for pair in asked]

    def _grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Of pairs that are all different."""
        return [self.grade(*pair) for pair in pairs]

    def _judge(self, text: str, answer: str) -> Verdict:
        raise NotImplementedError

    def stated(self, answer: str) -> str | None:
        """A response that states the answer plainly: what `onpath doctor` asks the grader about. None: no
        response can be made from it."""
        return answer

    def close(self) -> None:
        """Frees what the grader holds; it may be used again, and then takes it anew."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
