"""Requests to an OpenAI-compatible server: many at a time, tried again while it is down, refused if it talks
nonsense.

A server may be restarted at any moment: a request that finds nobody waits and is sent again, for `patience`
seconds. An answer that cannot be true (another model, a wrong number of tokens, log-probs that are not
numbers) is asked for twice more and then stops the run: what is finished is on disk, and the same command
goes on.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import httpx

from onpath.config.sections import Served
from onpath.engines.deadline import bounded, within
from onpath.system.errors import UserError
from onpath.system.reading import parse_json
from onpath.system.text import one_line

T = TypeVar("T")
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0
_TRIES_OF_NONSENSE = 3
_EXCERPT = 2**16  # bytes of an error that are looked at
_SMALLEST_LIMIT = 4 * 2**20  # bytes of an answer that nothing was asked of
_BYTES_PER_ENTRY = 1024  # one token of a served distribution, with its text and rank, and room to spare
_KEYS = ("ONPATH_API_KEY", "OPENAI_API_KEY")
_UNREADABLE = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
_BUSY = {408, 425, 429, 500, 502, 503, 504}


class Nonsense(Exception):
    """An answer that cannot be true; the message says why."""


class Line:
    """To one server, whatever it serves.

    Args:
        section: url, timeout, patience and concurrency.
        key: the section's name, for messages.

    Raises:
        UserError: the url is none.
    """

    def __init__(self, section: Served, key: str) -> None:
        assert section.url is not None
        _check_url(section.url, key)
        self._address, self.key, self.section = section.url.rstrip("/").removesuffix("/v1"), key, section
        self._secret = api_key()
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        # Nothing compressed: a few megabytes could unpack to gigabytes.
        headers["Accept-Encoding"] = "identity"
        limits = httpx.Limits(max_connections=section.concurrency)
        self._client = bounded(httpx.Client(headers=headers, timeout=section.timeout, limits=limits))
        self.url = self._without_secrets(self._address)
        """For people."""
        self.waits = 0
        """Requests that had to be sent again."""

    def get(self, path: str, parse: Callable[[Any], T]) -> T:
        """The answer to one GET, as `parse` understands it."""
        return self._sent(lambda: self._exchange("GET", path), parse)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to one POST; None where it is empty."""
        return self._sent(lambda: self._exchange("POST", path, body), lambda answer: answer)

    def ask(
        self, path: str, bodies: Sequence[Mapping[str, Any]], understand: Callable[[int, Any], T]
    ) -> list[T]:
        """Answers to many requests, in their order.

        Args:
            understand: takes a request's number and its answer; raises `Nonsense`.
        """
        stop = threading.Event()

        def one(i: int) -> T:
            return self._sent(lambda: self._exchange("POST", path, bodies[i]), partial(understand, i), stop)

        with ThreadPoolExecutor(max_workers=self.section.concurrency) as pool:
            futures = [pool.submit(one, i) for i in range(len(bodies))]
            try:
                return [f.result() for f in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _sent(
        self,
        send: Callable[[], Any],
        parse: Callable[[Any], T],
        stop: threading.Event | None = None,
    ) -> T:
        """One answer; `stop`: nobody waits for it any more."""
        deadline, wait, nonsense = math.inf, _FIRST_WAIT, 0
        stop = stop or threading.Event()
        while not stop.is_set():
            try:
                return _understood(parse, send())
            except (Nonsense, httpx.DecodingError) as error:
                nonsense, deadline = nonsense + 1, math.inf  # somebody is there
                if nonsense == _TRIES_OF_NONSENSE:
                    raise UserError(
                        f"{self.key}.url: the server at {self.url} talks nonsense: {self._said(error)}; "
                        "nothing is lost: mend it and start the same command again"
                    ) from None
            except (httpx.TransportError, _Busy) as error:
                # From the first failure: a request that runs into its own time limit is sent again.
                deadline = min(deadline, time.monotonic() + self.section.patience)
                if time.monotonic() + wait > deadline:
                    raise UserError(
                        f"{self.key}.url: no answer from {self.url} for {self.section.patience:g} s "
                        f"({self._said(error)}); nothing is lost: start the server and then the same command "
                        "again"
                    ) from None
            self.waits += 1
            stop.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        raise UserError(f"{self.key}.url: stopped asking {self.url}")

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request and its answer: whole within `timeout`, no longer than what was asked for can be."""
        limit, data = _limit(body or {}), bytearray()
        with (
            within(self.section.timeout),
            self._client.stream(method, self._address + path, json=body) as response,
        ):
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Nonsense("a compressed answer, which nobody asked for")
            for piece in response.iter_raw():
                data += piece
                if len(data) > limit:
                    raise Nonsense(f"an answer of more than {limit / 2**20:.0f} MiB to a request for less")
        if response.status_code in _BUSY:
            raise _Busy(f"status {response.status_code}")
        if response.is_error:
            raise UserError(
                f"{self.key}.url: {self.url} refuses a request with status {response.status_code}: "
                f"{self._without_secrets(_excerpt(bytes(data))) or 'without a word'}"
            )
        return _body(bytes(data))

    def _said(self, error: Exception) -> str:
        return one_line(self._without_secrets(str(error)), 160) or type(error).__name__

    def _without_secrets(self, text: str) -> str:
        """What a library or a server says, without the API key and without a password in the address."""
        password = httpx.URL(self._address).password
        for secret in (self._secret, password):
            if secret:
                text = text.replace(secret, "…")
        return text


def api_key() -> str:
    """The key that requests carry; empty: none.

    Raises:
        UserError: it holds what no key holds. It is not printed.
    """
    name = next((n for n in _KEYS if os.environ.get(n)), "")
    secret = os.environ.get(name, "").strip()
    if not all(33 <= ord(c) <= 126 for c in secret):
        raise UserError(
            f"{name} holds a space, a line break or a letter that no API key has (a curly quote, say); set "
            "it to the key alone"
        )
    return secret


def _understood(parse: Callable[[Any], T], answer: Any) -> T:
    """Whatever an answer holds, it is understood or nonsense."""
    try:
        return parse(answer)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise Nonsense(f"an answer of another form than was asked for ({type(error).__name__})") from None


def _limit(body: Mapping[str, Any]) -> int:
    """Bytes that the answer to a request may have."""
    prompt = body.get("prompt")
    read = len(prompt) * (int(body.get("prompt_logprobs") or 0) + 1) if isinstance(prompt, list) else 0
    written = int(body.get("max_tokens") or 0) * (int(body.get("logprobs") or 0) + 2)
    return _SMALLEST_LIMIT + _BYTES_PER_ENTRY * (read + written)


class Server(Line):
    """One model of one `vllm serve`.

    Args:
        section, key: see `Line`.
        names: what the model may be called there: its name and where it lies.

    Raises:
        UserError: nobody answers within `patience`, or the server has another model.
    """

    def __init__(self, section: Served, key: str, names: Sequence[str]) -> None:
        super().__init__(section, key)
        served = self.get("/v1/models", _models)
        found = next((m for m in served if m.get("id") in names or m.get("root") in names), None)
        if found is None:
            there = one_line(", ".join(m["id"] for m in served)) or "no model"
            option = "student.model" if key == "rollout" else f"{key}.model"
            raise UserError(
                f"{key}.url: the server at {self.url} has {there}, not {names[0]}; start it with that model "
                f"or set {option} to its name"
            )
        self.model: str = found["id"]
        self.context_length: int | None = found.get("max_model_len")

    def complete(self, bodies: Sequence[Mapping[str, Any]], understand: Callable[[int, Any], T]) -> list[T]:
        """Answers to completion requests, in their order.

        Args:
            understand: takes a request's number and its only choice; raises `Nonsense`.
        """

        def parse(i: int, answer: Any) -> T:
            if isinstance(answer, dict) and answer.get("model") != self.model:
                raise Nonsense(
                    f"an answer of the model {one_line(repr(answer.get('model')))}, not {self.model!r}"
                )
            return understand(i, only_choice(answer))

        return self.ask("/v1/completions", [{"model": self.model, **body} for body in bodies], parse)


def only_choice(answer: Any) -> dict[str, Any]:
    """Of a completion that was asked for one."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Nonsense("an answer without exactly one choice")
    return choices[0]


class _Busy(Exception):
    pass


def _check_url(url: str, key: str) -> None:
    """An address that cannot be one is not waited for."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{key}.url: {url} is not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(f"{key}.url: {url} is not an address such as http://localhost:8000")


def _models(answer: Any) -> list[dict[str, Any]]:
    found = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        raise Nonsense("no list of models at /v1/models (is it a vLLM server?)")
    for model in found:
        longest = model.get("max_model_len")
        if not isinstance(model.get("id"), str):
            raise Nonsense("a model without an id at /v1/models")
        if longest is not None and (type(longest) is not int or longest < 1):
            raise Nonsense("a max_model_len that is no number of tokens at /v1/models")
    return found


def _body(data: bytes) -> Any:
    if not data:
        return None
    try:
        return parse_json(data)
    except ValueError as error:
        raise Nonsense(f"an answer that is not JSON: {error}") from None


def _excerpt(data: bytes) -> str:
    """What an error says for itself."""
    text = data[:_EXCERPT].decode("utf-8", errors="replace")
    with suppress(ValueError):
        found = parse_json(text)
        if isinstance(found, dict):
            inner = found.get("error")
            named = inner.get("message") if isinstance(inner, dict) else inner
            text = str(named or found.get("message") or found.get("detail") or found)
    return one_line(text)
