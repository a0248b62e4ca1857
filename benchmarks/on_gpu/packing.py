"""A trial outside the library: one row of many sequences with a varlen kernel, against padded micro-batches.

transformers packs by itself where `position_ids` restart and no mask is given; the kernel is torch's own
varlen attention, registered under transformers' interface, and flash-attn where it is installed. Both ways
run forward and backward over the same rollouts of unequal length, with gradient checkpointing.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from on_gpu.device import DEVICE, free, median_seconds, peak_gib, reset_peak
from on_gpu.shapes import build, write_model
from onpath.data.batch import collate, micro_batches
from onpath.engines.head import hidden_states
from onpath.engines.student import recompute
from onpath.records import Trajectory


def lengths_of(count: int, mean: float, most: int) -> list[int]:
    """Lognormal, σ = 0.5, cut."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
    raw = (mean * torch.exp(0.5 * normal - 0.125)).clamp(8, most)
    return [int(n) for n in raw.tolist()]


def packed(rows: Sequence[Sequence[int]], budget: int) -> list[list[Sequence[int]]]:
    """Rows, longest first, each where it fits."""
    bins: list[list[Sequence[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        for one in bins:
            if sum(map(len, one)) + len(row) <= budget:
                one.append(row)
                break
        else:
            bins.append([row])
    return bins


def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention [1, heads, T, D] of a packed row, as transformers calls it."""
    ends: Tensor = options["cu_seq_lens_q"]
    groups = query.shape[1] // key.shape[1]
    q, k, v = (
        x[0].repeat_interleave(n, dim=0).transpose(0, 1).contiguous()
        for x, n in ((query, 1), (key, groups), (value, groups))
    )
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        longest = options["max_length_q"]
        out = varlen_attn(q, k, v, ends, ends, longest, longest, **causal)
        return out[None], None
    parts = []  # what the kernel computes, sequence by sequence
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        done = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
        parts.append(done[0].transpose(0, 1))
    return torch.cat(parts)[None], None


def padded_pass(
    model: Any, rows: Sequence[Sequence[int]], budget: int, *, masked: bool = False
) -> tuple[Tensor, int]:
    """The library's micro-batches: Σ of squared hidden states, and the number of micro-batches.

    Args:
        masked: hides the padding, which no token of a causal model looks at: flash kernels do not run with a
            mask, and keys of grouped heads are repeated.
    """
    total, count = torch.zeros((), device=DEVICE), 0
    for micro in micro_batches(_trajectories(rows), max_tokens=budget, device=DEVICE):
        batch = collate(micro, device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            if masked:
                ids = batch.student_ids_BS
                ends = torch.tensor([len(t.student_context) + len(t.response) for t in micro])
                mask = (torch.arange(ids.shape[1]) < ends[:, None]).to(DEVICE)
                hidden = model.get_decoder()(
                    input_ids=ids, attention_mask=mask, use_cache=False
                ).last_hidden_state
            else:
                hidden = hidden_states(model, batch.student_ids_BS)
        loss = batch.at_student(hidden).float().square().mean(-1).sum()
        loss.backward()
        total, count = total + loss.detach(), count + 1
    return total, count


def packed_pass(model: Any, rows: Sequence[Sequence[int]], budget: int) -> tuple[Tensor, int]:
    """The same sum from packed rows."""
    total, bins = torch.zeros((), device=DEVICE), packed(rows, budget)
    for some in bins:
        sizes = torch.tensor([0, *map(len, some)], device=DEVICE)
        ends = sizes.cumsum(0).to(torch.int32)
        longest = max(map(len, some))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            hidden = model.get_decoder()(
                input_ids=torch.tensor([[t for r in some for t in r]], device=DEVICE),
                position_ids=torch.cat([torch.arange(len(r), device=DEVICE) for r in some])[None],
                use_cache=False,
                cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest,
            ).last_hidden_state[0]  # fmt: skip
        counted = torch.ones(len(hidden), dtype=torch.bool, device=DEVICE)
        counted[ends[1:].long() - 1] = False  # the last token of a sequence predicts nothing
        loss = hidden[counted].float().square().mean(-1).sum()
        loss.backward()
        total = total + loss.detach()
    return total, len(bins)


def run(record: Any, *, tiny: bool, left: Any) -> None:
    AttentionInterface.register("onpath_varlen", varlen)
    lengths = lengths_of(6, 24, 48) if tiny else lengths_of(64, 1500, 4096)
    budget = 96 if tiny else 16_384
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 256, (n,), generator=generator).tolist() for n in lengths]
    ways: list[tuple[str, str, Any]] = [
        ("padded, as the library does", "sdpa", padded_pass),
        ("packed, torch's varlen kernel", "onpath_varlen", packed_pass),
        ("padded, with a mask", "sdpa", partial(padded_pass, masked=True)),
    ]
    if is_flash_attn_2_available():
        ways.append(("packed, flash-attn", "flash_attention_2", packed_pass))
    with TemporaryDirectory() as name:
        write_model(Path(name), "qwen3-1.7b", tiny=tiny, words=256)
        model = build(name, torch.float32)
        recompute(model)
        model.requires_grad_(True)
        reference: list[float] = []
        for way, attention, passes in ways:
            if left() < 8 and not tiny:
                return
            said: dict[str, Any] = {"way": way, "rollouts": len(rows), "tokens": sum(lengths)}
            try:
                model.set_attn_implementation(attention)
                said |= _measured(lambda by=passes: by(model, rows, budget), model, reference, tiny)
                said["tokens/s"] = sum(lengths) / said["s"]
            except Exception as error:  # a kernel that is not there: recorded, and the rest goes on
                if tiny:
                    raise
                said["said"] = f"{type(error).__name__}: {error}"[:200]
            record("Forward and backward of the student", **said)
            free()


def _measured(call: Any, model: Any, reference: list[float], tiny: bool) -> dict[str, Any]:
    """Time and memory of a way, and how far its loss and gradient are from the first way's."""
    model.zero_grad(set_to_none=True)
    reset_peak()
    total, count = call()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    reference[:] = reference or [float(total), float(norm)]
    off = [abs(float(a) / b - 1) for a, b in zip((total, norm), reference, strict=True)]
    spent = median_seconds(call, 1 if tiny else 2)
    found = {"micro-batches": count, "s": spent, "peak GiB": peak_gib()}
    return {**found, "loss off by": off[0], "gradient norm off by": off[1]}


def _trajectories(rows: Sequence[Sequence[int]]) -> list[Trajectory]:
    """Every token but the first is predicted."""
    return [
        Trajectory(student_context=tuple(r[:1]), teacher_context=tuple(r[:1]), response=tuple(r[1:]))
        for r in rows
    ]
