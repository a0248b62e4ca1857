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
from functools import partial
from typing import Any, TypeVar

import httpx

from onpath.config.sections import Served
from onpath.system.errors import UserError

T = TypeVar("T")
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0
_TRIES_OF_NONSENSE = 3
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
        self.url, self.key, self.section = section.url.rstrip("/").removesuffix("/v1"), key, section
        secret = os.environ.get("ONPATH_API_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=section.concurrency)
        self._client = httpx.Client(headers=headers, timeout=section.timeout, limits=limits)
        self.waits = 0
        """Requests that had to be sent again."""
        _check_url(section.url, key)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to one POST; None where it is empty."""
        return self._sent(lambda: self._client.post(self.url + path, json=body), lambda answer: answer)

    def ask(
        self, path: str, bodies: Sequence[Mapping[str, Any]], understand: Callable[[int, Any], T]
    ) -> list[T]:
        """Answers to many requests, in their order.

        Args:
            understand: takes a request's number and its answer; raises `Nonsense`.
        """
        stop = threading.Event()

        def one(i: int) -> T:
            return self._sent(
                lambda: self._client.post(self.url + path, json=bodies[i]), partial(understand, i), stop
            )

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
        send: Callable[[], httpx.Response],
        parse: Callable[[Any], T],
        stop: threading.Event | None = None,
    ) -> T:
        """One answer; `stop`: nobody waits for it any more."""
        deadline, wait, nonsense = math.inf, _FIRST_WAIT, 0
        stop = stop or threading.Event()
        while not stop.is_set():
            try:
                return parse(_body(self._answered(send())))
            except (Nonsense, httpx.DecodingError) as error:
                nonsense, deadline = nonsense + 1, math.inf  # somebody is there
                if nonsense == _TRIES_OF_NONSENSE:
                    raise UserError(
                        f"{self.key}.url: the server at {self.url} talks nonsense: {error}; nothing is lost: "
                        "mend it and start the same command again"
                    ) from None
            except (httpx.TransportError, _Busy) as error:
                # From the first failure: a request that runs into its own time limit is sent again.
                deadline = min(deadline, time.monotonic() + self.section.patience)
                if time.monotonic() + wait > deadline:
                    raise UserError(
                        f"{self.key}.url: no answer from {self.url} for {self.section.patience:g} s "
                        f"({_said(error)}); nothing is lost: start the server and then the same command again"
                    ) from None
            self.waits += 1
            stop.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        raise UserError(f"{self.key}.url: stopped asking {self.url}")

    def _answered(self, response: httpx.Response) -> httpx.Response:
        if response.status_code in _BUSY:
            raise _Busy(f"status {response.status_code}")
        if response.is_error:
            raise UserError(
                f"{self.key}.url: {self.url} refuses a request with status {response.status_code}: "
                f"{_excerpt(response)}"
            )
        return response


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
        served = self._sent(lambda: self._client.get(f"{self.url}/v1/models"), _models)
        found = next((m for m in served if m.get("id") in names or m.get("root") in names), None)
        if found is None:
            there = ", ".join(str(m.get("id")) for m in served) or "no model"
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
                raise Nonsense(f"an answer of the model {answer.get('model')!r}, not {self.model!r}")
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
    return found


def _body(response: httpx.Response) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        raise Nonsense("an answer that is not JSON") from None


def _excerpt(response: httpx.Response) -> str:
    try:
        found = response.json()
        text = str(
            found.get("error", {}).get("message") or found.get("message") or found.get("detail") or found
        )
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split())[:200] or "without a word"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
