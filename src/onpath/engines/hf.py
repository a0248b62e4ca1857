"""Sampling from a transformers model in process: the model that trains, with no copy.

A decoding loop of our own, not `generate`: the log-probs of the distribution drawn from come with each token
(`generate` would keep [T, B, V] logits for them), finished rows leave the batch, and each draw depends on
(seed, key, position) alone, so that batching, padding and the number of processes do not change a sample.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.engines.base import Completion
from onpath.errors import UserError
from onpath.models import context_length, unwrapped
from onpath.records import Prompt, Rollout, Sampling
from onpath.render import Renderer

# B rows, T tokens so far, V vocabulary.
_COMPACT_BELOW = 0.75  # drop finished rows once fewer than this share of the batch is still writing


class HFEngine:
    """Engine over a transformers causal LM.

    Args:
        model: any causal LM, peft-wrapped or not; it is put into evaluation mode while writing.
        renderer: makes ids of prompts.
        stop_ids: ids that end a response.
        batch_tokens: rows × (prefix + new tokens) that one batch may hold.
        bf16: write under bfloat16 autocast, as the training forward pass does.
        vocabulary: number of ids that may be drawn; rows of the head beyond it are padding.
    """

    def __init__(
        self,
        model: nn.Module,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        batch_tokens: int = 32_768,
        bf16: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        self.model, self.renderer, self.batch_tokens = model, renderer, batch_tokens
        self.stop_ids, self.bf16, self.vocabulary = stop_ids, bf16, vocabulary
        self.policy_version = 0
        self.device = next(model.parameters()).device
        self._stop = torch.tensor(sorted(stop_ids), device=self.device)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, keys: Sequence[str] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        keys = [p.id for p in prompts] if keys is None else keys
        contexts = [self.renderer.ids(p) for p in prompts]
        jobs = [(p, i, ids) for p, ids in zip(prompts, contexts, strict=True) for i in range(n)]
        done = self.continue_from(
            [j[2] for j in jobs], sampling, keys=[f"{key}/{i}" for key in keys for i in range(n)]
        )
        return [
            Rollout(
                prompt=p,
                sample=i,
                context=ids,
                ids=c.ids,
                logprobs=c.logprobs,
                finish_reason=c.finish_reason,
                policy_version=self.policy_version,
                sampling=sampling,
            )
            for (p, i, ids), c in zip(jobs, done, strict=True)
        ]

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        keys = [str(i) for i in range(len(prefixes))] if keys is None else keys
        self._check_lengths(prefixes, sampling)
        results: dict[int, Completion] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for rows in self._batches([len(p) for p in prefixes], sampling.max_new_tokens):
                written = self._write([prefixes[i] for i in rows], sampling, [keys[i] for i in rows])
                results.update(zip(rows, written, strict=True))
        finally:
            self.model.train(was_training)
        return [results[i] for i in range(len(prefixes))]

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        pairs = [(tuple(c), tuple(r)) for c, r in zip(contexts, responses, strict=True)]
        results: dict[int, tuple[float, ...]] = {}
        with torch.no_grad(), self._autocast():
            for rows in self._batches([len(c) + len(r) for c, r in pairs], 0):
                ids_BT, mask_BT = _pad([c + r for c, r in (pairs[i] for i in rows)], self.device, left=False)
                logits_BTV = unwrapped(self.model)(
                    input_ids=ids_BT, attention_mask=mask_BT, use_cache=False
                ).logits
                for b, i in enumerate(rows):
                    context, response = pairs[i]
                    span = slice(len(context) - 1, len(context) + len(response) - 1)
                    logp_TV = self._cut(logits_BTV[b, span]).float().log_softmax(-1)
                    taken = logp_TV.gather(-1, torch.tensor(response, device=self.device)[:, None])
                    results[i] = tuple(taken.squeeze(-1).tolist())
        return [results[i] for i in range(len(pairs))]

    def sync_weights(self, version: int) -> None:
        """Nothing to copy: the engine reads the weights that train."""
        self.policy_version = version

    def _check_lengths(self, prefixes: Sequence[Sequence[int]], sampling: Sampling) -> None:
        longest, room = max((len(p) for p in prefixes), default=0), context_length(unwrapped(self.model))
        if longest + sampling.max_new_tokens > room:
            raise UserError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones do not fit the model's "
                f"context of "
                f"{room}; shorten the prompt or lower max_new_tokens"
            )

    def _batches(self, lengths: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
        """Rows of similar length together, longest first, so that padding wastes little."""
        rows: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[rows[0]] if rows else lengths[i]
            if rows and (len(rows) + 1) * (longest + new_tokens) > self.batch_tokens:
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _cut(self, logits: Tensor) -> Tensor:
        return logits if self.vocabulary is None else logits[..., : self.vocabulary]

    @torch.inference_mode()
    def _write(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[str]
    ) -> list[Completion]:
        """One batch, token by token."""
        model, limit = unwrapped(self.model), sampling.max_new_tokens
        ids_BT, mask_BT = _pad(prefixes, self.device, left=True)
        padded = bool((mask_BT == 0).any())  # without padding, no mask: the causal fast path
        position_B = mask_BT.sum(-1)
        uniform_BL = torch.from_numpy(np.stack([noise(sampling.seed, key, limit) for key in keys])).to(
            self.device
        )
        tokens_BL = torch.zeros(len(keys), limit, dtype=torch.long, device=self.device)
        logps_BL = torch.zeros(len(keys), limit, device=self.device)
        length_B = torch.full((len(keys),), limit, device=self.device)
        alive = torch.arange(len(keys), device=self.device)  # which row each row of the shrunk batch is
        cache = DynamicCache(config=model.config)
        step_ids, step_pos = ids_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)
        for t in range(limit):
            with self._autocast():
                logits_BV = model(
                    input_ids=step_ids,
                    position_ids=step_pos,
                    attention_mask=mask_BT if padded else None,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            drawn_B, logp_B = draw(self._cut(logits_BV), sampling, uniform_BL[alive, t])
            tokens_BL[alive, t], logps_BL[alive, t] = drawn_B, logp_B
            writing = length_B[alive] > t
            length_B[alive] = torch.where(writing & torch.isin(drawn_B, self._stop), t + 1, length_B[alive])
            writing = length_B[alive] > t + 1
            left = int(writing.sum())
            if left == 0 or t + 1 == limit:
                break
            if padded:
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            step_ids, step_pos = drawn_B[:, None], (position_B[alive] + t)[:, None]
            if left < _COMPACT_BELOW * len(alive):
                keep = writing.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                alive, mask_BT, step_ids, step_pos = (
                    alive[keep],
                    mask_BT[keep],
                    step_ids[keep],
                    step_pos[keep],
                )
        return self._completions(tokens_BL, logps_BL, length_B)

    def _completions(self, tokens_BL: Tensor, logps_BL: Tensor, length_B: Tensor) -> list[Completion]:
        rows = zip(tokens_BL.tolist(), logps_BL.tolist(), length_B.tolist(), strict=True)
        return [
            Completion(
                ids=tuple(ids[:n]),
                logprobs=tuple(logps[:n]),
                finish_reason="stop" if ids[n - 1] in self.stop_ids else "length",
            )
            for ids, logps, n in rows
        ]


def noise(seed: int, key: str, length: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Uniforms in [0, 1) for one request: a pure function of seed, key and position."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(length)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probs [B] under the truncated, tempered distribution, by inverse CDF.

    One uniform per token; tokens of probability 0 are never drawn. Temperature 0 takes the likeliest token,
    with log-prob 0: the distribution drawn from has one entry.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        best_B = logits_BV.argmax(-1)
        return best_B, torch.zeros_like(best_B, dtype=torch.float32)
    logp_BV = truncate(logits_BV / sampling.temperature, sampling).log_softmax(-1)
    cdf_BV = logp_BV.exp().double().cumsum(-1)
    token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True).squeeze(-1)
    token_B = torch.where(
        token_B < logp_BV.shape[-1], token_B, logp_BV.argmax(-1)
    )  # rounding at the very end
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)


def truncate(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside top-k and top-p at −inf; top-p keeps the token that crosses p."""
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        p_BV = sorted_BV.softmax(-1)
        drop_BV = p_BV.cumsum(-1) - p_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(
            torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf
        )
    return logits_BV


def _pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and mask [B, T]; the pad id is 0, and the mask hides it."""
    longest = max(len(r) for r in rows)
    gaps = [[0] * (longest - len(r)) for r in rows]
    ids = [[*g, *r] if left else [*r, *g] for r, g in zip(rows, gaps, strict=True)]
    ones = [[1] * len(r) for r in rows]
    mask = [[*g, *o] if left else [*o, *g] for o, g in zip(ones, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
