"""Tasks: sources of problems that bring more than rows. The gym is one; `register` adds another.

A task named `gym` owns every source `gym:split`, every model `gym:role`, and what can be known of its
problems: a checker of answers, a checker of steps, the truth of each token, prompts in its own language. No
torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onpath.data.templates import EPISTEMIC_WORDS, TEMPLATES
from onpath.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(Protocol):
    """What a task can say of itself. Subclass it: all but `name`, `splits`, `rows` and `grade` have defaults.

    >>> class Parity(Task):
    ...     name, splits = "parity", {"train": 100, "test": 50}
    ...     def rows(self, split, count):
    ...         return [{"prompt": f"{i} is?", "answer": "odd" if i % 2 else "even"} for i in range(count)]
    ...     def grade(self, text, answer):
    ...         return text.split()[-1:] == [answer]
    >>> Parity().grade("it is odd", "odd")
    True
    """

    name: str
    """The part of a source before the colon."""
    splits: Mapping[str, int]
    """Split → number of rows where no limit is given."""
    checks_steps: bool = False
    """Whether `first_error` can tell."""
    labels_tokens: bool = False
    """Whether `labels` can tell."""

    def rows(self, split: str, count: int) -> Iterable[Mapping[str, Any]]:
        """The first `count` rows of a split, with the columns of a data set; always the same."""
        ...

    def grade(self, text: str, answer: str) -> bool:
        """Whether the text's final answer is right."""
        ...

    def first_error(self, problem: str, response: str) -> int | None:
        """Characters before the first wrong step; None: there is none."""
        return None

    def labels(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """What each token of a response is: error, consequence, right, habit, choice, …"""
        return []

    @property
    def templates(self) -> Mapping[str, str]:
        """Its own wording of privileged prompts; see `onpath.data.templates`."""
        return {}

    @property
    def correction_words(self) -> tuple[str, ...] | None:
        """Words that open a correction in its language; None: TRD's list."""
        return None

    def model(self, role: str) -> Path:
        """Directory of a model that it brings.

        Raises:
            ValueError: it brings none of that name.
        """
        raise ValueError(f"the task {self.name} brings no models")

    def stated(self, answer: str) -> str:
        """A response that states the answer and nothing else, for checks of the grader."""
        return answer


def _gym() -> Task:
    from onpath.gym.task import Gym

    return Gym()


_TASKS: dict[str, Callable[[], Task]] = {"gym": _gym}


def register(task: Task) -> None:
    """Makes a task known in this process: `data.train: <its name>:<split>`.

    Raises:
        ValueError: there is a task of that name.
    """
    if task.name in _TASKS:
        raise ValueError(f"there is a task {task.name} already")
    _TASKS[task.name] = lambda: task


def task_of(source: str) -> Task | None:
    """The task that a source or a model belongs to; None: a file, a directory, a `datasets` name.

    >>> task_of("gym:test").name
    'gym'
    """
    name, colon, _ = source.partition(":")
    return _TASKS[name]() if colon and name in _TASKS else None


def split_name(source: str) -> str:
    """What to call a source: a task's split, a file's name.

    >>> split_name("gym:hard"), split_name("data/aime.jsonl")
    ('hard', 'aime')
    """
    return source.partition(":")[2] if task_of(source) else Path(source).stem


def task_rows(task: Task, source: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
    """The rows of one of its splits.

    Raises:
        UserError: no such split.
    """
    split = source.partition(":")[2]
    if split not in task.splits:
        raise UserError(f"{source}: the {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    return task.rows(split, limit or task.splits[split])


def templates_of(source: str) -> dict[str, str]:
    """Privileged prompts: the task's own language where it has one, else our wording."""
    task = task_of(source)
    return {**TEMPLATES, **(task.templates if task else {})}


def correction_ids(
    words: Sequence[str] | None, source: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """First tokens of the words that open a correction, with and without a space before them.

    Args:
        words: None takes the task's, or TRD's list.
    """
    if words is None:
        task = task_of(source)
        words = (task.correction_words if task else None) or EPISTEMIC_WORDS
    spellings = [spelling for word in words for spelling in (word, f" {word}") if spelling.strip()]
    first = {_onset(s, tokenizer) for s in spellings}
    return tuple(sorted(i for i in first - {tokenizer.unk_token_id} if i is not None))


def _onset(spelling: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that begins the word: not a bare space marker (Llama 2's ▁), nor punctuation before letters,
    which begin any word."""
    lettered = any(c.isalnum() for c in spelling)
    for i in tokenizer(spelling, add_special_tokens=False)["input_ids"]:
        shown = str(tokenizer.decode([i])).strip()
        if any(c.isalnum() for c in shown) or (shown and not lettered):
            return int(i)
    return None
