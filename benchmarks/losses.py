"""Time and memory of one distillation loss, forward and backward: plain, onpath, TRL's chunked kernel,
Liger's chunked JSD.

    taskset -c 1 python benchmarks/losses.py --tokens 512 1024 --width 1024 --dtype float32
    taskset -c 1 python benchmarks/losses.py --memory --tokens 4096 --width 1024 --dtype float32
    python benchmarks/losses.py --device cuda --dtype bfloat16 --tokens 512 1024 2048 4096 8192 --width 1024
    2048

All of them compute Σ_n w_n·KL(p_S‖p_T) / N from hidden states and heads of both sides, with gradients to the
student's hidden states and head. Contestants take turns (A B C A B C …) in one process, after one untimed
round that also checks that they agree; a ratio is the median over rounds of a contestant's time over plain's
in the same round.

Time is of forward and backward: wall time, or the process's CPU time on one CPU thread. Memory is the peak
above what was held before, less one head gradient (which every contestant must return): on CUDA from the
allocator, on a CPU the process's peak resident set (Linux); with `--memory` the first timed round is watched.
"""

import argparse
import ctypes
import datetime
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpath.losses import Head, Objective, TeacherHidden, fused_objective

REVERSE = Objective(kind="reverse_kl")


@dataclass(frozen=True, kw_only=True)
class Problem:
    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    teacher_hidden: Tensor
    teacher_head: Tensor
    weights: Tensor  # [N]
    ids: Tensor  # [N]


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    return Problem(
        hidden=draw(tokens, width, scale=1.0).requires_grad_(),
        head=draw(vocabulary, width, scale=width**-0.5).requires_grad_(),
        teacher_hidden=draw(tokens, width, scale=1.0),
        teacher_head=draw(vocabulary, width, scale=width**-0.5),
        weights=torch.ones(tokens, device=device),
        ids=torch.randint(0, vocabulary, (tokens,), generator=generator, device=device),
    )


def plain(p: Problem) -> Tensor:
    """What one writes without a library: full logits, float32 softmax, autograd."""
    student = torch.log_softmax((p.hidden @ p.head.t()).float(), -1)
    with torch.no_grad():
        teacher = torch.log_softmax((p.teacher_hidden @ p.teacher_head.t()).float(), -1)
    values = (student.exp() * (student - teacher)).sum(-1)
    return (p.weights * values).sum() / len(p.weights)


def onpath(p: Problem) -> Tensor:
    """With all the statistics of `TokenStats` except top-k sets."""
    return fused_objective(
        student_hidden=p.hidden,
        student_head=Head(weight=p.head),
        teacher=TeacherHidden(hidden=p.teacher_hidden, head=Head(weight=p.teacher_head)),
        objective=REVERSE,
        weights=p.weights,
        denominator=float(len(p.weights)),
        sampled_ids=p.ids,
    ).loss


def trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(
        p.hidden, p.head, None, p.teacher_hidden, p.teacher_head, None, 1.0
    )
    return (p.weights * values).sum() / len(p.weights)


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=p.hidden.is_cuda
    )
    return loss(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.ids)


CONTESTANTS: dict[str, Callable[[Problem], Tensor]] = {
    "plain": plain,
    "onpath": onpath,
    "trl": trl,
    "liger": liger,
}


def once(name: str, p: Problem) -> float:
    p.hidden.grad = p.head.grad = None
    clock = clock_of(p)
    _sync(p)
    start = clock()
    CONTESTANTS[name](p).backward()
    _sync(p)
    return clock() - start


def clock_of(p: Problem) -> Callable[[], float]:
    """With one thread on a CPU the thread's own time: the same as wall time, unless others use the core."""
    return time.perf_counter if p.hidden.is_cuda or torch.get_num_threads() > 1 else time.process_time


def _sync(p: Problem) -> None:
    if p.hidden.is_cuda:
        torch.cuda.synchronize()


def watched(name: str, p: Problem) -> tuple[float, int]:
    """Seconds, and peak bytes above the start less a head gradient."""
    p.hidden.grad = p.head.grad = None
    gc.collect()
    own = p.head.numel() * p.head.element_size()
    if p.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = once(name, p)
        return seconds, torch.cuda.max_memory_allocated() - before - own
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    seconds = once(name, p)
    return seconds, _resident("VmHWM") - before - own


def _resident(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def check(p: Problem, names: list[str]) -> dict[str, list[float]]:
    """One untimed round: loss and gradient norms of each, which must agree."""
    found = {}
    for name in names:
        p.hidden.grad = p.head.grad = None
        loss = CONTESTANTS[name](p)
        loss.backward()
        assert p.hidden.grad is not None
        assert p.head.grad is not None
        found[name] = [loss.item(), p.hidden.grad.float().norm().item(), p.head.grad.float().norm().item()]
    tolerance = 1e-3 if p.head.dtype == torch.float32 else 3e-2
    first = found[names[0]]
    for name, values in found.items():
        if any(abs(a - b) > tolerance * abs(b) for a, b in zip(values, first, strict=True)):
            print(f"{name} disagrees with {names[0]}: {values} against {first}", flush=True)
    return found


def bound(p: Problem, rows: int = 1024) -> float:
    """FLOP/s of the same products alone, of `rows` tokens: the ceiling, measured in this run."""
    h, w = p.hidden.detach(), p.head.detach()
    logits = torch.empty(min(len(h), rows), len(w), dtype=h.dtype, device=h.device)
    h = h[: len(logits)]
    times, clock = [], clock_of(p)
    for _ in range(5):
        _sync(p)
        start = clock()
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w)
        torch.mm(logits.t(), h)
        _sync(p)
        times.append(clock() - start)
    median = max(statistics.median(times[1:]), 1e-6)  # of tiny shapes a CPU's clock may not have moved
    return 3 * 2 * len(h) * w.numel() / median


def measure(p: Problem, names: list[str], rounds: int, want_memory: bool) -> list[dict[str, Any]]:
    agreed = check(p, names)
    times: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = {}
    for _ in range(max(rounds, int(want_memory))):
        for name in names:
            if want_memory and name not in memory:
                seconds, memory[name] = watched(name, p)
            else:
                seconds = once(name, p)
            times[name].append(seconds)
    ceiling = bound(p) if times[names[0]] else 0.0
    work = 4 * 2 * len(p.hidden) * p.head.numel()
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, "loss": agreed[name][0]}
        if times[name]:
            ratios = [a / b for a, b in zip(times[name], times[names[0]], strict=True)]
            row |= {
                "seconds": statistics.median(times[name]),
                "seconds_range": [min(times[name]), max(times[name])],
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "share_of_bound": work / statistics.median(times[name]) / ceiling,
            }
        if want_memory:
            row["extra_bytes"] = memory[name]
        rows.append(row)
    return rows


def machine(device: str) -> str:
    model = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ),
        platform.processor(),
    )
    what = (
        torch.cuda.get_device_name() if device == "cuda" else f"{model}, {torch.get_num_threads()} thread(s)"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{what}; {versions}; commit {commit}; {datetime.date.today().isoformat()}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| N | H | dtype | loss by | s (range) | × plain (range) | share of product bound | extra MiB |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        seconds, ratio = (
            f"{r[key]:.3f} ({r[key + '_range'][0]:.3f}-{r[key + '_range'][1]:.3f})" if key in r else ""
            for key in ("seconds", "ratio")
        )
        share = f"{r['share_of_bound']:.0%}" if "share_of_bound" in r else ""
        extra = f"{r['extra_bytes'] / 2**20:,.0f}" if "extra_bytes" in r else ""
        lines.append(
            f"| {r['N']} | {r['H']} | {r['dtype']} | {r['name']} | {seconds} | {ratio} | {share} | {extra} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--width", nargs="+", type=int, default=[1024])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.device), flush=True)
    rows = []
    for dtype in args.dtype:
        for width in args.width:
            for tokens in args.tokens:
                p = make(tokens, width, args.vocabulary, getattr(torch, dtype), args.device)
                for row in measure(p, args.only, args.rounds, args.memory):
                    rows.append({"N": tokens, "H": width, "V": args.vocabulary, "dtype": dtype, **row})
                    print(json.dumps(rows[-1]), flush=True)
                    if args.out:
                        with args.out.open("a") as f:
                            f.write(json.dumps({"machine": machine(args.device), **rows[-1]}) + "\n")
                del p
    print(table(rows))


if __name__ == "__main__":
    main()
