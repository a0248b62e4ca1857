"""The gym's properties as numbers: what the README's table is printed from."""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from onpath.gym.check import TokenLabel, first_error_token, grade, label_tokens
from onpath.gym.language import TEMPLATES
from onpath.gym.sample import context_ids, sample, sample_ids
from onpath.gym.tasks import count_orders, parse_problem, rows
from onpath.gym.vocab import EQUALS, HEADS, IDS, ONSET_WORDS, SEPARATORS, TOKENS
from onpath.system.files import make_directory, write_text

# Shapes: B rollouts, T response tokens, V vocabulary.


@dataclass(frozen=True, kw_only=True)
class Number:
    """One measured number, with a 95% interval by bootstrap over its n items."""

    group: str
    name: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A sampled response of the student, with the truth about it."""

    row: dict[str, str]
    tokens: list[str]
    labels: list[TokenLabel]
    right: bool

    @property
    def text(self) -> str:
        """The response as text, without its end token."""
        return "".join(t for t in self.tokens if t != "<eos>")

    @property
    def ids(self) -> list[int]:
        """The response's ids."""
        return [IDS[t] for t in self.tokens]


def number(group: str, name: str, values: Iterable[float]) -> Number:
    """The mean of values with its bootstrap interval."""
    data = torch.tensor(list(values), dtype=torch.float64)
    if len(data) == 0:
        return Number(group=group, name=name, value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    mean = data.mean().item()
    if len(data) > 3000:  # a bootstrap of so many would tell the same and take gigabytes
        half = 1.96 * data.std().item() / len(data) ** 0.5
        return Number(group=group, name=name, value=mean, low=mean - half, high=mean + half, n=len(data))
    generator = torch.Generator().manual_seed(0)
    means = data[torch.randint(len(data), (1000, len(data)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Number(group=group, name=name, value=mean, low=low, high=high, n=len(data))


def accuracy(models: dict[str, Any], problems: int, samples: dict[str, int]) -> list[Number]:
    """Greedy, average and pass@k accuracy of both models on the test and hard splits."""
    out = []
    for split in ("test", "hard"):
        data = rows(split, problems)
        for role, model in models.items():
            group, k = f"accuracy, {split}", samples[role]
            greedy = sample(model, [r["prompt"] for r in data], temperature=0)
            hits = [float(grade("".join(t), r["answer"])) for t, r in zip(greedy, data, strict=True)]
            out.append(number(group, f"{role} greedy", hits))
            many = sample(model, [r["prompt"] for r in data for _ in range(k)])
            right = [grade("".join(t), data[i // k]["answer"]) for i, t in enumerate(many)]
            counts = [sum(right[i * k : (i + 1) * k]) for i in range(problems)]
            out.append(number(group, f"{role} pass@1", (c / k for c in counts)))
            out.append(number(group, f"{role} pass@{k}", (float(c > 0) for c in counts)))
    return out


def attempts(student: Any, problems: int, k: int) -> list[Attempt]:
    """The student's real rollouts on the test split at temperature 1."""
    data = [row for row in rows("test", problems, seed=1) for _ in range(k)]
    made = sample(student, [row["prompt"] for row in data])
    return [
        Attempt(
            row=row,
            tokens=tokens,
            labels=label_tokens(row["prompt"], tokens),
            right=grade("".join(tokens), row["answer"]),
        )
        for row, tokens in zip(data, made, strict=True)
    ]


def task_facts(found: Sequence[Attempt], problems: int) -> list[Number]:
    """Share of problems with several derivations; share of tokens by label; length; kinds of first errors."""
    several = [
        float(count_orders(p) > 1) for p in (parse_problem(r["prompt"]) for r in rows("test", problems)) if p
    ]
    out = [number("task", "problems with several valid orders", several)]
    out.append(number("task", "tokens per response", (float(len(a.tokens)) for a in found)))
    labels = [label for a in found for label in a.labels]
    for kind in ("error", "consequence", "right", "habit", "choice", "copied"):
        out.append(number("task", f"share of tokens: {kind}", (float(la.kind == kind) for la in labels)))
    first = [next((la for la in a.labels if la.kind == "error"), None) for a in found]
    out.append(
        number("task", "first errors that are visible", (float(bool(la.visible)) for la in first if la))
    )
    return out


def refining(models: dict[str, Any], found: Sequence[Attempt], each: int) -> list[Number]:
    """Accuracy of rewrites of the student's real attempts, right and wrong, and of solving with a hint."""
    out = []
    sets = {"wrong": [a for a in found if not a.right][:each], "right": [a for a in found if a.right][:each]}
    for role, model in models.items():
        for kind in ("rewrite", "rewrite_with_reference"):
            for name, part in sets.items():
                messages = [
                    TEMPLATES[kind].format(
                        problem=a.row["prompt"], solution=a.row["solution"], attempt=a.text
                    )
                    for a in part
                ]
                made = sample(model, messages)
                hits = (float(grade("".join(t), a.row["answer"])) for t, a in zip(made, part, strict=True))
                out.append(number("refine", f"{role}, {kind}, {name} attempts", hits))
                kept = (float(_heads(t) == _heads(a.tokens)) for t, a in zip(made, part, strict=True))
                out.append(number("refine", f"{role}, {kind}, {name} attempts: order kept", kept))
        data = [a.row for a in found[:: max(1, len(found) // each)]]
        made = sample(
            model, [TEMPLATES["hint"].format(problem=r["prompt"], solution=r["solution"]) for r in data]
        )
        hits = (float(grade("".join(t), r["answer"])) for t, r in zip(made, data, strict=True))
        out.append(number("refine", f"{role}, hint", hits))
    return out


def _heads(tokens: Sequence[str]) -> list[str]:
    return [t for t in tokens if t in HEADS]


def recovery(models: dict[str, Any], found: Sequence[Attempt], each: int) -> list[Number]:
    """Success from just before the first wrong token and from just after the step that holds it."""
    out = []
    for visible in (True, False):
        part = [a for a in found if _first(a) is not None and a.labels[_first(a) or 0].visible is visible][
            :each
        ]
        kind = "visible" if visible else "invisible"
        for when in ("before", "after"):
            kept = []
            for a in part:
                at = _first(a)
                assert at is not None, "chosen for its error"
                end = at if when == "before" else _step_end(a.tokens, at)
                kept.append(a.ids[:end])
            for role, model in models.items():
                starts = [context_ids(a.row["prompt"]) + k for a, k in zip(part, kept, strict=True)]
                made = sample_ids(model, starts)
                texts = ["".join(TOKENS[i] for i in k + m) for k, m in zip(kept, made, strict=True)]
                hits = (float(grade(t, a.row["answer"])) for t, a in zip(texts, part, strict=True))
                out.append(number("recovery", f"{role}, from just {when} a {kind} first error", hits))
    return out


def _first(attempt: Attempt) -> int | None:
    return first_error_token(attempt.row["prompt"], attempt.tokens)


def _step_end(tokens: Sequence[str], at: int) -> int:
    return next((i + 1 for i in range(at, len(tokens)) if tokens[i] in SEPARATORS), len(tokens))


@torch.no_grad()
def response_logp(model: Any, found: Sequence[Attempt], batch: int = 64) -> list[Tensor]:
    """Log-probabilities [T, V] of a model along each attempt."""
    out: list[Tensor] = []
    for start in range(0, len(found), batch):
        part = found[start : start + batch]
        contexts = [context_ids(a.row["prompt"]) for a in part]
        full = [c + a.ids for c, a in zip(contexts, part, strict=True)]
        width = max(map(len, full))
        ids = torch.tensor([f + [IDS["<pad>"]] * (width - len(f)) for f in full])
        logp_BTV = model(input_ids=ids).logits.float().log_softmax(-1)
        for row, c, f in zip(logp_BTV, contexts, full, strict=True):
            out.append(row[len(c) - 1 : len(f) - 1])
    return out


def loudness(models: dict[str, Any], found: Sequence[Attempt]) -> tuple[list[Number], list[dict[str, Any]]]:
    """Habits, the onset's mass, and loss by label. Also returns every token with its signals."""
    student, teacher = (response_logp(models[role], found) for role in ("student", "teacher"))
    tokens: list[dict[str, Any]] = []
    for which, (a, s, t) in enumerate(zip(found, student, teacher, strict=True)):
        kl = (s.exp() * (s - t)).sum(-1)
        ids = torch.tensor(a.ids)
        ratio = (s - t).gather(1, ids[:, None])[:, 0]
        after: str | None = None
        for i, label in enumerate(a.labels):
            wait: float | None = (t[i, [IDS[w] for w in ONSET_WORDS]].exp().sum().item()) if after else None
            tokens.append(
                {"attempt": which, "at": i, "label": label, "token": a.tokens[i], "reverse_kl": kl[i].item()}
                | {"log_ratio": ratio[i].item(), "onset_after": after, "onset": wait}
                | {f"habit_{r}": _habit(a.tokens[i], p[i]) for r, p in (("student", s), ("teacher", t))}
            )
            after = _closed_step(a, i)
    out = []
    for role in ("student", "teacher"):
        for slot in ("equals", "separator"):
            at = [x[f"habit_{role}"][slot] for x in tokens if slot in x[f"habit_{role}"]]
            out.append(number("habit", f"{role}'s probability of the student's {slot} forms", at))
    for after in ("unreduced result", "malformed step", "invisible error", "right step"):
        mass = (x["onset"] for x in tokens if x["onset_after"] == after)
        out.append(number("onset", f"teacher's onset mass after: {after}", mass))
    loudest = sorted(tokens, key=lambda x: -x["reverse_kl"])[: max(1, round(0.0225 * len(tokens)))]
    for kind in ("error", "consequence", "right", "habit", "choice", "copied"):
        share = (float(x["label"].kind == kind) for x in loudest)
        out.append(number("loudness", f"share of {kind} in the top 2.25% by reverse KL", share))
        part = [x for x in tokens if x["label"].kind == kind]
        for signal in ("reverse_kl", "log_ratio"):
            out.append(number("loudness", f"{signal} at {kind} tokens, nats", (x[signal] for x in part)))
    return out, tokens


def _habit(token: str, logp_V: Tensor) -> dict[str, float]:
    """Probability of the student's forms, given that a form stands here."""
    for slot, forms in (("equals", EQUALS), ("separator", SEPARATORS)):
        if token in forms:
            p = logp_V[[IDS[f] for f in forms]].exp()
            return {slot: (p[1:].sum() / p.sum()).item()}
    return {}


def _closed_step(attempt: Attempt, i: int) -> str | None:
    """What kind of step the separator at i closes; None elsewhere."""
    if attempt.tokens[i] not in SEPARATORS:
        return None
    start = next((j for j in range(i, -1, -1) if attempt.tokens[j] in HEADS), 0)
    labels = attempt.labels[start : i + 1]
    wrong = next((la for la in labels if la.kind == "error"), None)
    if wrong is not None:
        unreduced = re.search(r"[a-h]\d{3,}", "".join(attempt.tokens[start : i + 1]))
        return "unreduced result" if unreduced else "malformed step" if wrong.visible else "invisible error"
    return "right step" if all(la.kind != "consequence" for la in labels) else None


def near_future(
    models: dict[str, Any], found: Sequence[Attempt], tokens: Sequence[dict[str, Any]], window: int
) -> list[float]:
    """TOPD's D at chosen tokens: the teacher's greedy window against the student's own rollout."""
    from onpath.transport.plans import window_divergence

    starts = [
        context_ids(found[x["attempt"]].row["prompt"]) + found[x["attempt"]].ids[: x["at"]] for x in tokens
    ]
    theirs = sample_ids(models["teacher"], starts, temperature=0, max_new=window)
    table = models["student"].get_input_embeddings().weight.detach()
    out = []
    for x, teacher_ids in zip(tokens, theirs, strict=True):
        own = found[x["attempt"]].ids[x["at"] : x["at"] + window]
        distance, _ = window_divergence(
            student_ids=torch.tensor(own), teacher_ids=torch.tensor(teacher_ids), embedding=table
        )
        out.append(float(distance))
    return out


def separation(
    models: dict[str, Any],
    found: Sequence[Attempt],
    tokens: list[dict[str, Any]],
    each: int,
    windows: Sequence[int],
) -> list[Number]:
    """Can a signal tell errors from habits? AUC of reverse KL, of the sampled log-ratio, and of D."""
    rng = random.Random(0)
    sets = {}
    loud = sorted((x["reverse_kl"] for x in tokens), reverse=True)[: max(1, len(tokens) // 20)][-1]
    for name, keep in (("all", lambda x: True), ("top 5% by reverse KL", lambda x: x["reverse_kl"] >= loud)):
        parts = [[x for x in tokens if x["label"].kind == kind and keep(x)] for kind in ("error", "habit")]
        sets[name] = [rng.sample(part, min(each, len(part))) for part in parts]
    out = []
    for name, (errors, habits) in sets.items():
        if not errors or not habits:
            continue
        for signal in ("reverse_kl", "log_ratio"):
            values = ([x[signal] for x in part] for part in (errors, habits))
            out.append(_auc_number(f"AUC of {signal}, error against habit, {name}", *values))
        for window in windows:
            values = (near_future(models, found, part, window) for part in (errors, habits))
            out.append(_auc_number(f"AUC of D (K = {window}), error against habit, {name}", *values))
    return out


def _auc_number(name: str, positive: list[float], negative: list[float]) -> Number:
    """Probability that a positive ranks above a negative, ties counted half."""
    p, n = torch.tensor(positive), torch.tensor(negative)

    def auc(a: Tensor, b: Tensor) -> float:
        pairs_above = mannwhitneyu(a.numpy(), b.numpy(), method="asymptotic").statistic
        return float(pairs_above) / (len(a) * len(b))

    g = torch.Generator().manual_seed(0)
    draws = sorted(
        auc(
            p[torch.randint(len(p), (len(p),), generator=g)], n[torch.randint(len(n), (len(n),), generator=g)]
        )
        for _ in range(200)
    )
    return Number(
        group="separation", name=name, value=auc(p, n), low=draws[4], high=draws[194], n=len(p) + len(n)
    )


def opened(directories: dict[str, Path], scale: float) -> tuple[dict[str, Any], int]:
    """The models, and how many problems of a split they are asked; draws begin anew."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    models = {role: AutoModelForCausalLM.from_pretrained(path).eval() for role, path in directories.items()}
    return models, max(8, int(300 * scale))


def measure(
    directories: dict[str, Path], *, scale: float = 1.0, log: Callable[[str], None] = print
) -> list[Number]:
    """All numbers. `scale` shrinks the sample sizes for a quick look."""
    models, size = opened(directories, scale)
    out = accuracy(models, size, {"student": 16, "teacher": 4})
    log(f"accuracy measured on {size} problems per split")
    found = attempts(models["student"], size, 4)
    out += task_facts(found, size) + refining(models, found, size)
    log("refining measured")
    out += recovery(models, found, size)
    log("recovery measured")
    numbers, tokens = loudness(models, found)
    out += numbers + separation(models, found, tokens, size, (14, 28))
    return out


def markdown(numbers: Sequence[Number]) -> str:
    """The table of the README."""
    lines = ["| what | value | 95% interval | n |", "|---|---|---|---|"]
    for x in numbers:
        lines.append(f"| {x.group}: {x.name} | {x.value:.3f} | {x.low:.3f} to {x.high:.3f} | {x.n} |")
    return "\n".join(lines) + "\n"


def write(numbers: Sequence[Number], out: Path) -> None:
    """Store the numbers as JSON and as markdown."""
    make_directory(out)
    write_text(out / "properties.json", json.dumps([asdict(x) for x in numbers], indent=1) + "\n")
    write_text(out / "properties.md", markdown(numbers))
