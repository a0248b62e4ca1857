"""Weak scaling on CPUs: one process against two, each with as much work; and memory against the plan.

    python benchmarks/scale.py [--steps 4] [--models gym random]

Every case is one OPD step again and again (`one_step`, as a run calls it), in processes that are forked for
it and speak gloo: whole models or shards, rollouts dealt by length or as they were drawn. `gradients` is what
is left of a step without sampling and hand-over: scoring and training. CPU time is each process's own, beside
wall time, since a machine that others use too gives no wall time of worth. Memory: the kernel's high-water
mark of a process over the steps, less what it held before the models, against `onpath doctor`'s plan
(commands/doctor/fits.py).
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import RESULTS, PeakMemory, Spread, environment, environment_line, write

from onpath.system import launcher

RANDOM = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 10}
MICRO_BATCH = 2048
"""Padded tokens of one pass, at most."""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting."""

    model: str
    world: int
    shard: str = "none"
    balance: bool = True

    @property
    def name(self) -> str:
        dealt = "" if self.world == 1 else ", dealt by length" if self.balance else ", as drawn"
        return f"{self.world} × {self.shard}{dealt}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of each process's share of a step."""

    prompts: int
    new_tokens: int
    shape: dict[str, int] | None
    """Of a model of random weights; None: the gym's pair."""


SIZES = {
    "gym": Size(prompts=32, new_tokens=96, shape=None),
    "random": Size(prompts=4, new_tokens=48, shape=RANDOM),
    "tiny": Size(prompts=2, new_tokens=8, shape=TINY),
}


def cases_of(model: str) -> list[Case]:
    """One process; two, sharded in each way, with balance and without where rollouts differ by much."""
    two = [Case(model=model, world=2, shard=shard) for shard in ("none", "layer", "step")]
    unbalanced = [Case(model=model, world=2, shard=shard, balance=False) for shard in ("none", "layer")]
    return [Case(model=model, world=1), *two, *unbalanced]


def settings(case: Case, size: Size, steps: int, home: Path) -> dict[str, Any]:
    """The config of a case."""
    prefix = "gym:" if size.shape is None else f"{home}/"
    return {
        "student": {"model": f"{prefix}student", "device": "cpu"},
        "teacher": {"model": f"{prefix}teacher"},
        "rollout": {"prompts": size.prompts * case.world, "max_new_tokens": size.new_tokens},
        "optim": {"steps": steps, "lr": 1e-6, "schedule": "constant", "micro_batch_tokens": MICRO_BATCH},
        "parallel": {"shard": case.shard, "balance": case.balance, "timeout": 300.0},
        "run": {"dir": str(home / "runs"), "name": case.name, "save_every": 0},
    }


def make_models(size: Size, home: Path) -> None:
    """A student and a teacher of random weights."""
    if size.shape is None:
        return
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from onpath.gym.pretrain import save
    from onpath.gym.vocab import LANGUAGE

    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen3Config(
            **size.shape,
            vocab_size=len(LANGUAGE.tokens),
            num_key_value_heads=size.shape["num_attention_heads"],
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=LANGUAGE.longest,
        )
        save(Qwen3ForCausalLM(config), home / role)


def one_rank(case: Case, size: Size, steps: int, home: Path) -> dict[str, Any]:
    """What this process measures: per step, after one to warm up, and its peak against the plan."""
    from onpath import config
    from onpath.commands.doctor.fits import parts_of, step_of
    from onpath.run.assemble import assemble
    from onpath.run.optimizer import make_optimizer
    from onpath.system import distributed
    from onpath.training import one_step

    peak, rows, filled = PeakMemory(), [], 0
    with distributed.one_fate():
        before = peak.now()
        with peak("start"):
            parts = assemble(config.build(settings(case, size, steps + 1, home)))
        with peak("steps"):
            optimizer, schedule = make_optimizer(parts.config, parts.models.student)
            for step in range(steps + 1):
                schedule(step)
                distributed.barrier()
                cpu, wall = time.process_time(), time.perf_counter()
                meter = one_step(parts, optimizer, step)
                spent = meter.watch.seconds
                row = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
                row["gradients"] = spent["score"] + spent["train"]
                made = meter.step.prepared.trajectories
                row["tokens"] = float(sum(len(t.response) for t in made))
                longest = max(len(t.student_context) + len(t.response) for t in made)
                filled = max(filled, len(made) * longest)
                rows.append(row)
        asked = step_of(parts, response_tokens=0)
        asked = replace(asked, micro_batch_tokens=min(MICRO_BATCH, filled), batch_tokens=filled)
        planned = parts_of(asked, shard=case.shard, world=case.world)
        held = {"measured": peak.mib["steps"] - before, "planned": planned["peak"] / 2**20}
        distributed.barrier()
    return {"steps": rows[1:], "memory": held}


def in_processes(case: Case, work: Callable[[], Any], home: Path) -> list[Any]:
    """`work` in forked processes that find each other as torchrun's do; what each returns."""
    started = []
    for rank in launcher.environments(case.world):
        child = os.fork()
        if child == 0:
            os.environ |= rank
            code = 1
            try:
                (home / f"rank-{rank['RANK']}.json").write_text(json.dumps(work()))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        started.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
    if any(codes):
        raise SystemExit(f"{case.name}: exit codes {codes}")
    return [json.loads((home / f"rank-{rank}.json").read_text()) for rank in range(case.world)]


def summary(ranks: Sequence[Any]) -> dict[str, Any]:
    """Of all processes: medians with quartiles over steps, of the slowest process or of the sum."""
    steps = list(zip(*(rank["steps"] for rank in ranks), strict=True))
    tokens = [[row["tokens"] for row in step] for step in steps]
    over = {
        "step, wall s": [max(row["wall"] for row in step) for step in steps],
        "step, CPU s a process": [statistics.mean(row["cpu"] for row in step) for step in steps],
        "gradients, wall s": [max(row["gradients"] for row in step) for step in steps],
        "slowest ÷ mean, tokens": [max(step) / statistics.mean(step) for step in tokens],
    }
    memory = {key: max(rank["memory"][key] for rank in ranks) for key in ("measured", "planned")}
    return {**{key: asdict(Spread.of(values)) for key, values in over.items()}, "memory, MiB": memory}


def markdown(data: dict[str, Any]) -> str:
    """The page that is committed."""
    lines = [
        "# Weak scaling: one process and two",
        "",
        f"`python benchmarks/scale.py`: {environment_line(data['environment'])}, {data['cores']} cores, load "
        f"{data['load'][0]:.1f} → {data['load'][1]:.1f}.",
        f"Steps a case: {data['steps']}, after one to warm up; median [quartiles]. Each process has the same "
        "work in all cases of a model. The machine was used by others meanwhile: ratios of CPU time say "
        "something, wall times do not. Memory is planned for the tokens that there were.",
    ]
    for model, cases in data["models"].items():
        size = data["sizes"][model]
        lines += [
            "",
            f"## {model}: {size['prompts']} rollouts a process, at most {size['new_tokens']} tokens",
            "",
            "| processes × shard | CPU s a step and process | ÷ one process | wall s | gradients, wall s | "
            "slowest ÷ mean, tokens | peak MiB: measured, planned |",
            "|---|---|---|---|---|---|---|",
        ]
        alone = next(iter(cases.values()))["step, CPU s a process"]["median"]
        for name, found in cases.items():
            wall, cpu, gradients, uneven = (Spread(**found[key]) for key in list(found)[:4])
            memory = found["memory, MiB"]
            lines.append(
                f"| {name} | {cpu} | {cpu.median / alone:.2f} | {wall} | {gradients} | {uneven.median:.2f} | "
                f"{memory['measured']:,.0f}, {memory['planned']:,.0f} |"
            )
    return "\n".join(lines)


def run(models: Sequence[str], steps: int) -> dict[str, Any]:
    """Every case of the models, one after the other."""
    for shared in ("onpath.training", "transformers.models.qwen3.modeling_qwen3"):
        importlib.import_module(shared)  # once for all processes: it is not the memory of any
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    for model in models:
        size = SIZES[model]
        with TemporaryDirectory() as directory:
            home = Path(directory)
            alone = Case(model=model, world=1)
            in_processes(alone, lambda size=size, home=home: make_models(size, home), home)
            for case in cases_of(model):
                ranks = in_processes(
                    case, lambda case=case, size=size, home=home: one_rank(case, size, steps, home), home
                )
                found.setdefault(model, {})[case.name] = summary(ranks)
                print(model, case.name, found[model][case.name]["step, CPU s a process"], flush=True)
    return {
        "environment": environment(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [load, os.getloadavg()[0]],
        "steps": steps,
        "sizes": {model: asdict(SIZES[model]) for model in models},
        "models": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each case (default: 4)")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=["gym", "random"])
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: quartiles need two steps or more")
    torch.set_num_threads(1)  # a process a core; and what is forked has no threads that would be lost
    data = run(options.models, options.steps)
    write("scale", data, markdown(data))
    print(f"also in {RESULTS / 'scale.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
