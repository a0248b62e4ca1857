"""Requests to OpenAI-compatible servers: many at a time, spread over the servers, tried again while one is
down, refused if it talks nonsense.

A server may be restarted at any moment: a request that finds nobody goes to another server, or waits and is
sent again, for `patience` seconds. An answer that cannot be true (another model, a wrong number of tokens,
log-probs that are not numbers) is asked for twice more and then stops the run: what is finished is on disk,
and the same command goes on.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import httpx

from onpath.config.sections import Served
from onpath.engines.remote.host import Busy, Down, Host, Nonsense
from onpath.system.errors import UserError, say_once
from onpath.system.signals import asked_to_stop
from onpath.system.text import one_line

T = TypeVar("T")
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0
_QUIET = 1.0  # seconds between two tries from which on people are told
_LOOK = 0.2  # seconds between two looks at whether to wait on
_TRIES_OF_NONSENSE = 3
_UNREADABLE = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


class _Failed(Exception):
    """One try."""

    def __init__(self, host: Host, error: Exception) -> None:
        super().__init__(host, error)
        self.host, self.error = host, error


class Line:
    """To the servers of a section, whatever they serve.

    A batch is cut into as many parts as there are servers, neighbours together: samples of one prompt and
    windows along one response begin alike, and meet the same prefix cache. (A router sees one request at a
    time, and has to find that out by hashes or a tree of prefixes.) A server that has room takes over from
    one that has none. One that is down is tried by one request at a time, until it answers.

    Args:
        section: url, timeout, patience and concurrency.
        key: the section's name, for messages.

    Raises:
        UserError: the url is none.
    """

    def __init__(self, section: Served, key: str) -> None:
        assert section.url is not None
        self.key, self.section = key, section
        self.hosts = [Host(url, section, key) for url in section.urls]
        self.url = self.hosts[0].url
        """Of the first one, for people."""
        self.waits = 0
        """Requests that had to be sent again."""
        self.renew: Callable[[Host, bool], bool] | None = None
        """Looks at a server before it is asked, after `check_again` or after it was down (which is what the
        second argument says): whether it had lost what it was given, and was given it again."""
        self._choosing = threading.Lock()
        self._told: set[str] = set()

    def get(self, path: str, parse: Callable[[Any], T], *, at: Host | None = None) -> T:
        """The answer to one GET, as `parse` understands it."""
        return self._sent(lambda host: understood(parse, host.exchange("GET", path)), at=at)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to one POST; None where it is empty."""
        return self._sent(lambda host: host.exchange("POST", path, body))

    def ask(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        understand: Callable[[int, Any], T],
        *,
        at: Host | None = None,
    ) -> list[T]:
        """Answers to many requests, in their order.

        Args:
            understand: takes a request's number and its answer; raises `Nonsense`.
            at: None: any server.
        """
        return self.answers(lambda questions: questions.ask(path, bodies, understand), at=at)

    def answers(self, ask: Callable[["Questions"], list[Future[T]]], *, at: Host | None = None) -> list[T]:
        """Of what is asked together, all waited for; with the first failure the others are given up."""
        with closing(Questions(self, at=at)) as questions:
            return [future.result() for future in ask(questions)]

    def each(self, what: Callable[[Host], T], *, among: Sequence[Host] | None = None) -> dict[Host, T]:
        """Of every server that is there, side by side; one of them is waited for."""
        hosts = self.hosts if among is None else among
        found: dict[Host, T] = {}

        def one(host: Host) -> _Failed | None:
            try:
                found[host] = self._tried(host, host.failures, what, look=False)
            except _Failed as failed:
                return failed
            return None

        def everyone(_: int) -> dict[Host, T]:
            with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
                failures = [failed for failed in pool.map(one, hosts) if failed is not None]
            wrong = [failed for failed in failures if isinstance(failed.error, Nonsense)]
            if wrong or not found:
                raise (wrong or failures)[0]
            return found

        return self._kept_up(everyone, threading.Event())

    def check_again(self) -> None:
        """Every server is looked at (`renew`) before it is asked next."""
        for host in self.hosts:
            host.checked = False

    def _sent(
        self,
        send: Callable[[Host], T],
        stop: threading.Event | None = None,
        *,
        home: int = 0,
        at: Host | None = None,
    ) -> T:
        """One answer.

        Args:
            stop: nobody waits for it any more.
            home: the server that is to have it, if nothing speaks against it.
            at: the only one that can have it.
        """
        stop = stop or threading.Event()

        def attempt(tries: int) -> T:
            with self._chosen(home + tries, at) as (host, before), host.slots:
                if stop.is_set():
                    raise _Failed(host, Busy("stopped"))
                return self._tried(host, before, send)

        return self._kept_up(attempt, stop)

    def _kept_up(self, attempt: Callable[[int], T], stop: threading.Event) -> T:
        """What an attempt gives in the end; it takes the number of those before it."""
        deadline, wait, nonsense, tries = math.inf, _FIRST_WAIT, 0, 0
        while not stop.is_set():
            try:
                return attempt(tries)
            except _Failed as failed:
                host, error = failed.host, failed.error
            if isinstance(error, Nonsense | httpx.DecodingError):
                nonsense, deadline = nonsense + 1, math.inf  # somebody is there
                if nonsense == _TRIES_OF_NONSENSE:
                    raise UserError(
                        f"{self.key}.url: the server at {host.url} talks nonsense: {host.said(error)}; "
                        "nothing is lost: mend it and start the same command again"
                    )
                alone = True
            else:
                # From the first failure: a request that runs into its own time limit is sent again.
                deadline = min(deadline, time.monotonic() + self.section.patience)
                if time.monotonic() + wait > deadline:
                    where = ", ".join(h.url for h in self.hosts if h is host or not h.well)
                    raise UserError(
                        f"{self.key}.url: no answer from {where} for {self.section.patience:g} s "
                        f"({host.said(error)}); nothing is lost: once the server answers, the same command "
                        "goes on"
                    )
                tries += not host.well
                alone = host.well or not any(h.well for h in self.hosts)
                # Without an answer the step cannot be ended.
                if alone and not host.well and (signal := asked_to_stop()):
                    raise UserError(
                        f"{self.key}.url: {signal} while {host.url} gave no answer ({host.said(error)}): the "
                        "step is not ended, and the same command goes on before it"
                    )
            self.waits += 1
            if alone:
                if wait > _QUIET and not host.well:
                    say_once(
                        f"{self.key}.url: no answer from {host.url} ({host.said(error)}); asking again for "
                        f"up to {self.section.patience:g} s ({self.key}.patience)"
                    )
                _pause(wait, stop)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise UserError(f"{self.key}.url: stopped asking {self.url}")

    @contextmanager
    def _chosen(self, home: int, at: Host | None) -> Iterator[tuple[Host, int]]:
        """A server for one request, and how often it has been down so far."""
        with self._choosing:
            own = at or self.hosts[home % len(self.hosts)]
            well = [h for h in self.hosts if h.well and at is None]
            due = not own.well and own.again_at <= time.monotonic()
            full = own.well and own.under_way >= self.section.concurrency
            host = min(well, key=lambda h: h.under_way) if well and (full or not (own.well or due)) else own
            if not host.well:
                host.again_at = math.inf  # until this request knows
            host.under_way += 1
            before = host.failures
        try:
            yield host, before
        finally:
            with self._choosing:
                host.under_way -= 1
                host.again_at = time.monotonic() if host.again_at == math.inf else host.again_at

    def _tried(self, host: Host, before: int, send: Callable[[Host], T], *, look: bool = True) -> T:
        """One try at one server, whose `failures` were so many when it was chosen."""
        try:
            renewed = self._looked_at(host, before) if look else 0
            answer = send(host)
            if look and host.failures != before and self._looked_at(host) != renewed:
                raise Busy("it was started again")  # who answered may have been the new one
        except (httpx.TransportError, Down) as error:
            with self._choosing:
                if host.failed(error, before=before, first=_FIRST_WAIT, longest=_LONGEST_WAIT):
                    self._tell(host)
            raise _Failed(host, error) from None
        except (Busy, Nonsense, httpx.DecodingError) as error:
            raise _Failed(host, error) from None
        with self._choosing:
            host.answered()
        return answer

    def _looked_at(self, host: Host, before: int | None = None) -> int:
        """How often it has been given again what it had lost.

        Args:
            before: its `failures` when it was chosen: a choice that is out of date is taken back.
        """
        if self.renew is not None:
            with host.checking:
                if not host.well and before not in (None, host.failures):
                    raise Busy(host.reason)
                failures = host.failures
                if not host.checked or host.checked_after != failures:
                    host.renewals += self.renew(host, host.checked_after != failures)
                    host.checked, host.checked_after = True, failures
        return host.renewals

    def _tell(self, host: Host) -> None:
        """Once of each server."""
        if host.url not in self._told and any(h.well for h in self.hosts):
            self._told.add(host.url)
            say_once(
                f"warning: {self.key}.url: no answer from {host.url} ({host.reason}); the other servers are "
                "asked in its place until it is back"
            )


def _pause(seconds: float, stop: threading.Event) -> None:
    """Waits, unless nobody waits for the answer any more, or the process is asked to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not asked_to_stop() and not stop.wait(min(left, _LOOK)):
        pass


class Questions:
    """Requests to a line that are on their way together; their answers are waited for when they are needed.

    Args:
        at: the only server that can answer; None: any.
    """

    def __init__(self, line: Line, *, at: Host | None = None) -> None:
        self._line, self._at, self._stop, self._times = line, at, threading.Event(), itertools.count()
        self._pool = ThreadPoolExecutor(max_workers=line.section.concurrency * len(line.hosts))

    def ask(
        self, path: str, bodies: Sequence[Mapping[str, Any]], understand: Callable[[int, Any], T]
    ) -> list[Future[T]]:
        """Sends requests, which are cut into as many parts as there are servers; the answers to be, in their
        order.

        Args:
            understand: see `Line.ask`.
        """
        many, count, first = len(self._line.hosts), len(bodies), next(self._times)

        def one(i: int) -> T:
            def send(host: Host) -> T:
                return understood(partial(understand, i), host.exchange("POST", path, bodies[i]))

            return self._line._sent(send, self._stop, home=first + i * many // count, at=self._at)

        # The parts side by side: those who take requests from this list take them for all servers.
        order = sorted(range(count), key=lambda i: i * many % count)
        futures = {i: self._pool.submit(one, i) for i in order}
        return [futures[i] for i in range(count)]

    def close(self) -> None:
        """Nobody waits any more: what is not sent yet is not sent, and nothing is tried again."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def understood(parse: Callable[[Any], T], answer: Any) -> T:
    """Whatever an answer holds, it is understood or nonsense."""
    try:
        return parse(answer)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise Nonsense(f"an answer of another form than was asked for ({type(error).__name__})") from None


class Server(Line):
    """One model, of one `vllm serve` or of several.

    Args:
        section, key: see `Line`.
        names: what the model may be called there: its name and where it lies.

    Raises:
        UserError: one of the servers does not answer within `patience`, or has another model.
    """

    def __init__(self, section: Served, key: str, names: Sequence[str]) -> None:
        super().__init__(section, key)
        found = [self._model(host, names) for host in self.hosts]
        self.model: str = found[0]["id"]
        self.adapter: str | None = None
        """The name of an adapter on the model, which is asked in its place."""
        lengths = [m["max_model_len"] for m in found if m.get("max_model_len") is not None]
        self.context_length: int | None = min(lengths, default=None)
        if other := next((m["id"] for m in found if m["id"] != self.model), None):
            raise UserError(
                f"{key}.url: one server calls the model {one_line(self.model)}, another one "
                f"{one_line(other)}; start them with one --served-model-name"
            )

    def _model(self, host: Host, names: Sequence[str]) -> dict[str, Any]:
        """What a server says of the model."""
        served = self.get("/v1/models", _models, at=host)
        found = next((m for m in served if m.get("id") in names or m.get("root") in names), None)
        if found is None:
            there = one_line(", ".join(m["id"] for m in served)) or "no model"
            option = "student.model" if self.key == "rollout" else f"{self.key}.model"
            raise UserError(
                f"{self.key}.url: the server at {host.url} has {there}, not {names[0]}; start it with that "
                f"model or set {option} to its name"
            )
        return found

    @property
    def asked(self) -> str:
        """The name that requests carry."""
        return self.adapter or self.model

    def models_at(self, host: Host) -> list[str]:
        """What a server serves by now, adapters too."""
        return [m["id"] for m in understood(_models, host.exchange("GET", "/v1/models"))]

    def complete(self, bodies: Sequence[Mapping[str, Any]], understand: Callable[[int, Any], T]) -> list[T]:
        """Answers to completion requests, in their order.

        Args:
            understand: takes a request's number and its only choice; raises `Nonsense`.
        """
        return self.answers(lambda questions: self.begin(questions, bodies, understand))

    def begin(
        self,
        questions: Questions,
        bodies: Sequence[Mapping[str, Any]],
        understand: Callable[[int, Any], T],
    ) -> list[Future[T]]:
        """Sends completion requests; see `complete`."""
        named = [{"model": self.asked, **body} for body in bodies]
        return questions.ask("/v1/completions", named, lambda i, answer: understand(i, self._choice(answer)))

    def completed(self, host: Host, body: Mapping[str, Any], understand: Callable[[int, Any], T]) -> T:
        """One server's answer to one request, asked for once; for `Line.each` and `Line.renew`."""
        answer = host.exchange("POST", "/v1/completions", {"model": self.asked, **body})
        return understood(lambda answer: understand(0, self._choice(answer)), answer)

    def _choice(self, answer: Any) -> dict[str, Any]:
        if isinstance(answer, dict) and answer.get("model") != self.asked:
            raise Nonsense(
                f"an answer of the model {one_line(repr(answer.get('model')))}, not {self.asked!r}"
            )
        return only_choice(answer)


def only_choice(answer: Any) -> dict[str, Any]:
    """Of a completion that was asked for one."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Nonsense("an answer without exactly one choice")
    return choices[0]


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
