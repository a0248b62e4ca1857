"""Tasks: sources of problems that bring more than rows. The gym is one; `register` adds another.

A task named `gym` owns every source `gym:split`, every model `gym:role`, and what can be known of its
problems: a checker of answers, a checker of steps, the truth of each token, prompts in its own language. A
task may have settings, `gym:train?late=0.5&spoil=0.8`: numbers from 0 to 1 that make its world another one.
No torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from onpath.data.packs import pack_of, pack_split
from onpath.data.templates import EPISTEMIC_WORDS, TEMPLATES
from onpath.system import code
from onpath.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_TRAINING = ("spoil", "again", "lost")
"""Settings that act on training rollouts and on their teacher."""


class World(Protocol):
    """What a task does to rollouts and teacher, beside giving rows. Subclass it, with `spoils` and its like
    as class attributes or properties: what a world lacks it does not do. Answers are pure functions of their
    arguments, so that a run which goes on meets the same world.

    >>> class Sevens(World):
    ...     spoils = True
    ...     def spoiled(self, seed, problem, tokens):
    ...         return (0, "7") if tokens else None
    >>> Sevens().spoiled(0, "3+4?", ["8"]), Sevens().repeats
    ((0, '7'), False)
    """

    @property
    def spoils(self) -> bool:
        """Whether `spoiled` may change anything."""
        return False

    @property
    def repeats(self) -> bool:
        """Whether `spoiled_again` may change anything."""
        return False

    @property
    def loses(self) -> bool:
        """Whether `lost_after` may say anything."""
        return False

    def spoiled(self, seed: int, problem: str, tokens: Sequence[str]) -> tuple[int, str] | None:
        """Place and spelling of a token that is put into a training rollout from outside, for the student to
        go on from; None: it stays as it is."""
        return None

    def spoiled_again(self, seed: int, tokens: Sequence[str], begin: int) -> tuple[int, str] | None:
        """Of prompt and response: place and spelling of the token that `spoiled` puts into it, if the student
        has just written that place itself, at `begin` or behind it, and errs so again."""
        return None

    def lost_after(self, seed: int, tokens: Sequence[str]) -> int | None:
        """Of prompt and response: the place behind which the teacher is no better than the untouched student;
        None: it is sound up to the end."""
        return None


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
    error_kinds: tuple[str, ...] = ()
    """What `error_kind` may say; none: it cannot tell."""

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

    def skills(self, problem: str, tokens: Sequence[str]) -> list[str]:
        """What it takes to write each token of a response right, empty where nothing is to be known; no list:
        the task cannot tell."""
        return []

    def error_kind(self, problem: str, tokens: Sequence[str]) -> str | None:
        """What kind of error the first one of a response is, in a word or two; None: there is none."""
        return None

    @property
    def world(self) -> World | None:
        """None: rollouts and teacher are as the models are."""
        return None

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

    def with_settings(self, settings: Mapping[str, float]) -> "Task":
        """The task with the settings of a source or a model; strengths are from 0 to 1.

        Raises:
            ValueError: it does not have one of them.
        """
        raise ValueError(f"the task {self.name} has no settings")


_HOOKS = {
    "grade", "first_error", "labels", "skills", "error_kind", "stated",
    "spoiled", "spoiled_again", "lost_after",
}  # fmt: skip
"""Of a task, and of its world, what is called while a run goes on."""


class _Blamed:
    """A task of the user's own, or its world, as it is; what a hook of it raises names it.

    Args:
        what: it is, for the sentence.
        modules: that hold it.
    """

    def __init__(self, own: Any, what: str, modules: Set[str]) -> None:
        self._own, self._what, self._modules = own, what, modules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked by copies and pickles, before there is anything
            raise AttributeError(name)
        found = getattr(self._own, name)
        if name in _HOOKS:
            return code.blamed(f"{self._what}: {name}", self._modules)(found)
        if name == "world" and found is not None and not type(found).__module__.startswith("onpath."):
            return _Blamed(found, self._what, self._modules | code.modules_of(found))
        return found


def _gym() -> Task:
    from onpath.gym.task import Gym

    return Gym()


def _maze() -> Task:
    from onpath.gym.maze.task import MazeTask

    return MazeTask()


_TASKS: dict[str, Callable[[], Task]] = {"gym": _gym, "maze": _maze}


def register(task: Task) -> None:
    """Makes a task known in this process: `data.train: <its name>:<split>`. One of the user's own is replaced
    by another of its class's name: a cell that runs again has a class of its own.

    Raises:
        UserError: there is another task of that name.
    """
    if task.name in _TASKS:
        known, kind = type(_TASKS[task.name]()), type(task).__qualname__
        if known.__module__.startswith("onpath.") or known.__qualname__ != kind:
            raise UserError(
                f"there is a task {task.name} already, {known.__qualname__}; give {kind} another name"
            )
    _TASKS[task.name] = lambda: task


def task_names() -> list[str]:
    """Of the tasks that are known in this process."""
    return list(_TASKS)


def task_of(source: str) -> Task | None:
    """The task that a source or a model belongs to, with the settings that it names; None: a file, a
    directory, a `datasets` name.

    >>> task_of("gym:test").name
    'gym'

    Raises:
        UserError: settings that the task does not have, or that are no numbers from 0 to 1.
    """
    name, colon, rest = source.partition(":")
    if not colon or name not in _TASKS:
        return None
    task, (_, asked, query) = _TASKS[name](), rest.partition("?")
    try:
        found = task.with_settings(dict(map(_setting, query.split("&")))) if asked else task
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    ours = type(found).__module__.startswith("onpath.")
    return found if ours else cast(Task, _Blamed(found, f"the task {found.name}", code.modules_of(found)))


def modules_of(task: Task) -> Set[str]:
    """The modules that hold a task of the user's own; none of another."""
    return task._modules if isinstance(task, _Blamed) else frozenset()


def _setting(text: str) -> tuple[str, float]:
    name, given, value = text.partition("=")
    if not given:
        raise ValueError(f"after the ? come settings such as late=0.5, joined by &, not {text!r}")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"{name} is a number from 0 to 1, not {value or 'nothing'}")
    return name, number


def misread(grader: str, source: str) -> str:
    """Why the gym's checker, named for data of another kind, would find every answer wrong; else nothing.

    >>> misread("gym", "maze:test")
    "eval.grader: gym reads the gym's answers, not those of maze:test; use auto"
    """
    task = task_of(source)
    others = task.name != "gym" if task is not None else source.startswith("pack:")
    return (
        f"eval.grader: gym reads the gym's answers, not those of {source}; use auto"
        if others and grader == "gym"
        else ""
    )


def brings(task: Task, role: str) -> bool:
    """Whether a task has a model of its own in this role."""
    try:
        task.model(role)
    except ValueError:
        return False
    return True


def part_of(source: str) -> str:
    """What stands between a task's name and its settings: a split, a role.

    >>> part_of("gym:hard?late=1")
    'hard'
    """
    return source.partition(":")[2].partition("?")[0]


def other_split(source: str, split: str) -> str:
    """Another split of the same task with the same settings, but for those that act on training alone.

    >>> other_split("gym:train?late=1&spoil=0.8&lost=1", "test"), other_split("gym:train?spoil=1", "test")
    ('gym:test?late=1', 'gym:test')
    """
    name, _, rest = source.partition(":")
    settings = [s for s in rest.partition("?")[2].split("&") if s.partition("=")[0] not in _OF_TRAINING]
    query = "&".join(settings)
    return f"{name}:{split}?{query}" if query else f"{name}:{split}"


def split_name(source: str) -> str:
    """What to call a source: a task's split, a pack's name, a file's name.

    >>> split_name("gym:hard"), split_name("data/aime.jsonl"), split_name("pack:aime25")
    ('hard', 'aime', 'aime25')
    """
    if pack_of(source):
        return pack_split(source)
    return part_of(source) if task_of(source) else Path(source.removesuffix(".gz")).stem


def task_rows(task: Task, source: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
    """The rows of one of its splits.

    Raises:
        UserError: no such split.
    """
    split = part_of(source)
    if split not in task.splits:
        raise UserError(f"{source}: the {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    try:
        return task.rows(split, limit or task.splits[split])
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


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
