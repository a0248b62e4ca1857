"""One optimiser step of each trajectory method against one of OPD: the same student, teacher, prompts and
rollouts.

    python benchmarks/methods_step.py [--rounds 15] [--updates 0 10 20 30] [--threads 1] [--methods …]

One process, the gym's bundled models. What a method costs depends on how much it finds to correct, so that
the steps are taken with the untouched student, and again after some updates of OPD. In each round every
method takes a step, in another order each time; within a round all sample the same rollouts (one seed, and a
learning rate so small that the weights hardly move). CPU seconds of this process: others may use the machine.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import Spread, environment, environment_line, gym_settings, write

WARM_UP = 2
STAGES = ("sample", "correct", "score", "train")
METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "truncate": {"name": "truncate"},
    "topd": {"name": "topd"},
    "topd, quantile": {"name": "topd", "decide": "quantile"},
    "topd, spliced": {"name": "topd", "plan": "spliced"},
    "relay": {"name": "relay"},
    "relay, from start": {"name": "relay", "from_start": True},
    "branch": {"name": "branch"},
    "bridge": {"name": "bridge", "distance": 0.02},  # at the default nothing is a fork on the gym
    "trd": {"name": "trd", "gate": False, "diagnose_every": 0},
}


def measure(directory: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rounds by updates made before; of each the CPU seconds of every method."""
    from onpath import config
    from onpath.methods import make_method
    from onpath.run.assemble import assemble
    from onpath.run.optimizer import make_optimizer
    from onpath.training import one_step

    base = gym_settings(  # with answers: some methods leave right rollouts alone
        directory,
        train="gym:train",
        prompts=options.prompts,
        micro_batch_tokens=options.micro_batch_tokens,
    )
    plain = assemble(config.build(base))
    sides = {}
    for name in options.methods:
        changed = config.build({**base, "method": METHODS[name]})
        sides[name] = replace(plain, config=changed, method=make_method(changed.method, plain.tools))
    still, _ = make_optimizer(plain.config, plain.models.student)
    moving = torch.optim.AdamW(plain.models.student.parameters(), lr=options.lr, weight_decay=0.0)
    found: dict[str, list[dict[str, Any]]] = {}
    done = 0
    for updates in sorted(options.updates):
        for step in range(done, updates):
            one_step(plain, moving, step)
        done = updates
        rounds = []
        for turn in range(WARM_UP + options.rounds):
            row: dict[str, Any] = {}
            shift = turn % len(sides)
            order = [*sides][shift:] + [*sides][:shift]
            for name in order if turn % 2 else order[::-1]:
                begun = time.process_time()
                meter = one_step(sides[name], still, updates + turn)
                cpu, prepared = time.process_time() - begun, meter.step.prepared
                changed_rows = sum(t.edit.kind != "none" for t in prepared.trajectories)
                row[name] = {
                    "cpu": cpu,
                    **meter.watch.seconds,
                    "tokens": sum(len(r.ids) for r in meter.rollouts) + sum(
                        prepared.totals.get(f"{who}_tokens_generated", 0) for who in ("student", "teacher")
                    ),
                    "changed": changed_rows / max(1, len(prepared.trajectories)),
                }  # fmt: skip
            rounds.append(row)
        found[str(updates)] = rounds[WARM_UP:]
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles, and ratios to OPD's step of the same round."""
    found = {}
    for name in rounds[0]:
        ratios = [r[name]["cpu"] / r["opd"]["cpu"] for r in rounds]
        tokens = [r[name]["tokens"] / r["opd"]["tokens"] for r in rounds]
        found[name] = {
            "ratio": vars(Spread.of(ratios)),
            "tokens": Spread.of(tokens).median,
            "changed": Spread.of([r[name]["changed"] for r in rounds]).median,
            **{k: vars(Spread.of([r[name][k] for r in rounds])) for k in ("cpu", *STAGES)},
        }
    return found


def markdown(data: Mapping[str, Any]) -> str:
    """The page that is committed."""
    s = data["settings"]
    lines = [
        "# One step of each trajectory method against one of OPD",
        "",
        f"`python benchmarks/methods_step.py {s['command']}`: {environment_line(data['environment'])}. "
        f"The gym's bundled models, {s['prompts']} prompts, OPD's updates before at a constant {s['lr']:g}. "
        f"Ratios are of CPU seconds, to OPD's step of the same round; medians [quartiles], "
        f"n = {s['rounds']}. Tokens: all that was generated, ÷ OPD's.",
    ]
    for updates, found in data["after"].items():
        lines += [
            "",
            f"## After {updates} updates",
            "",
            "| | ratio | tokens | changed | sample, ms | correct | score | train |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in found.items():
            r = row["ratio"]
            stages = " | ".join(f"{1000 * row[k]['median']:.0f}" for k in STAGES)
            lines.append(
                f"| {name} | {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}] | {row['tokens']:.2f} "
                f"| {row['changed']:.0%} | {stages} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 10, 20, 30], help="of OPD before")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="of OPD's updates")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    options = parser.parse_args()
    options.methods = list(dict.fromkeys(["opd", *options.methods]))
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        after = {updates: summary(rounds) for updates, rounds in measure(Path(name), options).items()}
    shown = ("rounds", "threads", "prompts")
    command = " ".join(f"--{k} {getattr(options, k)}" for k in shown)
    command += " --updates " + " ".join(after)
    if options.methods != list(METHODS):
        command += " --methods " + " ".join(f'"{m}"' if " " in m else m for m in options.methods)
    data = {
        "environment": environment(),
        "settings": {**{k: getattr(options, k) for k in (*shown, "lr")}, "command": command},
        "after": after,
    }
    write("methods_step", data, markdown(data))


if __name__ == "__main__":
    main()
