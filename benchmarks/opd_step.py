"""One optimiser step of plain OPD: onpath against TRL's DistillationTrainer.

    python benchmarks/opd_step.py [--steps 20] [--threads 2]

Same student, teacher, prompts, batch, token budget and objective (reverse KL, all tokens), transformers
generation on both sides, float32, AdamW, no gradient checkpointing, no logging. Each side is a process of its
own, as its user would start it, and they make their steps in turn, A B C A B C. onpath has the C library keep
what is freed (`onpath.system.allocator`), which is half of what it wins on a CPU: the third side is TRL with
that setting too. Memory: the kernel's high-water mark, reset at each phase.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import PeakMemory, Spread, environment, environment_line, write

from onpath.system import allocator

PHASES = ("sample", "score", "train")
PROMPTS = 64
NEW_TOKENS = 64
TUNED = "trl, our allocator"
SIDES = ("onpath", "trl", TUNED)
LEARNING_RATE = 1e-6  # so small that responses keep their length over the whole measurement
WARM_UP = 3

Watch = Callable[[str], Any]


def now() -> float:
    """The clock; on a GPU once its kernels are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Seconds:
    """Wall time by phase, summed over one step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = now()
        yield
        self.spent[phase] += now() - begun

    def take(self) -> dict[str, float]:
        """Seconds since the last call."""
        spent, self.spent = dict(self.spent), defaultdict(float)
        return spent


def prepare(directory: Path) -> None:
    """Models (the gym's, or random ones of their shape) and prompts without answers: nobody grades."""
    from onpath import gym
    from onpath.gym.pretrain import build_model, save

    for role in ("student", "teacher"):
        bundled = gym.model_dir(role)
        if bundled.is_dir():
            (directory / role).symlink_to(bundled)
        else:
            save(build_model(role, seed=len(role)), directory / role)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in gym.rows("train", PROMPTS)]
    lines = [json.dumps({"id": str(i), "prompt": p}) for i, p in enumerate(prompts)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the step that both sides take."""

    prompts: int = PROMPTS
    new_tokens: int = NEW_TOKENS
    device: str = "cpu"
    warm_up: int = WARM_UP
    """Steps of each side that are not counted."""


class Ours:
    """onpath: `one_step`, as a run calls it."""

    def __init__(self, directory: Path, watch: Watch, shape: Shape) -> None:
        from onpath import config
        from onpath.run.assemble import assemble
        from onpath.run.optimizer import make_optimizer
        from onpath.training import one_step

        self.parts = assemble(config.build(settings(directory, shape)))
        self.optimizer, schedule = make_optimizer(self.parts.config, self.parts.models.student)
        schedule(0)
        self.steps, self.watch, self._one_step = 0, watch, one_step
        self._measure()

    def _measure(self) -> None:
        """Times the calls that are model work. What is left of a step is our own overhead."""
        import onpath.run.loss as story

        parts, watch = self.parts, self.watch

        def timed(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*args: Any, **kwargs: Any) -> Any:
                with watch(phase):
                    return call(*args, **kwargs)

            return inner

        parts.generators.student.continue_from = timed("generation", parts.generators.student.continue_from)
        parts.models.teacher.hidden = timed("forward teacher", parts.models.teacher.hidden)
        story.student_states = timed("forward student", story.student_states)
        story.fused_objective = timed("heads and loss", story.fused_objective)
        torch.Tensor.backward = timed("backward", torch.Tensor.backward)
        self.optimizer.step = timed("optimiser", self.optimizer.step)

    def step(self) -> tuple[dict[str, float], int]:
        """Seconds by phase, and the number of response tokens."""
        meter = self._one_step(self.parts, self.optimizer, self.steps)
        self.steps += 1
        spent = meter.watch.seconds
        own = {"sample": spent["sample"] + spent["correct"], "score": spent["score"], "train": spent["train"]}
        return own, sum(len(r.ids) for r in meter.rollouts)


def settings(directory: Path, shape: Shape) -> dict[str, Any]:
    """The config of our side."""
    return {
        "student": {"model": str(directory / "student"), "device": shape.device},
        "teacher": {"model": str(directory / "teacher"), "device": shape.device},
        "data": {"train": str(directory / "prompts.jsonl"), "eval": {}},
        "rollout": {"prompts": shape.prompts, "max_new_tokens": shape.new_tokens},
        "optim": {"steps": 1000, "lr": LEARNING_RATE, "schedule": "constant", "warmup": 0.0},
        "run": {"dir": str(directory / "runs"), "name": "ours"},
    }


def make_trainer(directory: Path, watch: Watch, callbacks: Sequence[Any], steps: int, shape: Shape) -> Any:
    """TRL's trainer with the same settings, its phases timed by wrapping its own methods."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import DistillationConfig, DistillationTrainer

    class Timed(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with watch("sample"):
                return super()._generate_and_score_completions(inputs)

        def _get_last_hidden_state(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            with watch("score" if model is self.teacher_model else "student"):
                return super()._get_last_hidden_state(model, *args, **kwargs)

    arguments = DistillationConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=shape.prompts,
        gradient_accumulation_steps=1,
        max_steps=steps,
        max_completion_length=shape.new_tokens,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=1.0,  # reverse KL
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bf16=False,
        use_cpu=shape.device == "cpu",
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=torch.float32),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(directory / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(directory / "student", padding_side="left"),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def agreement(ours: Ours, trainer: Any) -> dict[str, float]:
    """Loss and gradient of both sides on one batch of our rollouts, from the same weights."""
    from onpath.data.batch import collate
    from onpath.run.loss import Step, loss_of, teacher_states
    from onpath.training import sample

    parts = ours.parts
    rollouts = sample(parts, step=0)
    prepared = parts.method.prepare(rollouts, step=0)
    trainer.model.load_state_dict(parts.models.student.state_dict())
    count = sum(len(r.ids) for r in rollouts)
    batch = collate(prepared.trajectories, device=parts.models.device)
    step = Step(prepared=prepared, objective=parts.objective, denominator=count)
    mine = loss_of(parts.models, batch, teacher_states(parts.models, batch, prepared), step).loss
    inputs, device = {}, parts.models.device
    for name, rows, left in (
        ("prompt", [r.context for r in rollouts], True),
        ("completion", [r.ids for r in rollouts], False),
    ):
        width = max(map(len, rows))
        fill = [[0] * (width - len(row)) for row in rows]
        ids = [[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)]
        ones = [[*f, *[1] * len(r)] if left else [*[1] * len(r), *f] for f, r in zip(fill, rows, strict=True)]
        inputs[f"{name}_ids"], inputs[f"{name}_mask"] = (torch.tensor(x, device=device) for x in (ids, ones))
    theirs, _, _ = trainer._compute_loss(trainer.model, inputs, count)
    return {
        "tokens": count,
        "loss_onpath": float(mine.detach()),
        "loss_trl": float(theirs.detach()),
        "loss_difference": abs(float(mine.detach()) - float(theirs.detach())),
        "gradient_relative_difference": _gradient_difference(
            parts.models.student, mine, trainer.model, theirs
        ),
    }


def _gradient_difference(mine: Any, my_loss: Any, other: Any, other_loss: Any) -> float:
    a = torch.autograd.grad(my_loss, list(mine.parameters()))
    b = torch.autograd.grad(other_loss, list(other.parameters()))
    difference = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    return float((difference / sum(float(x.square().sum()) for x in a)) ** 0.5)


class InTurn:
    """A side in a process of its own, which makes a step whenever it is asked."""

    def __init__(self, side: str, directory: Path, shape: Shape) -> None:
        command = [sys.executable, __file__, "--side", side, "--directory", str(directory)]
        command += ["--threads", str(torch.get_num_threads()), "--shape", json.dumps(vars(shape))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, dict[str, float]]:
        """Seconds by phase, and what else the side has measured."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("step\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} has ended with {self._process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def measure_time(directory: Path, steps: int, shape: Shape) -> dict[str, Any]:
    """A B C A B C: each side in a process of its own, one step of each in turn while the others wait."""
    # The allocator is a matter of the CPU's pages.
    sides = {side: InTurn(side, directory, shape) for side in (SIDES if shape.device == "cpu" else SIDES[:2])}
    try:
        rows = [
            {name: row for side in sides.values() for name, row in side.step().items()}
            for _ in range(shape.warm_up + steps)
        ]
    finally:
        for side in sides.values():
            side.close()
    found = agreement(Ours(directory, Seconds(), shape), make_trainer(directory, Seconds(), [], steps, shape))
    return {"agreement": found, "steps": rows[shape.warm_up :]}


def take_turns(side: str, directory: Path, shape: Shape) -> None:
    """The process behind `InTurn`: a step for each line that comes in, and its seconds as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    if side == "onpath":
        _ours_in_turn(directory, shape, answer)
    else:
        if side == TUNED:
            allocator.keep_freed_memory()
        _trl_in_turn(side, directory, shape, answer)


def _ours_in_turn(directory: Path, shape: Shape, answer: Callable[..., None]) -> None:
    watch = Seconds()
    ours = Ours(directory, watch, shape)
    for _ in sys.stdin:
        watch.take()
        begun, cpu = now(), time.process_time()
        phases, tokens = ours.step()
        spent = {"step": now() - begun, "cpu": time.process_time() - cpu, "tokens": tokens}
        answer(**{"onpath": {**phases, **spent}, "model work": watch.take()})


def _trl_in_turn(side: str, directory: Path, shape: Shape, answer: Callable[..., None]) -> None:
    from transformers import TrainerCallback

    watch = Seconds()

    class OnDemand(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            watch.take()
            self.begun, self.cpu = now(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole, cpu, spent = now() - self.begun, time.process_time() - self.cpu, watch.take()
            theirs = {"sample": spent["sample"], "score": spent["score"]}
            theirs |= {"train": whole - sum(theirs.values()), "step": whole, "cpu": cpu}
            tokens = trainer._metrics["train"]["completions/mean_length"][-1] * shape.prompts
            answer(**{side: {**theirs, "tokens": tokens}})

    trainer = make_trainer(directory, watch, [OnDemand()], 10**6, shape)
    trainer.train()


def measure_memory(directory: Path, side: str, steps: int) -> dict[str, Any]:
    """Peak resident memory by phase, of one side alone in this process."""
    peak = PeakMemory()
    if side == "onpath":
        ours = Ours(directory, lambda phase: peak(_PHASE_OF.get(phase, "train")), Shape())
        before = peak.now()
        for _ in range(steps):
            ours.step()
    else:
        trainer = make_trainer(
            directory, lambda phase: peak("train" if phase == "student" else phase), [], steps, Shape()
        )
        before = peak.now()
        compute, optimise = trainer.training_step, trainer.create_optimizer_and_scheduler
        trainer.training_step = lambda *args: _in(peak, "train", compute, *args)
        trainer.create_optimizer_and_scheduler = lambda *args, **kwargs: _in(
            peak, "train", optimise, *args, **kwargs
        )
        trainer.train()
    return {"before": before, "after": peak.now(), **peak.mib}


_PHASE_OF = {"generation": "sample", "forward teacher": "score"}


def _in(peak: PeakMemory, phase: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with peak(phase):
        return call(*args, **kwargs)


def memory_in_children(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Each side three times, in turn."""
    found: dict[str, list[Any]] = {"onpath": [], "trl": []}
    for _ in range(3):
        for side, results in found.items():
            command = [sys.executable, __file__, "--memory-of", side, "--directory", str(directory)]
            command += ["--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def ratios(steps: Sequence[Mapping[str, Any]], peer: str, clock: str = "step") -> Spread:
    """Of paired steps. In CPU time (`cpu`), with one thread, what other processes do does not show."""
    return Spread.of([step["onpath"][clock] / step[peer][clock] for step in steps])


def summary(data: Mapping[str, Any]) -> dict[str, Any]:
    """Medians, quartiles and ratios."""
    steps, found = data["steps"], {}
    for side in SIDES:
        found[side] = {p: vars(Spread.of([s[side][p] for s in steps])) for p in (*PHASES, "step", "tokens")}
    work = {
        k: Spread.of([s["model work"][k] / s["onpath"]["step"] for s in steps]).median
        for k in steps[0]["model work"]
    }
    memory = {
        side: {k: Spread.of([run[k] for run in runs]).median for k in ("before", *PHASES)}
        for side, runs in data["memory"].items()
    }
    peaks = {side: max(m[p] for p in PHASES) for side, m in memory.items()}
    return {
        **found,
        "time_ratio": {peer: vars(ratios(steps, peer)) for peer in SIDES[1:]},
        "cpu_ratio": {peer: vars(ratios(steps, peer, "cpu")) for peer in SIDES[1:]},
        "share_of_step": work,
        "memory": memory,
        "memory_ratio_peak": peaks["onpath"] / peaks["trl"],
        "memory_ratio_growth": (peaks["onpath"] - memory["onpath"]["before"])
        / (peaks["trl"] - memory["trl"]["before"]),
    }


def markdown(data: Mapping[str, Any]) -> str:
    """The tables that are committed."""
    found, agreed, settings = data["summary"], data["agreement"], data["settings"]
    tokens = [found[side]["tokens"]["median"] for side in ("onpath", "trl")]
    share = found["share_of_step"]
    return f"""# One step of OPD: onpath and TRL's DistillationTrainer

`python benchmarks/opd_step.py --steps {settings["steps"]} --threads {data["environment"]["threads"]}`:
{environment_line(data["environment"])}.
{PROMPTS} prompts, at most {NEW_TOKENS} new tokens, {settings["models"]}, float32, reverse KL.
{"The machine was busy with other work: read the ratios, not the seconds." if settings["busy"] else ""}

| seconds per step, median [quartiles] | onpath | TRL | ratio | {TUNED.upper()[:3]}{TUNED[3:]} | ratio |
|---|---|---|---|---|---|
{_time_rows(found)}

Ratio of paired steps (onpath / TRL), median [quartiles], n = {settings["steps"]}:
**{_cell(found["time_ratio"]["trl"], 2)}** in wall time, {_cell(found["cpu_ratio"]["trl"], 2)} in CPU time.
onpath has the C library keep what a step frees (`onpath.system.allocator`); with that set for TRL too:
**{_cell(found["time_ratio"][TUNED], 2)}**, {_cell(found["cpu_ratio"][TUNED], 2)}.
Response tokens per step: {tokens[0]:.0f} and {tokens[1]:.0f}.

| resident memory, MiB, peak by phase | onpath | TRL |
|---|---|---|
{_memory_rows(found["memory"])}

Ratio of peaks **{found["memory_ratio_peak"]:.2f}**; of what the steps add
**{found["memory_ratio_growth"]:.2f}** (three processes per side, medians).

Where our step goes: {", ".join(f"{name} {part:.1%}" for name, part in share.items())}; in all
**{sum(share.values()):.1%}** in the model, its loss and the optimiser.

The same batch ({agreed["tokens"]} tokens): loss {agreed["loss_onpath"]:.7f} and {agreed["loss_trl"]:.7f},
difference **{agreed["loss_difference"]:.1e}**; gradients differ by
{agreed["gradient_relative_difference"]:.1e} of their norm.
"""


def _time_rows(found: Mapping[str, Any]) -> str:
    rows = []
    labels = {"sample": "sampling", "score": "scoring", "train": "training", "step": "**step**"}
    for phase, label in labels.items():
        ours, cells = found["onpath"][phase], []
        for peer in SIDES[1:]:
            theirs = found[peer][phase]
            cells += [_cell(theirs, 3), f"{ours['median'] / theirs['median']:.2f}"]
        rows.append(f"| {label} | {_cell(ours, 3)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(found: Mapping[str, float], digits: int) -> str:
    median, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def _memory_rows(memory: Mapping[str, Mapping[str, float]]) -> str:
    labels = {
        "before": "before the first step",
        "sample": "sampling",
        "score": "scoring",
        "train": "training",
    }
    return "\n".join(
        f"| {label} | {memory['onpath'][phase]:.0f} | {memory['trl'][phase]:.0f} |"
        for phase, label in labels.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="note in the results that other work was running")
    parser.add_argument("--no-memory", action="store_true", help="time only; writes no results")
    parser.add_argument("--memory-of", choices=["onpath", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    if options.side:
        take_turns(options.side, options.directory, Shape(**options.shape))
        return
    if options.memory_of:
        print(json.dumps(measure_memory(options.directory, options.memory_of, steps=6)))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        bundled = (directory / "student").is_symlink()
        data = measure_time(directory, options.steps, Shape())
        data["environment"] = environment("trl")
        data["settings"] = {
            "steps": options.steps,
            "busy": options.busy,
            "models": "the gym's bundled models" if bundled else "random models of the gym's shapes",
        }
        if options.no_memory:
            print(json.dumps(data["steps"][-1], indent=1))
            for peer in SIDES[1:]:
                wall, cpu = ratios(data["steps"], peer), ratios(data["steps"], peer, "cpu")
                print(f"ratio of paired steps, onpath / {peer}: {wall}, in CPU time {cpu}")
            return
        data["memory"] = memory_in_children(directory, options)
        data["summary"] = summary(data)
        write("opd_step", data, markdown(data))


if __name__ == "__main__":
    main()
