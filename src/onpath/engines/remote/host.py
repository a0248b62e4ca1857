"""One exchange with one server: bounded in time and in size, JSON or nonsense, no secret in what is said of
it; and how the server has fared."""

import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx

from onpath.config.sections import Served
from onpath.engines.remote.deadline import bounded, within
from onpath.system.errors import UserError
from onpath.system.reading import parse_json
from onpath.system.text import one_line

_EXCERPT = 2**16  # bytes of an error that are looked at
_SMALLEST_LIMIT = 4 * 2**20  # bytes of an answer that nothing was asked of
_BYTES_PER_ENTRY = 1024  # one token of a served distribution, with its text and rank, and room to spare
_KEYS = ("ONPATH_API_KEY", "OPENAI_API_KEY")
_DOWN = {*range(500, 600)} - {501, 505}  # proxies have numbers of their own (520-529: no machine behind them)
_ASKED_TOO_MUCH = {408, 425, 429}
_CONNECT = 20.0  # seconds; a machine that is off would take the whole time of a request


class Nonsense(Exception):
    """An answer that cannot be true; the message says why."""


class Busy(Exception):
    """No answer this time, though somebody is there."""


class Down(Busy):
    """The server itself says that it does not work."""


class Host:
    """One server of a section.

    Args:
        url: its address.
        section: timeout and concurrency.
        key: the section's name, for messages.

    Raises:
        UserError: the url is none, or the API key.
    """

    def __init__(self, url: str, section: Served, key: str) -> None:
        _check_url(url, key)
        self.address, self.key, self.section = url.rstrip("/").removesuffix("/v1"), key, section
        self._secret = api_key()
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        # Nothing compressed: a few megabytes could unpack to gigabytes.
        headers["Accept-Encoding"] = "identity"
        self.client = bounded(
            httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(section.timeout, connect=min(section.timeout, _CONNECT)),
                limits=httpx.Limits(max_connections=section.concurrency),
            )
        )
        self.url = _without_password(self.address)
        """For people: `address` is what is asked."""
        self.slots = threading.BoundedSemaphore(section.concurrency)
        self.under_way = 0
        """Requests that it was chosen for and that have not ended."""
        self.failures = 0
        """How often it went down; requests that were on the way together count as one."""
        self.well, self.wait, self.again_at = True, 0.0, 0.0
        """Whether it answered last; seconds between two tries if not, and when the next one may be."""
        self.reason = ""
        """Why it did not."""
        self.checking = threading.RLock()
        self.checked, self.checked_after, self.renewals = False, 0, 0
        """Whether it was looked at since somebody asked for that; `failures` then; and how often it was found
        without what it had been given, and given it again."""

    def exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, wanted: bool = True
    ) -> Any:
        """One request and its answer: whole within `timeout`, no longer than what was asked for can be.

        Args:
            wanted: whether the answer says more than that all is well; if not it may be any text, and is not
                given.

        Raises:
            httpx.TransportError, Busy: there is none.
            Nonsense: it is no JSON.
            UserError: the server refuses the request.
        """
        limit, data = _limit(body or {}), bytearray()
        with (
            within(self.section.timeout),
            self.client.stream(method, self.address + path, json=body) as response,
        ):
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Nonsense("a compressed answer, which nobody asked for")
            for piece in response.iter_raw():
                data += piece
                if len(data) > limit:
                    raise Nonsense(f"an answer of more than {limit / 2**20:.0f} MiB to a request for less")
        word = self._without_secrets(_excerpt(bytes(data))) if response.is_error else ""
        if response.status_code in _DOWN | _ASKED_TOO_MUCH:
            kind = Down if response.status_code in _DOWN else Busy
            told = f": {word}" if word and not word.startswith("<") else ""  # no page of a proxy's
            raise kind(f"status {response.status_code}{told}")
        if response.is_error:
            raise UserError(
                f"{self.key}.url: {self.url} refuses a request with status {response.status_code}: "
                f"{word or 'without a word'}"
            )
        return _body(bytes(data)) if wanted else None

    def failed(self, error: Exception, *, before: int, first: float, longest: float) -> bool:
        """It went down, unless a request sent at the same time has said so already. Gives whether it had been
        down before: of a single failure nothing is said, as an idle connection may just have been closed.

        Args:
            before: `failures` when the request was sent.
            first, longest: seconds until it is tried again, doubled each time.
        """
        again = before == self.failures and not self.well
        if before == self.failures:
            self.failures, self.reason = self.failures + 1, self.said(error)
            self.well, self.wait = False, min(2 * self.wait or first, longest)
            self.again_at = time.monotonic() + self.wait
        return again

    def answered(self) -> None:
        self.well, self.wait = True, 0.0

    def said(self, error: Exception) -> str:
        """Of an error, for people."""
        return one_line(self._without_secrets(str(error)), 160) or type(error).__name__

    def _without_secrets(self, text: str) -> str:
        """What a library or a server says, without the API key and without a password in the address."""
        for secret in (self._secret, httpx.URL(self.address).password):
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


def _without_password(address: str) -> str:
    """Cut out where it stands: the same letters may be part of the host's name."""
    scheme, slashes, rest = address.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    known, at, host = authority.rpartition("@")
    user, colon, _ = known.partition(":")
    shown = f"{user}{colon}{'…' if colon else ''}{at}{host}"
    return f"{scheme}{slashes}{shown}{rest[len(authority) :]}"


def _limit(body: Mapping[str, Any]) -> int:
    """Bytes that the answer to a request may have."""
    prompt = body.get("prompt")
    read = len(prompt) * (int(body.get("prompt_logprobs") or 0) + 1) if isinstance(prompt, list) else 0
    written = int(body.get("max_tokens") or 0) * (int(body.get("logprobs") or 0) + 2)
    return _SMALLEST_LIMIT + _BYTES_PER_ENTRY * (read + written)


def _check_url(url: str, key: str) -> None:
    """An address that cannot be one is not waited for."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{key}.url: {url} is not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(f"{key}.url: {url} is not an address such as http://localhost:8000")


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
