"""A `vllm serve` on this host or another: generates, continues, scores; takes new weights from a directory.

Token ids go over the wire in both directions, never text. Log-probs are those of the distribution drawn from
if the server was started with `--logprobs-mode processed_logprobs`, or at temperature 1 without truncation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from onpath.data.render import Renderer
from onpath.engines.base import Engine
from onpath.engines.stops import string_end
from onpath.engines.vllm import checked_completion, request_seed
from onpath.engines.weights import Arrival, largest_gap, probe_ids, probe_logprobs, save_weights
from onpath.engines.wire import Nonsense, Server
from onpath.records import Completion, Sampling
from onpath.system import distributed
from onpath.system.errors import UserError

_ROUNDING = 1e-3  # by which a probability may exceed 1

_PADDED, _MORE_ROWS = 1.1, 1024  # rows of a head beyond the shared vocabulary
_LOST = 0.05  # by which half-precision probabilities may fall short of 1
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
    """Engine over a server's model.

    Args:
        server: the model's server.
        student: the model that trains, whose weights the server takes over; None: a teacher stands still.
        weights: directory that the server can read, for the student's weights.
        tolerance: largest gap, in nats, that rounding may explain.
        half: whether the server holds the student's weights in half precision.
    """

    server: Server

    def __init__(
        self,
        server: Server,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        stop_strings: Sequence[str] = (),
        vocabulary: int,
        student: nn.Module | None = None,
        weights: Path | None = None,
        tolerance: float = 1e-3,
        half: bool = False,
    ) -> None:
        self.server, self.renderer, self.stop_ids = server, renderer, stop_ids
        self.stop_strings = tuple(stop_strings)
        self.vocabulary, self.student, self.weights = vocabulary, student, weights
        self.tolerance, self.policy_version = tolerance, 0
        self._arrival = Arrival(tolerance=tolerance, half=half)
        self._held: Sequence[float] | None = None
        self.resyncs = 0
        """How often the server had lost the trained weights, by a restart, and was given them again."""

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`.

        Raises:
            UserError: the server stays away, talks nonsense, or does not take the student's weights.
        """
        keys = [str(i) for i in range(len(prefixes))] if keys is None else keys
        shared = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
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
                return checked_completion(
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

        return self._by_current_weights(lambda: self.server.complete(bodies, understand), len(bodies))

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        return [s.sampled for s in self.score_top(contexts, responses, k=1)]

    def score_top(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, k: int
    ) -> list[ServedScores]:
        """The k likeliest tokens at each position of the responses, and the responses' own."""
        rows = [[*c, *r] for c, r in zip(contexts, responses, strict=True)]
        wanted = [i for i, r in enumerate(responses) if len(r)]
        shared = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "return_token_ids": True}
        bodies = [{"prompt": rows[i], **shared} for i in wanted]

        def understand(at: int, choice: Any) -> ServedScores:
            i = wanted[at]
            _same_prompt(choice, rows[i])
            return _scores(choice.get("prompt_logprobs"), rows[i], len(contexts[i]), k, self.vocabulary)

        found = dict(zip(wanted, self.server.complete(bodies, understand), strict=True))
        nothing = ServedScores(ids=(), logprobs=(), sampled=())
        return [found.get(i, nothing) for i in range(len(rows))]

    def sync_weights(self, version: int) -> None:
        """Writes the trained weights where the server can read them, has it load them, and checks.

        Raises:
            UserError: the server cannot, or its log-probs are not the student's afterwards.
        """
        if self.student is not None:
            self._push()
            self._held = self._answers()
            if flaw := self._arrival.flaw(self.student, probe_ids(self.vocabulary), self._held):
                raise UserError(
                    f"rollout.url: after step {version} the server's log-probs {flaw}: it did not take the "
                    f"weights in {self.weights}"
                )
        self.policy_version = version

    def gap(self) -> float:
        """Largest difference between the server's log-probs and the student's on a fixed sequence, nats."""
        assert self.student is not None
        ids = probe_ids(self.vocabulary)
        return largest_gap(self._answers(), probe_logprobs(self.student, ids))

    def _answers(self) -> Sequence[float]:
        ids = probe_ids(self.vocabulary)
        return self.score([ids[:1]], [ids[1:]])[0]

    def _lost(self) -> bool:
        """Whether the server answers otherwise than right after the last push: it was started anew, say."""
        if self._held is None:
            return self.gap() > self.tolerance
        return largest_gap(self._answers(), self._held) > _DRIFT * self.tolerance

    def _restore(self) -> None:
        """Gives the server again what it was given last. Not the student's weights: they may be training."""
        if self._held is None:
            self.sync_weights(self.policy_version)
            return
        self._take()
        answers = self._answers()
        if not largest_gap(answers, self._held) <= self.tolerance:
            raise UserError(
                f"rollout.url: the server was restarted and does not answer as before with the weights in "
                f"{self.weights}; start the same command again"
            )
        self._held = answers

    def _push(self) -> None:
        assert self.student is not None
        assert self.weights is not None
        save_weights(self.student, self.weights)
        if distributed.rank() == 0:
            self._take()
        distributed.barrier()

    def _take(self) -> None:
        assert self.weights is not None
        where = {"weights_path": str(self.weights.resolve())}
        self.server.post("/collective_rpc", {"method": "reload_weights", "kwargs": where})
        self.server.post("/reset_prefix_cache")

    def _by_current_weights(self, generate: Callable[[], list[Completion]], count: int) -> list[Completion]:
        """Samples of the trained weights: a server that came back with its own is given them again."""
        if self.student is None or not count:
            return generate()
        for _ in range(2):
            waits = self.server.waits
            if self._lost():
                self.resyncs += 1
                self._restore()
            done = generate()
            if self.server.waits == waits or not self._lost():
                return done
        raise UserError("rollout.url: the server was restarted again and again while it sampled")


def _scores(entries: Any, ids: Sequence[int], begin: int, k: int, vocabulary: int) -> ServedScores:
    """Of the positions from `begin` on."""
    if not isinstance(entries, list) or len(entries) != len(ids):
        size = len(entries) if isinstance(entries, list) else "no"
        raise Nonsense(f"{size} prompt log-probs for {len(ids)} tokens")
    for entry, token in zip(entries[1:begin], ids[1:begin], strict=True):
        if not isinstance(entry, dict) or str(token) not in entry:  # of another request, as long as this one
            raise Nonsense(
                f"prompt log-probs without the prompt's own token {token}: they are another text's"
            )
    tops, logprobs, own = [], [], []
    for entry, token in zip(entries[begin:], ids[begin:], strict=True):
        if not isinstance(entry, dict) or str(token) not in entry:
            raise Nonsense(
                f"prompt log-probs without the prompt's own token {token}: they are another text's"
            )
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
