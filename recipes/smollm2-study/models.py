"""Student and teacher of the study, of SmolLM2-135M-Instruct, by one run that goes on where it was stopped.

    python recipes/smollm2/prepare.py --perturb 0      build/smollm2/model: the base
    python recipes/smollm2-study/models.py merge       build/smollm2-study/{student,teacher,better,longer}
    python recipes/smollm2-study/models.py train       build/smollm2-study/adapters/, with checkpoints
    python recipes/smollm2-study/models.py further     likewise, the better teacher
    python recipes/smollm2-study/models.py longer      likewise, the student of longer problems

`merge` takes the adapters that lie beside this file, or those that were made anew.

The student is the base after a short SFT on its own wording. The teacher goes on from it with another wording
and then also learns to rewrite the student's real attempts. The better one goes on from that with problems of
three and four steps as well. The student of longer problems goes on from the student with such problems too,
in its own words. All are LoRA adapters. More updates than before, and each goes on from where the last ones
ended.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from onpath.data.render import Renderer, fill
from onpath.records import Prompt

sys.path.insert(0, str(Path(__file__).parent))
import words

HERE = Path(__file__).parent
BASE = Path("build/smollm2/model")
MERGED = Path("build/smollm2-study")
ADAPTERS = MERGED / "adapters"
SYSTEM = "Solve step by step."
RANK, ALPHA = 8, 16
STUDENT: dict[str, Any] = {"lr": 1e-3, "rounds": ((16, 16), (14, 10))}
"""Updates and examples of each: after the first it was right in 6% of its samples."""
TEACHER = {"lr": 1.5e-3, "updates": 80, "mixed": 60, "examples": 12}
FURTHER = {"lr": 1.5e-3, "updates": 240, "examples": 12, "attempts": 384}
"""Half of each are of two steps, half of three or four; so are the attempts, as many of each."""
LONGER = {"lr": 1e-3, "updates": 60, "examples": 12}
"""Likewise half and half, in the student's words."""
ATTEMPTS, HELD_OUT = 256, 48
"""Of the student's, for the teacher to rewrite; those that it never sees."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Context and response."""


class Maker:
    """The base, its tokenizer and how prompts are rendered: as onpath does it."""

    def __init__(self, work: Path, log: str, *, bf16: bool) -> None:
        self.work, self.log, self.bf16 = work, work / log, bf16
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BASE)
        self.renderer = Renderer(self.tokenizer, system=SYSTEM)
        self.ends = list(self.renderer.turn_end()[:1])
        self.template = words.WordProblems.templates["rewrite"]

    def say(self, **what: Any) -> None:
        """A line of the run's log."""
        line = json.dumps(what)
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    def pair(self, question: str, response: str) -> Pair:
        """Ids of what is asked and of what is to be said."""
        context = self.renderer.ids(Prompt(id="", text=question))
        return context, (*self.renderer.text_ids(response), *self.ends)

    def asked_to_rewrite(self, problem: str, attempt: str) -> str:
        return fill(self.template, problem=problem, attempt=attempt)

    def adapted(self, name: str | None = None) -> PeftModel:
        """The base with a new adapter, or with the one of that name, to be trained."""
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        if name is None:
            return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
        return PeftModel.from_pretrained(base, adapter(name), is_trainable=True)

    def trained(
        self,
        model: PeftModel,
        name: str,
        *,
        updates: int,
        lr: float,
        examples: Callable[[int], Sequence[Pair]],
    ) -> PeftModel:
        """AdamW on the responses; a checkpoint every ten updates, from which a killed run goes on."""
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        place, begun = self.work / f"{name}.pt", 0
        if place.is_file():
            saved = torch.load(place, weights_only=True)
            model.load_state_dict(saved["weights"], strict=False)
            optimiser.load_state_dict(saved["optimiser"])
            begun = saved["update"]
        for update in range(begun + 1, updates + 1):
            start, pairs = time.perf_counter(), sorted(examples(update), key=lambda p: len(p[0]) + len(p[1]))
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, update / 4, max(0.1, (updates - update + 1) / (0.4 * updates)))
            ids_BT, labels_BT = self.padded(pairs)
            count = int((labels_BT != -100).sum())
            model.train()
            loss, inner = 0.0, model.get_base_model()
            for rows in torch.arange(len(pairs)).split(8):
                longest = max(len(pairs[row][0]) + len(pairs[row][1]) for row in rows)
                taught_BT = labels_BT[rows, 1:longest]
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    hidden_BTH = inner.model(input_ids=ids_BT[rows, :longest]).last_hidden_state[:, :-1]
                    logits_NV = inner.lm_head(hidden_BTH[taught_BT != -100])  # of the responses alone
                part = torch.nn.functional.cross_entropy(
                    logits_NV.float(), taught_BT[taught_BT != -100], reduction="sum"
                )
                (part / count).backward()
                loss += part.item() / count
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            self.say(stage=name, update=update, loss_nats=round(loss, 4), grad_norm=round(float(norm), 3),
                     tokens=count, seconds=round(time.perf_counter() - start, 1))  # fmt: skip
            if update % 10 == 0 or update == updates:
                state = {k: v for k, v in model.state_dict().items() if "lora_" in k}
                torch.save(
                    {"weights": state, "optimiser": optimiser.state_dict(), "update": update},
                    place.with_suffix(".new"),
                )
                place.with_suffix(".new").rename(place)
        return model

    def padded(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Ids [B, T], padded on the right, and labels: the responses."""
        longest = max(len(c) + len(r) for c, r in pairs)
        ids = torch.full((len(pairs), longest), int(self.tokenizer.pad_token_id))  # type: ignore[arg-type]
        labels = torch.full_like(ids, -100)
        for row, (c, r) in enumerate(pairs):
            ids[row, : len(c) + len(r)] = torch.tensor((*c, *r))
            labels[row, len(c) : len(c) + len(r)] = torch.tensor(r)
        return ids, labels

    @torch.no_grad()
    def written(
        self, model: PeftModel, questions: Sequence[str], *, temperature: float, seed: int
    ) -> list[str]:
        """One response each; shorter prompts are padded on the left."""
        model.eval()
        model.merge_adapter()  # fewer matrix products for each token
        torch.manual_seed(seed)
        found: list[str] = []
        how = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        for first in range(0, len(questions), 64):
            contexts = [self.renderer.ids(Prompt(id="", text=q)) for q in questions[first : first + 64]]
            longest = max(map(len, contexts))
            ids = torch.full((len(contexts), longest), int(self.tokenizer.pad_token_id))  # type: ignore[arg-type]
            mask = torch.zeros_like(ids)
            for row, context in enumerate(contexts):
                ids[row, longest - len(context) :] = torch.tensor(context)
                mask[row, longest - len(context) :] = 1
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=144, eos_token_id=self.ends,
                pad_token_id=self.tokenizer.pad_token_id, **how,
            )  # fmt: skip
            found += [self.renderer.text(row[longest:].tolist()) for row in out]
        model.unmerge_adapter()
        return found

    def save(self, model: PeftModel, name: str) -> None:
        """The adapter in half precision, naming the base by its place in the tree."""
        out = ADAPTERS / name
        model.save_pretrained(out)
        (out / "README.md").unlink()
        weights = load_file(out / "adapter_model.safetensors")
        save_file({k: v.to(torch.float16).contiguous() for k, v in weights.items()},
                  out / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
        config = json.loads((out / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(BASE)
        (out / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def share_right(asked: Sequence[Any], texts: Sequence[str]) -> float:
    return sum(words.grade(t, str(p.answer)) for p, t in zip(asked, texts, strict=True)) / len(texts)


def demonstrations(made: Maker, writer: Any, asked: Sequence[Any], n: int) -> Callable[[int], list[Pair]]:
    """Update → the next n problems, each with a right solution."""

    def examples(update: int) -> list[Pair]:
        rng = random.Random(f"{update}")
        mine = [asked[i % len(asked)] for i in range((update - 1) * n, update * n)]
        return [made.pair(p.text, writer.write(rng, p)) for p in mine]

    return examples


def mixture(
    made: Maker, pool: Sequence[Any], attempts: Sequence[tuple[Any, str]], n: int
) -> Callable[[int], list[Pair]]:
    """Half solutions, half rewrites: of the student's attempts, and one in eight of a right solution."""
    half = n // 2
    plain = demonstrations(made, words.TEACHER, pool, half)

    def examples(update: int) -> list[Pair]:
        rng = random.Random(f"mixed/{update}")
        pairs = plain(update)
        for i in range((update - 1) * half, update * half):
            problem, attempt = attempts[i % len(attempts)]
            if i % 8 == 7:
                attempt = words.TEACHER.write(rng, problem)
            goal = words.rewritten(rng, problem, attempt, words.STUDENT)
            pairs.append(made.pair(made.asked_to_rewrite(problem.text, attempt), goal))
        return pairs

    return examples


def train(made: Maker) -> None:
    pool = list(islice(words.problems("sft"), 4000))

    def student() -> PeftModel:
        model = made.adapted()
        for i, (updates, n) in enumerate(STUDENT["rounds"]):
            taught = demonstrations(made, words.STUDENT, pool[256 * i :], n)
            model = made.trained(model, f"student{i}", updates=updates, lr=STUDENT["lr"], examples=taught)
        return model

    def first_student() -> PeftModel:
        model = student()
        made.save(model, "student")
        return model

    asked = pool[-ATTEMPTS:]
    pairs = attempted(made, "attempts", first_student, asked)
    model = student()  # which the teacher goes on from
    n = int(TEACHER["examples"])
    direct = demonstrations(made, words.TEACHER, pool[512:-ATTEMPTS], n)
    updates, more = int(TEACHER["updates"]), int(TEACHER["mixed"])
    first = made.trained(model, "direct", updates=updates, lr=TEACHER["lr"], examples=direct)
    mixed = mixture(made, pool[1500:-ATTEMPTS], pairs[:-HELD_OUT], n)
    model = made.trained(first, "mixed", updates=more, lr=TEACHER["lr"], examples=mixed)
    made.save(model, "teacher")
    examined(made, model, "two", list(islice(words.problems("validation"), HELD_OUT)), pairs[-HELD_OUT:])


def further(made: Maker) -> None:
    """The better teacher goes on from the teacher, with longer problems and attempts at them too."""
    n = int(FURTHER["attempts"])
    pools = {
        "two": list(islice(words.problems("sft"), 4000)),
        "longer": list(islice(words.problems("sft", words.LONGER), 4000)),
    }
    pairs = {
        name: attempted(made, f"attempts_{name}", lambda: made.adapted("student"), pool[-n:])
        for name, pool in pools.items()
    }
    both = [
        mixture(made, pools[name][:-n], pairs[name][:-HELD_OUT], int(FURTHER["examples"]) // 2)
        for name in pools
    ]
    model = made.trained(
        made.adapted("teacher"), "further", updates=int(FURTHER["updates"]), lr=FURTHER["lr"],
        examples=lambda update: [pair for examples in both for pair in examples(update)],
    )  # fmt: skip
    made.save(model, "better")
    for name, steps in (("two", None), ("longer", words.LONGER)):
        check = list(islice(words.problems("validation", steps), HELD_OUT))
        examined(made, model, name, check, pairs[name][-HELD_OUT:])


def longer(made: Maker) -> None:
    """The student goes on with longer problems as well, in words of its own."""
    half = int(LONGER["examples"]) // 2
    both = [
        demonstrations(made, words.STUDENT, list(islice(words.problems("sft", steps), 4000)), half)
        for steps in (None, words.LONGER)
    ]
    model = made.trained(
        made.adapted("student"), "longer", updates=int(LONGER["updates"]), lr=LONGER["lr"],
        examples=lambda update: [pair for examples in both for pair in examples(update)],
    )  # fmt: skip
    made.save(model, "longer")
    for name in ("validation", "hard_validation"):
        check = list(islice(words.problems(name), 2 * HELD_OUT))
        texts = made.written(model, [p.text for p in check], temperature=1.0, seed=1)
        right = share_right(check, texts)
        made.say(stage="longer", split=name, n=len(check), right=right, texts=texts[:4])


def attempted(
    made: Maker, name: str, student: Callable[[], PeftModel], asked: Sequence[Any]
) -> list[tuple[Any, str]]:
    """Each problem with what the student writes at T = 1; kept in a file of that name."""
    place = made.work / f"{name}.json"
    if not place.is_file():
        texts = made.written(student(), [p.text for p in asked], temperature=1.0, seed=1)
        made.say(stage=name, n=len(asked), right=share_right(asked, texts), texts=texts[:4])
        place.write_text(json.dumps(texts))
    return list(zip(asked, json.loads(place.read_text()), strict=True))


def examined(
    made: Maker, model: PeftModel, name: str, check: Sequence[Any], fresh: Sequence[tuple[Any, str]]
) -> None:
    """What the teacher gets right greedily: problems, and rewrites of attempts that it has not seen."""
    texts = made.written(model, [p.text for p in check], temperature=0.0, seed=0)
    right = share_right(check, texts)
    made.say(stage="teacher", steps=name, problems=len(check), greedy=right, texts=texts[:4])
    shown = [made.asked_to_rewrite(p.text, y) for p, y in fresh]
    cells: Counter[str] = Counter()
    for (problem, y), z in zip(fresh, made.written(model, shown, temperature=0.0, seed=0), strict=True):
        before, after = ("right" if words.grade(t, str(problem.answer)) else "wrong" for t in (y, z))
        cells[f"{before}_to_{after}"] += 1
    made.say(stage="rewrites", steps=name, n=len(fresh), **cells)


def adapter(name: str) -> Path:
    """That was made anew, or else the one beside this file."""
    return next(d for d in (ADAPTERS / name, HERE / "adapters" / name) if d.is_dir())


def merge() -> None:
    """Models that onpath and transformers load by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for name in ("student", "teacher", "better", "longer"):
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        merged: PreTrainedModel = PeftModel.from_pretrained(base, adapter(name)).merge_and_unload()
        merged.save_pretrained(MERGED / name)
        tokenizer.save_pretrained(MERGED / name)
        print(MERGED / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "further", "longer", "merge"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/smollm2-study/making"), help="checkpoints and log"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast: 2.4 x as fast where AVX-512 has bf16")
    options = parser.parse_args()
    logging.disable_progress_bar()
    if not BASE.is_dir():
        parser.error(f"{BASE} is not there; make it: python recipes/smollm2/prepare.py --perturb 0")
    if options.what == "merge":
        merge()
        return
    options.work.mkdir(parents=True, exist_ok=True)
    made = Maker(options.work, f"{options.what}.jsonl", bf16=options.bf16)
    {"train": train, "further": further, "longer": longer}[options.what](made)
    with (HERE / "models.jsonl").open("w" if options.what == "train" else "a") as log:
        log.write(made.log.read_text())


if __name__ == "__main__":
    main()
