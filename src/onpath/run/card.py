"""The model card beside final weights: how they came about and what they score. No local paths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onpath.config import Config
from onpath.data.tasks import task_of
from onpath.system import code
from onpath.system.text import yaml_text

_PLACES = ("student.model", "teacher.model", "data.train", "eval.grader", "method.name", "method.divergence")
_OURS_ALONE = (
    "student.device",
    "teacher.device",
    "teacher.url",
    "teacher.cache",
    "rollout.url",
    "run.name",
    "run.dir",
)
"""Options that say where it ran, not what was done."""
_LIBRARY, _OPENING = ("peft", "transformers"), ("A LoRA adapter of", "Trained from")
"""What the card of an adapter says, and that of a whole model."""


def model_card(
    config: Config, *, problems: int, step: int, evaluations: Sequence[Mapping[str, Any]], adapter: bool
) -> str:
    """README.md of a model, in the form that model hubs read.

    Args:
        problems: training problems.
        step: optimiser steps that the weights have seen.
        evaluations: lines of eval.jsonl.
        adapter: whether it is a LoRA adapter.
    """
    method = config.method
    student = public(config.student.model)
    models = dict.fromkeys(f"`{public(teacher.model)}`" for teacher in config.taught_by.values())
    drawn = method.trains_on_rollouts or not method.writes_rollouts
    how = "on-policy distillation" if drawn else "distillation on the teacher's own samples,"
    taught = "its own weights" if method.self_taught else ", ".join(models)
    head: dict[str, Any] = {
        "library_name": _LIBRARY[not adapter],
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation" if drawn else "distillation", "onpath", public(method.name)],
    }
    if student == config.student.model and task_of(student) is None:
        head["base_model"] = student
    lines = [
        "---",
        yaml_text(head).strip(),
        "---",
        "",
        f"# {Path(student).name}, distilled: {public(method.name)}",
        "",
        f"{_OPENING[not adapter]} `{student}` by {how} with onpath.",
        "",
        "| | |",
        "|---|---|",
        f"| method | `{public(method.name)}`, `{public(method.divergence)}` |",
        f"| teacher | {taught} |",
        f"| data | `{public(config.data.train)}`, {problems:,} problems |",
        f"| steps | {step:,} of {config.rollout.prompts} prompts × {config.rollout.n} samples, of up to "
        f"{config.rollout.max_new_tokens:,} tokens |",
        f"| learning rate | {config.optim.lr:g}, {config.optim.schedule} |",
        "",
        *_numbers([row for row in evaluations if row["step"] in (0, step)]),
        "## Command",
        "",
        "```console",
        "$ onpath train config.yaml",
        "```",
        "",
        "with this `config.yaml` (places on the machine that trained are shortened to their names):",
        "",
        "```yaml",
        yaml_text(_public_tree(config)).strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def of_merged(card: str) -> str:
    """The card of an adapter, as that of its merged model."""
    of_adapter, of_whole = (f"library_name: {library}" for library in _LIBRARY)
    return card.replace(of_adapter, of_whole, 1).replace(*_OPENING, 1)


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Numbers",
        "",
        "| set | step | avg@n | 95% interval | pass@k | unfinished |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {row['split']}, {row['problems']:,} problems | {row['step']:,} | @{row['n']} "
            f"{row['avg_at_k']:.1%} | {low:.1%} to {high:.1%} | @{row['k']} {row['pass_at_k']:.1%} | "
            f"{1 - row['finished']:.1%} |"
        )
    return [*lines, ""]


def public(name: str) -> str:
    """A name as others may read it: of a place on this machine its last part.

    >>> public("/home/me/data/train.jsonl"), public("Qwen/Qwen3-1.7B"), public("/home/me/mine.py:Mine")
    ('train.jsonl', 'Qwen/Qwen3-1.7B', 'mine.py:Mine')
    """
    if task_of(name):
        return name
    if name.startswith(code.PASSED):
        return "rows given in Python"
    place, _, rest = name.rpartition(":") if code.is_own(name) else (name, "", "")
    local = (
        place.startswith(("/", "~", ".")) or Path(place).exists() or Path(place.partition(":")[0]).exists()
    )
    return f"{Path(place).name}{':' if rest else ''}{rest}" if local or code.is_own(name) else name


def _public_tree(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for dotted in _OURS_ALONE:
        section, key = dotted.split(".")
        tree[section].pop(key, None)
    for section in tree["teachers"].values():
        section["model"] = public(section["model"])
        del section["device"], section["url"], section["cache"]
    for dotted in _PLACES:
        section, key = dotted.split(".")
        tree[section][key] = public(tree[section][key])
    if (template := tree["data"]["chat_template"]) is not None:
        tree["data"]["chat_template"] = Path(template).name
    tree["data"]["eval"] = {split: public(source) for split, source in tree["data"]["eval"].items()}
    tree["run"]["trackers"] = [public(name) for name in tree["run"]["trackers"]]
    tree["rollout"]["vllm"] = _without_paths(tree["rollout"]["vllm"])
    tree["rewards"] = {k: {**r, "name": public(r["name"])} for k, r in tree["rewards"].items()}
    return tree


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    return public(value) if isinstance(value, str) else value
