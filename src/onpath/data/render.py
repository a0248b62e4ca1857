"""Messages ↔ token ids: the only user of a chat template, for student and teacher prompts alike."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from string import Formatter
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from onpath.data import thinking
from onpath.data.templates import check_slots
from onpath.records import Message, Prompt
from onpath.system.errors import UserError
from onpath.system.limits import excess
from onpath.system.reading import OF_CONTENT
from onpath.system.text import one_line

_CLOCK = "strftime_now"
"""What templates call that print the clock."""
_DIRECTIVES = "aAwdbBmyYHIpMSfjUWcxXeDFT"
"""Of strftime."""
_QUESTION = "a question in its place"
_LONG = "sequence-length-is-longer-than-the-specified-maximum"
"""transformers' name for its warning."""
_SECONDS, _LARGEST_RENDERING = 10.0, 256 * 2**20
"""Of one short question."""
_FAILURES: tuple[type[Exception], ...] = (TemplateError, *OF_CONTENT)
_TRIED: set[str] = set()
"""Templates that kept them."""


class Renderer:
    """Turns prompts into ids with one tokenizer.

    Args:
        tokenizer: of the student; the teacher shares its vocabulary (`models.check_vocabulary`).
        template: `chat` uses the chat template, `plain` the text itself, `auto` whichever the tokenizer has.
        system: system message for chat prompts that bring none.
        template_options: passed to the chat template, e.g. `{"enable_thinking": False}`.
        clock: the moment that a template which prints the clock is told, always the same; None: this one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Literal["auto", "chat", "plain"] = "auto",
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        clock: datetime | None = None,
    ) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "data.template is chat, but the student's tokenizer has no chat template; name one as "
                "data.chat_template, or use plain"
            )
        self.tokenizer = tokenizer
        tokenizer.deprecation_warnings[_LONG] = True  # what is too long is said of the prompt, by its name
        self.chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        self.system = system
        self.template_options = dict(template_options or {})
        self.clock: datetime | None = None
        """Set where the template prints the clock."""
        if self.chat and _CLOCK in str(tokenizer.chat_template):
            self.clock = clock or datetime.now()
            self.template_options["chat_template"] = _stopped(tokenizer.get_chat_template(), self.clock)
        self._shown: dict[int, str] = {}
        if self.chat:
            self._try_template()

    def _try_template(self) -> None:
        """A template is a program of whoever made the tokenizer: it runs with limits first.

        Raises:
            UserError: it takes too long, or too much memory.
        """
        key = (self.tokenizer.chat_template, self.system, repr(self.template_options))
        if repr(key) in _TRIED:
            return
        messages = self.messages(Prompt(id="", text=_QUESTION))
        taken = excess(
            lambda: self._applied(messages, tokenize=False), seconds=_SECONDS, memory=_LARGEST_RENDERING
        )
        if taken:
            raise UserError(f"the chat template {taken} to render one short question; use another one")
        _TRIED.add(repr(key))

    def _applied(
        self, messages: Sequence[Message], *, opened: bool = True, tokenize: bool = True, **other: Any
    ) -> Any:
        """What the template makes of a conversation: ids, or the text.

        Args:
            opened: with the generation prompt.
            other: options of the template in place of its own.

        Raises:
            UserError: it fails on them.
        """
        try:
            return self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=opened,
                tokenize=tokenize,
                return_dict=False,
                **{**self.template_options, **other},
            )
        except _FAILURES as error:
            raise UserError(f"the chat template refuses it: {one_line(str(error))}") from None

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The context that a response continues. Chat prompts end with the generation prompt."""
        if self.chat:
            try:
                return tuple(self._applied(self.messages(prompt)))
            except UserError as error:
                raise UserError(f"prompt {prompt.named}: {error}") from None
        if prompt.messages is not None:
            raise UserError(
                f"prompt {prompt.named} is a list of messages, but the prompts are rendered as plain text; "
                "take a tokenizer with a chat template, or name one as data.chat_template"
            )
        return self._plain(prompt.question)

    def within(
        self,
        prompt: Prompt,
        template: str,
        texts: Mapping[str, str],
        *,
        longest: int,
        tokens: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[Prompt, tuple[int, ...], dict[str, int]]:
        """A prompt with the template filled by its question and by texts, which lose their ends, one after
        the other, until there are at most `longest` ids; more only where the texts are gone.

        Args:
            texts: slot → text; the first one is shortened first.
            tokens: of texts that somebody has drawn; the others are encoded.

        Returns:
            The prompt, its ids, and slot → how many tokens of it went, where some did.
        """
        known = {
            slot: list(
                (tokens or {}).get(slot) or self.tokenizer(text, add_special_tokens=False)["input_ids"]
            )
            for slot, text in texts.items()
        }
        cut = dict.fromkeys(texts, 0)
        while True:
            shown = {k: self.text(known[k][: len(known[k]) - n]) if n else texts[k] for k, n in cut.items()}
            filled = with_question(prompt, fill(template, problem=prompt.question, **shown))
            ids = self.ids(filled)
            slot = next((k for k, n in cut.items() if n < len(known[k])), None)
            if len(ids) <= longest or slot is None:
                return filled, ids, {k: n for k, n in cut.items() if n}
            # What goes may merge with its neighbours, or be no text: so until it fits.
            cut[slot] = min(len(known[slot]), cut[slot] + len(ids) - longest)

    def check(self, prompt: Prompt) -> None:
        """Refuses what a chat template cannot be given.

        Raises:
            UserError: the prompt is rendered already, so that the template would be nested in itself; or the
                template gives another text each time.
        """
        if not self.chat:
            return
        for text in [m["content"] for m in prompt.messages or ()] or [prompt.question]:
            if (mark := self._rendered_by(text)) is not None:
                raise UserError(
                    f"prompt {prompt.named} is rendered already: it holds {mark!r}, which the chat template "
                    "writes; give the bare problem, or set data.template: plain"
                )

    def holds_unknown(self, ids: Sequence[int]) -> bool:
        """Whether the unknown token is among them; where it also begins or ends a text it tells nothing."""
        tokenizer = self.tokenizer
        unknown = tokenizer.unk_token_id
        return unknown not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id) and unknown in ids

    def _rendered_by(self, text: str) -> str | None:
        """What shows that a text was made by the chat template."""
        bos = self.tokenizer.bos_token
        if isinstance(bos, str) and text.lstrip().startswith(bos):
            return bos
        controls, opening, closing = self._scaffold
        held = next((c for c in controls if c in text), None)
        if held is None and opening and closing:
            within = text.strip()
            held = opening if within.startswith(opening) and within.endswith(closing) else None
        return held

    @cached_property
    def _scaffold(self) -> tuple[tuple[str, ...], str, str]:
        """What the template writes around a question: its special tokens but BOS and EOS, and the plain marks
        before and after ([INST] and [/INST], say)."""
        try:
            rendered = self._applied([{"role": "user", "content": _QUESTION}], tokenize=False)
        except UserError:
            return (), "", ""
        tokenizer, around = self.tokenizer, str(rendered)
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        ends = (tokenizer.bos_token, tokenizer.eos_token)
        controls = tuple(s for s in special if s in around and s not in ends)
        for token in special:
            around = around.replace(token, "\n")
        before, _, after = around.partition(_QUESTION)
        opening = (before.strip().splitlines() or [""])[-1].strip()
        closing = (after.strip().splitlines() or [""])[-1].strip()
        marked = all(re.search(r"[^\w\s]", mark) for mark in (opening, closing))
        return controls, opening if marked else "", closing if marked else ""

    def _plain(self, text: str) -> tuple[int, ...]:
        ids = list(self.tokenizer(text)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(self.tokenizer.bos_token)):
            ids = ids[1:]  # the text has been rendered before, and brings its own
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers close every text; the response must go on from here
        if not ids:
            raise UserError("an empty plain prompt has no token to continue from; the tokenizer adds no BOS")
        return tuple(ids)

    def messages(self, prompt: Prompt) -> Sequence[Message]:
        """What a chat model is asked: a plain prompt is one user message."""
        messages = prompt.messages or ({"role": "user", "content": prompt.question},)
        if self.system is not None and messages[0]["role"] != "system":
            return ({"role": "system", "content": self.system}, *messages)
        return messages

    def unheard(self) -> list[str]:
        """Options of `data` that are set and change nothing in what the chat template makes of a question."""
        question, found = self.messages(Prompt(id="", text=_QUESTION)), list[str]()
        if not self.chat:
            return found
        with suppress(UserError):
            asked, thinking = self._applied(question), self.template_options.get("enable_thinking")
            if self.system is not None:  # not against none: a template may have that one by default
                told: Message = {"role": "system", "content": f"{self.system} {_QUESTION}"}
                found += ["system"] if self._applied((told, *question[1:])) == asked else []
            if thinking is not None and self._applied(question, enable_thinking=not thinking) == asked:
                found.append("enable_thinking")
        return found

    def turn_end(self) -> list[int]:
        """Special tokens that the chat template puts after an answer; none for plain text."""
        if not self.chat:
            return []
        question: Message = {"role": "user", "content": "1"}
        try:
            opened = list(self._applied([question]))
            closed = list(self._applied([question, {"role": "assistant", "content": "1"}], opened=False))
        except UserError:
            return []
        tail = closed[len(opened) :] if closed[: len(opened)] == opened else []
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        special |= set(self.tokenizer.all_special_ids)
        return [i for i in tail if i in special]

    def opens_answers(self) -> bool:
        """Whether prompts end in a generation prompt, as far as a template shows it."""
        question: Message = {"role": "user", "content": "1"}
        try:
            return len(self._applied([question], opened=False)) < len(self._applied([question]))
        except UserError:
            return True

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a response that somebody else wrote as text; control tokens that it spells are text too."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """For people; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def graded(self, ids: Sequence[int]) -> str:
        """`text` for graders: with the tags of thinking, even where they are special tokens, and with the one
        that the generation prompt has opened."""
        pieces: list[str] = []
        plain: list[int] = []
        for i in ids:
            if i in self._tags:
                pieces += [self.text(plain), self._tags[i]]
                plain = []
            else:
                plain.append(i)
        return self.opens_thinking + "".join([*pieces, self.text(plain)])

    @cached_property
    def _tags(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {i: t.content for i, t in added if t.special and t.content in thinking.TOKENS}

    @cached_property
    def opens_thinking(self) -> str:
        """The tag of thinking that every response starts inside of; nothing for most templates."""
        if not self.chat:
            return ""
        try:
            prompt = "".join(self.tokens(self.ids(Prompt(id="", text="1"))))
        except UserError:
            return ""
        return next((opening for opening, _ in thinking.TAGS if prompt.rstrip().endswith(opening)), "")

    def tokens_before(self, ids: Sequence[int], offset: int) -> int:
        """How many leading tokens make no more than `offset` characters of text."""
        return bisect_right(range(len(ids) + 1), offset, key=lambda t: len(self.text(ids[:t]))) - 1

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """One display string per token, special tokens included."""
        for i in set(ids) - self._shown.keys():
            self._shown[i] = str(self.tokenizer.decode([i]))
        return [self._shown[i] for i in ids]


def _stopped(template: str, clock: datetime) -> str:
    """The template, told this moment whenever it asks for the time. (transformers passes no functions on: a
    macro takes the place of its own.)"""
    spelled = {f"%{c}": f"{clock:%{c}}" for c in _DIRECTIVES}
    spelled |= {f"%-{c}": f"{clock:%{c}}".lstrip("0") or "0" for c in "dmHIMSj"}
    steps = "".join(f" | replace({name!r}, {value!r})" for name, value in spelled.items())
    return f"{{%- macro {_CLOCK}(pattern) -%}}{{{{ pattern{steps} }}}}{{%- endmacro %}}{template}"


def with_question(prompt: Prompt, question: str) -> Prompt:
    """The same prompt with another last user message (a privileged or a rewrite prompt)."""
    if prompt.text is not None:
        return replace(prompt, text=question)
    messages = list(prompt.messages or ())
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    messages[last] = {**messages[last], "content": question}
    return replace(prompt, messages=tuple(messages))


def fill(template: str, **slots: str) -> str:
    """A template with every slot filled; text that happens to hold braces is safe.

    Raises:
        UserError: the template lacks a slot, or has one that nobody fills.
    """
    try:
        check_slots(template, set(slots))
    except ValueError as error:
        raise UserError(str(error)) from None
    parts = Formatter().parse(template)
    return "".join(literal + (slots[name] if name is not None else "") for literal, name, _, _ in parts)
