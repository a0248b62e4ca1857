"""A black-box teacher: any OpenAI-compatible chat endpoint. It generates text and gives no log-probs, so
the student can learn from it by cross-entropy only.

Its vocabulary need not be the student's: its text is made into ids by the student's tokenizer, ordinary text
all of it, whatever control tokens it may spell.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from onpath.data.render import Renderer
from onpath.data.thinking import without_thinking
from onpath.engines.base import Engine
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.remote.host import Nonsense
from onpath.engines.remote.replay import Replay, address
from onpath.engines.remote.wire import Line, only_choice
from onpath.engines.stops import string_end
from onpath.records import Completion, Prompt, Sampling
from onpath.system.draws import request_seed
from onpath.system.errors import UserError

_PATH = "/v1/chat/completions"
_MESSAGES_ONLY = (
    "teacher.engine: chat answers messages only, and this needs a teacher that goes on from token ids and "
    "scores them; use hf or vllm"
)


class ChatEngine(Engine):
    """Answers messages.

    Args:
        line: to the endpoint.
        model: its name there.
        renderer: of the student: makes messages of prompts and ids of text.
        stop_ids: ids that end a response of the student.
        stop_strings: texts that end it, at the token that completes one.
        extra: further fields of every request; None leaves a field out.
        replay: if given, each request is answered once, over all runs of the same directory.
    """

    def __init__(
        self,
        line: Line,
        model: str,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        stop_strings: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.line, self.model, self.renderer = line, model, renderer
        self.extra, self.replay = extra or {}, replay
        self.stop_strings = tuple(stop_strings)
        ends = [*renderer.turn_end(), renderer.tokenizer.eos_token_id, *sorted(stop_ids)]
        self.stop = next(i for i in ends if i in stop_ids)

    takes_prefixes = False

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """It cannot.

        Raises:
            UserError: always.
        """
        raise UserError(_MESSAGES_ONLY)

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """It cannot; see `continue_from`."""
        raise UserError(_MESSAGES_ONLY)

    def answer(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """One answer per prompt, without log-probs; the student's stop token follows what the endpoint ended
        by itself. `sampling.top_k` is no part of the protocol and is left out.

        Raises:
            UserError: the endpoint stays away, refuses a request, or talks nonsense.
        """
        bodies = [self._body(p, sampling, key) for p, key in zip(prompts, keys, strict=True)]
        longest, many = sampling.max_new_tokens, self.line.section.concurrency
        if self.replay is None:
            return self._asked(bodies, longest, range(len(bodies)))
        addresses = [address(self.line.url, b, key) for b, key in zip(bodies, keys, strict=True)]
        done: list[Completion] = []
        for begin in range(0, len(bodies), many):  # a few at a time, so that a failure loses few answers
            here = slice(begin, begin + many)
            done += self.replay.answered(addresses[here], partial(self._asked, bodies[here], longest))
        return done

    def _asked(
        self, bodies: Sequence[Mapping[str, Any]], longest: int, wanted: Sequence[int]
    ) -> list[Completion]:
        said = self.line.ask(_PATH, [bodies[i] for i in wanted], _understood)
        return [self._completion(text, ended, longest) for text, ended in said]

    def _body(self, prompt: Prompt, sampling: Sampling, key: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [dict(m) for m in self.renderer.messages(prompt)],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request_seed(sampling.seed, key),
        }
        return {k: v for k, v in {**body, **self.extra}.items() if v is not None}

    def _completion(self, text: str, ended: bool, longest: int) -> Completion:
        ids = self.renderer.text_ids(text)
        end = string_end(ids[:longest], self.stop_strings, self.renderer.text)
        if end is not None:
            return Completion(ids=ids[:end], logprobs=(), finish_reason="stop")
        if ended and len(ids) < longest:
            return Completion(ids=(*ids, self.stop), logprobs=(), finish_reason="stop")
        return Completion(ids=ids[:longest], logprobs=(), finish_reason="length")


def _understood(_: int, answer: Any) -> tuple[str, bool]:
    """Text, and whether it ended by itself."""
    choice = only_choice(answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(text, str | None):
        raise Nonsense("a choice without a message (is it a chat endpoint?)")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise Nonsense("a message with half a character") from None
    if choice.get("finish_reason") == "content_filter":  # half a sentence, or a refusal, is no answer
        return "", False
    # Null, or nothing behind a server's inline thinking: all of its tokens went into that.
    return without_thinking(text or ""), choice.get("finish_reason") == "stop"
