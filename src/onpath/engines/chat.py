"""A black-box teacher: any OpenAI-compatible chat endpoint. It writes text and gives no log-probs, so the
student can learn from what it wrote by cross-entropy only.

Its vocabulary need not be the student's: its text is made into ids by the student's tokenizer, ordinary text
all of it, whatever control tokens it may spell.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from onpath.cache import Cache
from onpath.engines.base import Completion
from onpath.engines.vllm import request_seed
from onpath.engines.wire import Line, Nonsense, only_choice
from onpath.records import Prompt, Sampling
from onpath.render import Renderer

_PATH = "/v1/chat/completions"


class ChatWriter:
    """Answers messages.

    Args:
        line: to the endpoint.
        model: its name there.
        renderer: of the student: makes messages of prompts and ids of text.
        stop_ids: ids that end a response of the student.
        extra: further fields of every request; None leaves a field out.
        cache: if given, each request is answered once, over all runs of the same directory.
    """

    def __init__(
        self,
        line: Line,
        model: str,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        extra: Mapping[str, Any] | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.line, self.model, self.renderer, self.extra, self.cache = (
            line,
            model,
            renderer,
            extra or {},
            cache,
        )
        ends = [*renderer.turn_end(), renderer.tokenizer.eos_token_id, *sorted(stop_ids)]
        self.stop = next(i for i in ends if i in stop_ids)

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, keys: Sequence[str]
    ) -> list[Completion]:
        """One answer per prompt, without log-probs; the student's stop token follows what the endpoint ended
        by itself. `sampling.top_k` is no part of the protocol and is left out.

        Raises:
            UserError: the endpoint stays away, refuses a request, or talks nonsense.
        """
        bodies = [self._body(p, sampling, key) for p, key in zip(prompts, keys, strict=True)]

        def ask(wanted: list[int]) -> list[Completion]:
            said = self.line.ask(_PATH, [bodies[i] for i in wanted], _understood)
            return [self._completion(text, ended, sampling.max_new_tokens) for text, ended in said]

        if self.cache is None:
            return ask(list(range(len(bodies))))
        done: list[Completion] = []
        many = self.line.section.concurrency  # at a time, so that a failure loses few answers
        for begin in range(0, len(bodies), many):
            here = list(range(begin, min(begin + many, len(bodies))))

            def asked(missing: list[int], here: list[int] = here) -> list[Completion]:
                return ask([here[i] for i in missing])

            done += self.cache.answered([self._address(bodies[i], keys[i]) for i in here], asked)
        return done

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

    def _completion(self, text: str, ended: bool, room: int) -> Completion:
        ids = self.renderer.text_ids(text)
        if ended and len(ids) < room:
            return Completion(ids=(*ids, self.stop), logprobs=(), finish_reason="stop")
        return Completion(ids=ids[:room], logprobs=(), finish_reason="length")

    def _address(self, body: Mapping[str, Any], key: str) -> str:
        content = json.dumps([self.line.url, body, key])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _understood(_: int, answer: Any) -> tuple[str, bool]:
    """Text, and whether it ended by itself."""
    choice = only_choice(answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(text, str | None):
        raise Nonsense("a choice without a message (is it a chat endpoint?)")
    return text or "", choice.get("finish_reason") == "stop"  # null: all of its tokens went into thinking
