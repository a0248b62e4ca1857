"""One `vllm serve` or several, here or elsewhere: generates, continues, scores; takes new weights
(`handover.py`).

Token ids go over the wire in both directions, never text. Log-probs are those of the distribution drawn from
if the server was started with `--logprobs-mode processed_logprobs`, or at temperature 1 without truncation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from onpath.data.render import Renderer
from onpath.engines.base import Engine, sampled
from onpath.engines.head import own_logprobs
from onpath.engines.remote.handover import Handover
from onpath.engines.remote.host import Host, Nonsense
from onpath.engines.remote.wire import Questions, Server
from onpath.engines.stops import string_end
from onpath.engines.vllm import checked_completion
from onpath.engines.weights import Arrival, largest_gap, probe_ids
from onpath.records import Completion, Prompt, Rollout, Sampling
from onpath.system import distributed
from onpath.system.draws import request_seed
from onpath.system.errors import UserError

_ROUNDING = 1e-3  # by which a probability may exceed 1

_PADDED, _MORE_ROWS = 1.1, 1024  # rows of a head beyond the shared vocabulary
_LOST = 0.05  # by which half-precision probabilities may fall short of 1
_AS_IT_IS = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What a server takes from the model's generation_config.json where a request does not say it."""
_DRIFT = 0.1  # of the tolerance: one server asked twice for the same log-probs


@dataclass(frozen=True, kw_only=True)
class ServedScores:
    """What a server says of a response, token by token."""

    ids: tuple[tuple[int, ...], ...]
    """The likeliest tokens of each position, likeliest first."""
    logprobs: tuple[tuple[float, ...], ...]
    """Their log-probs at full-vocabulary normalisation, nats."""
    sampled: tuple[float, ...]
    """Of the response's own tokens."""


class ServerEngine(Engine):
    """Engine over a model on servers.

    Args:
        server: the model's servers.
        student: the model that trains, whose weights the servers take over; None: a teacher stands still.
        handover: how they get them.
        tolerance: largest gap, in nats, that rounding may explain.
        half: whether the servers hold the student's weights in half precision.
    """

    server: Server
    shows_early = True

    def __init__(
        self,
        server: Server,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        stop_strings: Sequence[str] = (),
        vocabulary: int,
        student: nn.Module | None = None,
        handover: Handover | None = None,
        tolerance: float = 1e-3,
        half: bool = False,
    ) -> None:
        self.server, self.renderer, self.stop_ids = server, renderer, stop_ids
        self.stop_strings = tuple(stop_strings)
        self.vocabulary, self.student, self.handover = vocabulary, student, handover
        self.tolerance, self.policy_version = tolerance, 0
        self._arrival = Arrival[Host](tolerance=tolerance, half=half)
        self._held: dict[Host, Sequence[float]] = {}
        if student is not None:
            server.renew = self._renewed
        self.resyncs = 0
        """How often a server had lost the trained weights, by a restart, and was given them again."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int = 1,
        keys: Sequence[str] | None = None,
        finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """See `Engine.generate`.

        Args:
            finished: is shown each rollout as soon as it is there, by any thread, while others are written.
        """
        return sampled(self, self.renderer, prompts, sampling, n=n, keys=keys, finished=finished)

    def continue_from(
        self,
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str] | None = None,
        finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """See `Engine.continue_from`.

        Args:
            finished: is shown each completion, with its prefix's number, see `generate`.

        Raises:
            UserError: the server stays away, talks nonsense, or does not take the student's weights.
        """
        keys = [str(i) for i in range(len(prefixes))] if keys is None else keys
        shared = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            **_AS_IT_IS,
            "stop_token_ids": sorted(self.stop_ids),
            **({"stop": list(self.stop_strings)} if self.stop_strings else {}),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
        bodies = [
            {**shared, "prompt": list(ids), "seed": request_seed(sampling.seed, key)}
            for ids, key in zip(prefixes, keys, strict=True)
        ]

        def understand(at: int, choice: Any) -> Completion:
            _same_prompt(choice, prefixes[at])
            ids = choice.get("token_ids")
            given = choice.get("logprobs")
            logprobs = given.get("token_logprobs") if isinstance(given, dict) else None
            if not _ints(ids) or not isinstance(logprobs, list) or not all(map(_number, logprobs)):
                raise Nonsense("a completion without token ids and log-probs (is it a vLLM server?)")
            try:
                end = string_end(ids, self.stop_strings, self.renderer.text)
                done = checked_completion(
                    tuple(ids),
                    tuple(logprobs),
                    sampling,
                    self.stop_ids,
                    self.vocabulary,
                    "it",
                    string_end=end,
                )
            except UserError as error:
                raise Nonsense(str(error)) from None
            if finished is not None:
                finished(at, done)
            return done

        if bodies:
            self._by_current_weights()
        return self.server.complete(bodies, understand)

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        return [s.sampled for s in self.score_top(contexts, responses, k=1)]

    def score_top(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, k: int
    ) -> list[ServedScores]:
        """The k likeliest tokens at each position of the responses, and the responses' own."""
        if any(len(r) for r in responses):
            self._by_current_weights()
        return self.server.answers(lambda asked: self.begin_scores(asked, contexts, responses, k=k))

    def begin_scores(
        self,
        questions: Questions,
        contexts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        k: int,
    ) -> list[Future[ServedScores]]:
        """`score_top`, without waiting for the answers."""
        rows = [[*c, *r] for c, r in zip(contexts, responses, strict=True)]
        wanted = [i for i, r in enumerate(responses) if len(r)]

        def understand(at: int, choice: Any) -> ServedScores:
            i = wanted[at]
            return _understood_scores(choice, rows[i], len(contexts[i]), k, self.vocabulary)

        answers = self.server.begin(questions, [_scoring(rows[i], k) for i in wanted], understand)
        found = dict(zip(wanted, answers, strict=True))
        nothing: Future[ServedScores] = Future()
        nothing.set_result(ServedScores(ids=(), logprobs=(), sampled=()))
        return [found.get(i, nothing) for i in range(len(rows))]

    def sync_weights(self, version: int) -> None:
        """Writes the trained weights where the servers can read them, has each load them, and checks. One
        that is away is given them when it is back, before it is asked for anything.

        Raises:
            UserError: a server cannot, or its log-probs are not the student's afterwards; or all are away.
        """
        if self.student is not None and self.handover is not None:
            self._held = self._push(self.handover)
            ids, pushed = probe_ids(self.vocabulary), self.handover.tensors()
            flaw = self._arrival.flaw(self.student, ids, self._held, pushed)
            if flaw is not None:
                raise UserError(
                    f"rollout.url: after step {version} the server's log-probs {flaw[1]}: {flaw[0].url} did "
                    f"not take the weights ({self.handover.where})"
                )
        self.policy_version = version

    def gap(self) -> float:
        """Largest difference between a server's log-probs and the student's on a fixed sequence, nats."""
        assert self.student is not None
        ours = own_logprobs(self.student, probe_ids(self.vocabulary)).tolist()
        return max(largest_gap(theirs, ours) for theirs in self.server.each(self._answers).values())

    def _answers(self, host: Host) -> Sequence[float]:
        """One server's log-probs of the fixed sequence."""
        ids = probe_ids(self.vocabulary)

        def understand(_: int, choice: Any) -> Sequence[float]:
            return _understood_scores(choice, ids, 1, 1, self.vocabulary).sampled

        return self.server.completed(host, _scoring(ids, 1), understand)

    def _push(self, handover: Handover) -> dict[Host, Sequence[float]]:
        """Answers of the servers that took the student's weights."""
        handover.write()
        hosts = self.server.hosts
        # Whoever came back in between has other weights: who took them is the first process's word.
        took = distributed.first_decides(lambda: [hosts.index(h) for h in self.server.each(handover.give)])
        return self.server.each(self._answers, among=[hosts[i] for i in took])

    def _renewed(self, host: Host, was_down: bool) -> bool:
        """Whether a server answered otherwise than right after the last push (it was started anew, say), and
        was given again what it was given last. Not the student's weights: they may be training."""
        if not self._held or self.handover is None:  # nothing was given yet; a teacher has nothing to lose
            return False
        held = self._held.get(host)
        # One that was down has to prove more: old weights of a few small steps ago are nearly the new ones.
        allowed = 0.0 if was_down else _DRIFT * self.tolerance
        there = held is not None and not self.handover.lacks(host)
        if held is not None and there and largest_gap(self._answers(host), held) <= allowed:
            return False
        self.handover.give(host)
        answers = self._answers(host)
        if not largest_gap(answers, held or next(iter(tuple(self._held.values())))) <= self.tolerance:
            raise UserError(
                f"rollout.url: {host.url} was restarted and does not answer as before with the weights "
                f"({self.handover.where}); start the same command again"
            )
        self._held[host] = answers
        self.resyncs += 1
        return True

    def _by_current_weights(self) -> None:
        """From here on each server is asked once it has shown that it holds the weights of the last push."""
        if self.student is None:
            return
        if not self._held:
            if self.gap() > self.tolerance:
                self.resyncs += 1
                self.sync_weights(self.policy_version)
            else:
                self._held = self.server.each(self._answers)
        self.server.check_again()


def _scoring(ids: Sequence[int], k: int) -> dict[str, Any]:
    """A request for the k likeliest tokens at each position."""
    shared = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "return_token_ids": True}
    return {"prompt": list(ids), **shared}


def _understood_scores(
    choice: Mapping[str, Any], ids: Sequence[int], begin: int, k: int, vocabulary: int
) -> ServedScores:
    """Of the positions from `begin` on."""
    _same_prompt(choice, ids)
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        size = len(entries) if isinstance(entries, list) else "no"
        raise Nonsense(f"{size} prompt log-probs for {len(ids)} tokens")
    tops, logprobs, own = [], [], []
    for at, (entry, token) in enumerate(zip(entries, ids, strict=True)):
        if at == 0 and begin:  # nothing predicts the first token
            continue
        if not isinstance(entry, dict) or str(token) not in entry:  # of another request, as long as this one
            raise Nonsense(
                f"prompt log-probs without the prompt's own token {token}: they are another text's"
            )
        if at < begin:
            continue
        values = _logprobs(entry)
        _check_mass(values, k, vocabulary)
        own.append(min(values[token], 0.0))
        best = sorted((t for t in values if 0 <= t < vocabulary), key=lambda t: (-values[t], t))[:k]
        if len(best) < min(k, vocabulary) and len(values) < min(k, vocabulary):
            raise Nonsense(f"{len(values)} log-probs for a token, not {k}")
        tops.append(tuple(best))
        logprobs.append(tuple(min(values[t], 0.0) for t in best))
    return ServedScores(ids=tuple(tops), logprobs=tuple(logprobs), sampled=tuple(own))


def _logprobs(entry: dict[str, Any]) -> dict[int, float]:
    """Token id → log-prob at one position, if they can be some of a distribution's."""
    values: dict[int, float] = {}
    for token, found in entry.items():
        p = found.get("logprob") if isinstance(found, dict) else None
        if not (token.isdecimal() and len(token) < 12) or not _number(p) or math.isnan(p) or p > _ROUNDING:
            raise Nonsense("log-probs that are not numbers, or above 0")
        values[int(token)] = float(p)
    mass = sum(map(math.exp, values.values()))
    if mass > 1 + _ROUNDING:
        raise Nonsense(f"probabilities of one token that sum to {mass:.4g}")
    return values


def _check_mass(values: Mapping[int, float], k: int, vocabulary: int) -> None:
    """The k likeliest tokens of a distribution: no other is likelier than the last of them, so what they
    leave is bounded. Catches −9999 and −Infinity where probabilities should be."""
    best = sorted((math.exp(p) for p in values.values()), reverse=True)[:k]
    others = max(0, _PADDED * vocabulary + _MORE_ROWS - len(best))
    most = sum(best) + others * best[-1]
    if most < 1 - _LOST:
        raise Nonsense(
            f"the likeliest {len(best)} tokens have so little mass that all have at most {most:.3g}"
        )


def _same_prompt(choice: Mapping[str, Any], asked: Sequence[int]) -> None:
    """Servers that say what they read must have read what was asked."""
    read = choice.get("prompt_token_ids")
    if read is not None and read != list(asked):
        raise Nonsense("an answer to another prompt than was asked")


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ints(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(t) is int for t in ids)
