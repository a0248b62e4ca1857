"""Sampling from a transformers model in process: the model that trains, with no copy.

A decoding loop of our own, not `generate`: the log-probs of the distribution drawn from come with each token
(`generate` would keep [T, B, V] logits for them), finished rows leave the batch, and each draw depends on
(seed, key, position) alone, so that batching, padding and the number of processes do not change a sample.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence, Set

import numpy as np
import torch
from torch import Tensor, nn

from onpath.data.batch import collate, micro_batches
from onpath.data.render import Renderer
from onpath.engines.base import Engine
from onpath.engines.decoding.branches import Past, Place, branch
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.decoding.draw import check_finite, draw
from onpath.engines.decoding.kv_cache import accepts_4d_mask, preallocated_cache, select_rows
from onpath.engines.decoding.side_by_side import Finished, Start, rows_at_once, side_by_side
from onpath.engines.head import evaluating, generating, head_of, hidden_states, known_to, unwrapped
from onpath.engines.models import context_length
from onpath.engines.sharding import can_sample, is_whole
from onpath.engines.stops import string_end
from onpath.losses import token_stats
from onpath.records import Completion, Prompt, Sampling, Trajectory
from onpath.system.draws import noise
from onpath.system.errors import UserError

# B rows, T tokens so far, V vocabulary.
_COMPACT_BELOW = 0.9  # drop finished rows once fewer than this share is active: a copy costs less than a row
_LOOK_EVERY = {"cpu": 1}  # tokens between two looks at which rows are active: each look waits for a GPU
_READ_TOGETHER = 16  # prefixes of one pass: they come by length, so that few of them need little padding


class HFEngine(Engine):
    """Engine over a transformers causal LM.

    Args:
        model: any causal LM, peft-wrapped or not; it is put into evaluation mode while it generates.
        renderer: makes ids of prompts.
        stop_ids: ids that end a response.
        stop_strings: texts that end it, at the token that completes one.
        batch_tokens: rows × (prefix + new tokens) that one batch may hold.
        bf16: write under bfloat16 autocast, as the training forward pass does.
        vocabulary: number of ids that may be drawn; rows of the head beyond it are padding.
        shares_weights: whether `model` is the one that trains.
    """

    def __init__(
        self,
        model: nn.Module,
        renderer: Renderer,
        *,
        stop_ids: frozenset[int],
        stop_strings: Sequence[str] = (),
        batch_tokens: int = 32_768,
        bf16: bool = False,
        vocabulary: int | None = None,
        shares_weights: bool = False,
    ) -> None:
        self.shares_weights = shares_weights
        self.model, self.renderer, self.batch_tokens = model, renderer, batch_tokens
        self.stop_ids, self.bf16, self.vocabulary = stop_ids, bf16, vocabulary
        self.stop_strings = tuple(stop_strings)
        self.device = next(model.parameters()).device
        self._look_every = _LOOK_EVERY.get(self.device.type, 8)
        self._stop = torch.tensor(sorted(stop_ids), device=self.device)

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        assert can_sample(self.model), "a sharded model samples inside sharding.whole or in_step"
        keys = [str(i) for i in range(len(prefixes))] if keys is None else keys
        self._check_lengths(prefixes, sampling)
        results: dict[int, Completion] = {}
        with generating(self.model, bf16=self.bf16):
            for rows in self._batches([len(p) for p in prefixes], sampling.max_new_tokens):
                done = self._generate_batch([prefixes[i] for i in rows], sampling, [keys[i] for i in rows])
                results.update(zip(rows, done, strict=True))
        return [results[i] for i in range(len(prefixes))]

    @torch.no_grad()
    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        read = [
            Trajectory(student_context=tuple(c), teacher_context=tuple(c), response=tuple(r), place=i)
            for i, (c, r) in enumerate(zip(contexts, responses, strict=True))
        ]
        results: list[tuple[float, ...]] = [()] * len(read)
        with evaluating(self.model):
            for rows in micro_batches(read, max_tokens=self.batch_tokens, device=self.device):
                batch = collate(rows, device=self.device)
                with self._autocast():
                    hidden_BTH = hidden_states(self.model, batch.student_ids_BS)
                head = head_of(self.model, self.vocabulary)
                with self._autocast():  # as a head's products are while it generates
                    stats = token_stats(
                        student_hidden=batch.at_student(hidden_BTH),
                        student_head=head,
                        teacher=None,
                        sampled_ids=batch.token_N,
                    )
                assert stats.student_logp is not None
                for t, values in zip(rows, batch.by_row(stats.student_logp), strict=True):
                    assert t.place is not None
                    results[t.place] = tuple(values)
        return results

    def over(self, model: nn.Module, *, renderer: Renderer | None = None) -> "HFEngine":
        """The like of this engine over another model, which does not train."""
        return HFEngine(
            model,
            renderer or self.renderer,
            stop_ids=self.stop_ids,
            stop_strings=self.stop_strings,
            batch_tokens=self.batch_tokens,
            bf16=self.bf16,
            vocabulary=self.vocabulary,
        )

    def ending_at(self, stop_ids: Set[int]) -> "HFEngine":
        """The like of this engine over the same model, whose responses end with other ids."""
        engine = copy.copy(self)
        engine.stop_ids = frozenset(stop_ids)
        engine._stop = torch.tensor(sorted(stop_ids), device=self.device)
        return engine

    def answer(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """See `Engine.answer`."""
        if drafts is None or not Past.possible(self.model):
            return self.continue_from(prefixes, sampling, keys=keys)
        assert is_whole(self.model), "see continue_from"
        self._check_lengths(prefixes, sampling)
        results: dict[int, Completion] = {}
        for rows in self._batches([len(p) for p in prefixes], sampling.max_new_tokens):
            past = self._read([tuple(prefixes[i]) for i in rows])
            ends = [(row, len(prefixes[i])) for row, i in enumerate(rows)]
            mine = [drafts[i] for i in rows]
            done = self.draw_from(past, ends, sampling, keys=[keys[i] for i in rows], drafts=mine)
            results.update(zip(rows, done, strict=True))
        return [results[i] for i in range(len(prefixes))]

    @torch.no_grad()
    def _read(self, prefixes: Sequence[tuple[int, ...]]) -> Past:
        """The keys and values of prefixes, the longest first."""
        rows = [
            Trajectory(student_context=p[:-1], teacher_context=p[:-1], response=p[-1:], place=i)
            for i, p in enumerate(prefixes)
        ]
        together = [rows[at : at + _READ_TOGETHER] for at in range(0, len(rows), _READ_TOGETHER)]
        batches = [collate(some, device=self.device) for some in together]
        past = Past(self.model, batches)
        with evaluating(self.model), self._autocast():
            for batch, part in zip(batches, past.parts, strict=True):
                hidden_states(self.model, batch.teacher_ids_BT, part)
        return past

    def can_draw_from(self, past: Past | None) -> bool:
        """See `Engine.can_draw_from`."""
        return past is not None

    def draw_from(
        self,
        past: Past,
        places: Sequence[Place],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """See `Engine.draw_from`."""
        assert is_whole(self.model), "see continue_from"
        done = branch(self, past, places, sampling, keys=keys, drafts=drafts)
        return [self._ended(c) for c in done]

    def relay(
        self, teacher: Engine, starts: Sequence[Start], sampling: Sampling, *, delta: float
    ) -> list[Finished] | None:
        """See `Engine.relay`: two models in this process that take a mask of our own."""
        if not isinstance(teacher, HFEngine) or self.stop_strings:
            return None
        if not all(accepts_4d_mask(unwrapped(engine.model)) for engine in (self, teacher)):
            return None
        found: dict[int, Finished] = {}
        most = rows_at_once(self, teacher)
        with generating(self.model, bf16=self.bf16), generating(teacher.model, bf16=teacher.bf16):
            for rows in self._batches([len(s.ids) for s in starts], max((s.room for s in starts), default=0)):
                for at in range(0, len(rows), most):
                    some = rows[at : at + most]
                    done = side_by_side(self, teacher, [starts[i] for i in some], sampling, delta=delta)
                    found |= zip(some, done, strict=True)
        return [found[i] for i in range(len(starts))]

    def _ended(self, completion: Completion) -> Completion:
        """Up to the token that completes a stop string."""
        end = string_end(completion.ids, self.stop_strings, self.renderer.text)
        if end is None:
            return completion
        ids, logprobs = completion.ids[:end], completion.logprobs[:end]
        return Completion(ids=ids, logprobs=logprobs, finish_reason="stop")

    def _still_open(self, tokens: list[int]) -> bool:
        """Whether a row has completed no stop string: its last tokens say so cheaply, all of them surely."""
        longest = max(len(s.encode()) for s in self.stop_strings) + self._look_every + 4
        tail = self.renderer.text(tokens[-longest:])
        if not any(s in tail for s in self.stop_strings):
            return True
        return string_end(tokens, self.stop_strings, self.renderer.text) is None

    def _check_lengths(self, prefixes: Sequence[Sequence[int]], sampling: Sampling) -> None:
        longest = max((len(p) for p in prefixes), default=0)
        limit = context_length(unwrapped(self.model).config)
        if longest + sampling.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones do not fit the model's "
                f"context of "
                f"{limit}; shorten the prompt or lower max_new_tokens"
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
    def _generate_batch(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[str]
    ) -> list[Completion]:
        """One batch, token by token."""
        model, limit = unwrapped(self.model), sampling.max_new_tokens
        # Padded on the left, so that every row's next token comes from the last column; positions are counted
        # without the padding.
        ids_BT, mask_BT = _pad(prefixes, self.device)
        step_ids, step_pos = ids_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)
        padded = bool((mask_BT == 0).any())  # without padding, no mask: the causal fast path
        mask_BL = torch.cat([mask_BT, mask_BT.new_ones(len(keys), limit)], dim=1)
        takes_mask = accepts_4d_mask(model)  # of a decoding step as it is, else the model makes its own
        cache = preallocated_cache(model)
        # State-space models have another name for it.
        remembers = known_to(model, past_key_values=cache, cache_params=cache)
        uniform_BL = torch.from_numpy(np.stack([noise(sampling.seed, key, limit) for key in keys]))
        uniform_BL = uniform_BL.to(self.device)
        tokens_BL = torch.zeros(len(keys), limit, dtype=torch.long, device=self.device)
        logps_BL = torch.zeros(len(keys), limit, device=self.device)
        row_B = torch.arange(len(keys), device=self.device)  # where in tokens_BL, which keeps all
        active_B = torch.ones(len(keys), dtype=torch.bool, device=self.device)
        for t in range(limit):
            mask = mask_BL[:, : ids_BT.shape[1] + t] if padded else None
            # The prefill needs a causal mask, which the model makes of this one. A later step has one query,
            # which attends to all but the padding.
            if mask is not None and t and "cache_params" in remembers:
                mask = None  # what the padding was kept out of is a state: it has no columns to hide
            if mask is not None and takes_mask and t:
                mask = mask[:, None, None].bool()
            with self._autocast():
                named = known_to(
                    model, position_ids=step_pos, attention_mask=mask, use_cache=True, logits_to_keep=1
                )
                logits_BV = model(input_ids=step_ids, **remembers, **named).logits[:, -1]
            # Uniform number t of a row is for its token t, whichever rows are left beside it. Rows that have
            # stopped go on until the batch is compacted; `_completions` cuts what they add.
            drawn_B, logp_B = draw(self._cut(logits_BV), sampling, uniform_BL[:, t])
            tokens_BL[row_B, t], logps_BL[row_B, t] = drawn_B, logp_B
            active_B &= (drawn_B[:, None] != self._stop).all(-1)
            step_ids, step_pos = drawn_B[:, None], step_pos[:, -1:] + 1
            if (t + 1) % self._look_every:
                continue
            if self.stop_strings:
                said = tokens_BL[row_B, : t + 1].tolist()
                goes_on = [on and self._still_open(r) for r, on in zip(said, active_B.tolist(), strict=True)]
                active_B &= torch.tensor(goes_on, device=self.device)
            left = int(active_B.sum())
            if left == 0:
                break
            if left < _COMPACT_BELOW * len(row_B):
                # All that has an entry for each row of the batch shrinks alike, in the cache's order.
                keep = active_B.nonzero().squeeze(-1)
                select_rows(cache, keep)
                state = (row_B, active_B, mask_BL, uniform_BL, step_ids, step_pos)
                row_B, active_B, mask_BL, uniform_BL, step_ids, step_pos = (x[keep] for x in state)
        return self._completions(tokens_BL, logps_BL)

    def _completions(self, tokens_BL: Tensor, logps_BL: Tensor) -> list[Completion]:
        """Each row up to its first stop token or string: what was drawn after it is no part of the sample."""
        check_finite(logps_BL)
        stops_BL = torch.isin(tokens_BL, self._stop)
        stopped_B = stops_BL.any(-1)
        length_B = torch.where(stopped_B, stops_BL.int().argmax(-1) + 1, tokens_BL.shape[1])
        columns = (tokens_BL.tolist(), logps_BL.tolist(), length_B.tolist(), stopped_B.tolist())
        return [
            self._ended(
                Completion(
                    ids=tuple(ids[:n]),
                    logprobs=tuple(logps[:n]),
                    finish_reason="stop" if stopped else "length",
                )
            )
            for ids, logps, n, stopped in zip(*columns, strict=True)
        ]


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids [B, T] and mask [B, T]; the pad id is 0, and the mask hides it."""
    longest = max(len(r) for r in rows)
    gaps = [[0] * (longest - len(r)) for r in rows]
    ids = [[*g, *r] for r, g in zip(rows, gaps, strict=True)]
    mask = [[*g, *[1] * len(r)] for r, g in zip(rows, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
