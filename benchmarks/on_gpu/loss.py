"""The loss alone, forward and backward: onpath, TRL's Triton kernel, plain logits, Liger's fused JSD.

The contestants and the problem are those of benchmarks/losses.py: reverse KL, bfloat16 operands, gradients
to hidden states and head. Liger comes last: it compiles.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from losses import CONTESTANTS, Problem, bound, make, once, watched
from on_gpu.device import DEVICE, free

TURNS: Sequence[Sequence[str]] = (("onpath", "trl"), ("plain",), ("liger",))
"""Contestants that are timed side by side; later ones only if there is time left."""
_FAR = 0.03  # relative difference of losses or gradient norms from onpath's that is worth a word


def run(record: Any, *, tiny: bool, left: Any) -> None:
    vocabulary = 512 if tiny else 151_936
    sizes = [(16, 32)] if tiny else [(h, n) for n in (8192, 32_768, 65_536) for h in (2048, 4096)]
    seen: dict[tuple[int, int], list[float]] = {}
    for names in TURNS:
        for width, tokens in sizes:
            if left() < 10 and not tiny:
                return
            problem = make(tokens, width, vocabulary, torch.bfloat16, DEVICE.type)
            ceiling = bound(problem, rows=4096)
            for row in _measure(problem, names, rounds=1 if tiny else 3):
                own = seen.setdefault((width, tokens), row["gradients"]) if "gradients" in row else None
                _say(record, row, (width, tokens, vocabulary), ceiling, own)
            del problem
            free()
        if names == TURNS[0]:
            _profile(record, *sizes[0], vocabulary, tiny)


def _measure(problem: Problem, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """One untimed call each (kernels are compiled and chosen there), one for the memory, then in turns."""
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            rows.append({"loss by": name, "gradients": _gradients(problem, name), "times": []})
            rows[-1]["bytes"] = watched(name, problem)[1]
        except torch.OutOfMemoryError:
            rows[-1:] = [{"loss by": name, "said": "out of memory"}]
        except Exception as error:  # whatever another library says: recorded, and the rest goes on
            rows[-1:] = [{"loss by": name, "said": f"{type(error).__name__}: {error}"[:200]}]
        problem.hidden.grad = problem.head.grad = None
        free()
    for _ in range(rounds):
        for row in rows:
            if "times" in row and "bytes" in row:
                row["times"].append(once(row["loss by"], problem))
    return rows


def _gradients(problem: Problem, name: str) -> list[float]:
    """Loss and the norms of both gradients."""
    loss = CONTESTANTS[name](problem)
    loss.backward()
    assert problem.hidden.grad is not None
    assert problem.head.grad is not None
    norms = [g.float().norm().item() for g in (problem.hidden.grad, problem.head.grad)]
    problem.hidden.grad = problem.head.grad = None
    return [loss.item(), *norms]


def _say(
    record: Any, row: dict[str, Any], size: tuple[int, int, int], ceiling: float, own: list[float] | None
) -> None:
    width, tokens, vocabulary = size
    cells: dict[str, Any] = {"H": width, "N": tokens, "loss by": row["loss by"]}
    if "said" in row:
        record("Loss, forward and backward", **cells, said=row["said"])
        return
    middle = statistics.median(row["times"])
    work = 8 * tokens * width * vocabulary
    assert own is not None
    off = max(abs(a - b) / abs(b) for a, b in zip(row["gradients"], own, strict=True))
    record(
        "Loss, forward and backward",
        **cells,
        **{
            "ms": 1e3 * middle,
            "slowest, ms": 1e3 * max(row["times"]),
            "extra MiB": row["bytes"] / 2**20,
            "share of the product bound": work / middle / ceiling,
            "bound, TFLOP/s": ceiling / 1e12,
            "off onpath's by": off,
            "said": "disagrees" if off > _FAR else None,
        },
    )


def _profile(record: Any, width: int, tokens: int, vocabulary: int, tiny: bool) -> None:
    """Which kernels onpath's time goes to."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    problem = make(tokens, width, vocabulary, torch.bfloat16, DEVICE.type)
    once("onpath", problem)
    with profile(activities=kinds) as found:
        once("onpath", problem)

    def own(event: Any) -> float:
        return float(event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total)

    events = sorted(found.key_averages(), key=own, reverse=True)
    whole = sum(map(own, events)) or 1.0
    for event in events[: 3 if tiny else 16]:
        record(
            f"Where onpath's time goes, H {width}, N {tokens}",
            kernel=event.key[:90],
            calls=event.count,
            ms=own(event) / 1e3,
            share=own(event) / whole,
        )
