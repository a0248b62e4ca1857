"""What ends a response: the stop tokens of both models, and those and the strings of the config.

A teacher ends what it writes with its own EOS, and a student that learns from it does so too. So everything
that is generated in a run stops at the union of both models' stops.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from onpath.config.sections import Teacher, teacher_option
from onpath.config.whole import Config
from onpath.engines.models import eos_ids, load_tokenizer, model_directory, quietly, stop_ids
from onpath.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stops:
    """The stop tokens of a run, by who declares them (of several teachers any), and its stop strings.

    >>> sorted(Stops(student=frozenset({2}), teacher=frozenset({2, 20})).ids)
    [2, 20]
    """

    student: frozenset[int]
    teacher: frozenset[int] | None = None
    """None: no other model's ids are read."""
    asked: frozenset[int] = frozenset()
    """By rollout.stop_ids, and by those of rollout.stop that are special tokens."""
    strings: tuple[str, ...] = ()
    """The others of rollout.stop."""

    @property
    def ids(self) -> frozenset[int]:
        """Every id that ends a response."""
        return self.student | (self.teacher or frozenset()) | self.asked

    def warning(self, renderer_tokens: Callable[[Sequence[int]], list[str]]) -> str | None:
        """What to know where the models do not end their responses alike."""
        if self.teacher is None or self.teacher == self.student:
            return None

        def named(ids: frozenset[int]) -> str:
            listed = sorted(ids)
            return ", ".join(f"{i} {t!r}" for i, t in zip(listed, renderer_tokens(listed), strict=True))

        return (
            f"student and teacher declare different stop tokens (student: {named(self.student)}; teacher: "
            f"{named(self.teacher)}); everything in this run stops at any of them, and the saved model will"
        )

    def to_json(self) -> dict[str, list[int] | list[str] | None]:
        """As environment.json keeps it."""
        return {
            "student": sorted(self.student),
            "teacher": None if self.teacher is None else sorted(self.teacher),
            "asked": sorted(self.asked),
            "strings": list(self.strings),
            "ids": sorted(self.ids),
        }


def stops_of(
    config: Config, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> Stops:
    """The stops of a run.

    Args:
        vocabulary: ids from here on are none that can be drawn.

    Raises:
        UserError: neither model names an end, or rollout.stop_ids names no token.
    """
    others = config.sharing_ids
    teacher = {i for name, t in others.items() for i in declared_stops(t, f"{teacher_option(name)}.model")}
    known = {i for i in teacher if 0 <= i < vocabulary}
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if foreign := [i for i in config.rollout.stop_ids if i >= vocabulary]:
        raise UserError(f"rollout.stop_ids: {foreign[0]} is no token; the vocabulary has {vocabulary}")
    # Special tokens are left out of texts, so that a stop that spells one is that token.
    asked = {*config.rollout.stop_ids, *(special[s] for s in config.rollout.stop if s in special)}
    return Stops(
        student=stop_ids(student, tokenizer),
        teacher=frozenset(known) if others else None,
        asked=frozenset(asked),
        strings=tuple(s for s in config.rollout.stop if s not in special),
    )


def declared_stops(section: Teacher, key: str = "teacher.model") -> frozenset[int]:
    """What a model's files declare: the EOS of its generation config, else of its config, and its
    tokenizer's."""
    where = model_directory(section.model, key)
    with quietly():
        try:
            listed = GenerationConfig.from_pretrained(where).eos_token_id
        except OSError:
            found = AutoConfig.from_pretrained(where, trust_remote_code=section.trust_remote_code)
            listed = found.get_text_config().eos_token_id
    own = load_tokenizer(section, key).eos_token_id
    return frozenset(eos_ids(listed, key) | ({own} if isinstance(own, int) else set()))


def string_end(
    ids: Sequence[int], strings: Sequence[str], text: Callable[[Sequence[int]], str]
) -> int | None:
    """Length of the shortest beginning of `ids` whose text holds a stop string; None: the whole has none.

    The token that completes the string is kept whole, as it was drawn, whatever else it holds.
    """

    def held(count: int) -> bool:
        said = text(ids[:count])
        return any(s in said for s in strings)

    if not strings or not held(len(ids)):
        return None
    return bisect_left(range(1, len(ids) + 1), True, key=held) + 1
