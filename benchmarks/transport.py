"""Optimal transport between many short windows: onpath in batches against a loop over POT.

    taskset -c 1 python benchmarks/transport.py --windows 10000 --length 50

Windows of random tokens of a random embedding table, 1 − cosine cost; a tenth are identical and a tenth are
permuted, as happens when two models write the same continuation (`--plain` leaves those out). POT's loop is
timed on every `--every`-th window and scaled up. Both Sinkhorns run to the same marginal error; the largest
difference of plans and of distances is printed. Contestants take turns; a ratio is the median over rounds.
"""

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import ot
import torch
from torch import Tensor

from onpath.transport.plans import token_cost, window_divergence

VOCABULARY, WIDTH = 4000, 64


def make(windows: int, length: int, other: int, screened: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
    s = torch.randint(0, VOCABULARY, (windows, length), generator=generator)
    t = torch.randint(0, VOCABULARY, (windows, other), generator=generator)
    if screened and length == other:
        tenth = windows // 10
        t[:tenth] = s[:tenth]
        t[tenth : 2 * tenth] = s[tenth : 2 * tenth].roll(1, -1)
    return s, t, embedding


def timed(call: Callable[[], object]) -> float:
    """CPU time: the same as wall time on an idle core."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--other", type=int, help="length of the second window; default: the same")
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    other = args.other or args.length
    s, t, embedding = make(args.windows, args.length, other, not args.plain)
    costs = token_cost(student_ids=s, teacher_ids=t, embedding=embedding).double().numpy()
    some = costs[:: args.every]
    a, b = np.full(args.length, 1 / args.length), np.full(other, 1 / other)
    ids = {"student_ids": s, "teacher_ids": t, "embedding": embedding}

    def pot_sinkhorn(cost: np.ndarray) -> np.ndarray:
        return ot.sinkhorn(a, b, cost, args.epsilon, numItermax=4000, stopThr=1.5e-6, warn=False)

    results: dict[str, list[float]] = {"exact": [], "pot emd2": [], "sinkhorn": [], "pot sinkhorn": []}
    for _ in range(args.rounds):
        results["exact"].append(timed(lambda: window_divergence(**ids)))
        results["pot emd2"].append(args.every * timed(lambda: [ot.emd2(a, b, c) for c in some]))
        results["sinkhorn"].append(timed(lambda: window_divergence(**ids, epsilon=args.epsilon)))
        results["pot sinkhorn"].append(args.every * timed(lambda: [pot_sinkhorn(c) for c in some]))
    distance, _ = window_divergence(**ids)
    _, plan = window_divergence(**ids, epsilon=args.epsilon)
    worst = max(abs(float(d) - ot.emd2(a, b, c)) for d, c in zip(distance[:: args.every], some, strict=True))
    spread = max(
        np.abs(p.numpy() - pot_sinkhorn(c)).max() for p, c in zip(plan[:: args.every], some, strict=True)
    )
    print(
        f"{platform.processor()}; torch {torch.__version__}, POT {ot.__version__}; "
        f"{datetime.date.today().isoformat()}"
    )
    print(f"{args.windows} windows of {args.length} × {other}, epsilon {args.epsilon}")
    for ours, theirs in (("exact", "pot emd2"), ("sinkhorn", "pot sinkhorn")):
        ratios = [y / x for x, y in zip(results[ours], results[theirs], strict=True)]
        print(
            f"{ours}: {statistics.median(results[ours]):.2f} s; {theirs}: "
            f"{statistics.median(results[theirs]):.2f} s; "
            f"{statistics.median(ratios):.1f} × faster ({min(ratios):.1f}-{max(ratios):.1f})"
        )
    sizes = f"entries about {1 / args.length / other:.1e} to {1 / args.length:.1e}"
    print(f"largest difference: exact distance {worst:.1e}, smoothed plan {spread:.1e} ({sizes})")


if __name__ == "__main__":
    main()
