"""Options that are set and have no effect beside the others. No torch."""

from collections.abc import Iterable
from typing import Any

from onpath.config.section import Section
from onpath.config.sections import teacher_option
from onpath.system import code

_OF_A_MODEL = ("model", "dtype", "device", "trust_remote_code")
"""Options of a teacher that is another model."""


def idle_options(config: Any) -> dict[str, str]:
    """Options that are set and have no effect beside the others: key → what it goes with."""
    sections: dict[str, Section] = {
        name: value
        for name in type(config).model_fields
        if isinstance(value := getattr(config, name), Section)
    }
    sections |= {teacher_option(name): teacher for name, teacher in config.taught_by.items()}
    found = {f"{s}.{o}": f"{s}.{n}" for s, section in sections.items() for o, n in section.idle.items()}
    if any(t.engine == "vllm" for t in config.taught_by.values()):
        found.pop("method.support_k", None)  # servers are asked for so many tokens, whatever is compared
    if config.teacher.engine == "chat":
        found.pop("method.best_of", None)  # whose greedy answers may differ
    if any(config.eval.also_at):
        found = {key: needs for key, needs in found.items() if key not in ("eval.top_p", "eval.top_k")}
    if config.method.importance != "none" and not config.method.trains_on_own_tokens:
        found["method.importance"] = "tokens that the student drew, and none are trained on"
    if config.method.self_taught:
        needs = f"another model as the teacher: with method.name {config.method.name} the student is its own"
        found |= {f"teacher.{name}": needs for name in _changed(config.teacher, _OF_A_MODEL)}
    if config.rollout.vllm and config.rollout.url is not None:
        found["rollout.vllm"] = "a vLLM in this process, and rollout.url is that of a server"
    if not _generates_here(config) and _changed(config.rollout, ["batch_tokens"]):
        found["rollout.batch_tokens"] = "generation by models in this process"
    if config.parallel.teacher == "copy" and config.parallel.shard == "none":
        found["parallel.teacher"] = "parallel.shard: layer or step"
    return found


def idle_alone(config: Any) -> list[str]:
    """Options of `parallel` that are set and have no effect in one process, beside `idle_options`."""
    other = [f"parallel.{name}" for name in _changed(config.parallel, ["shard", "hosts", "balance"])]
    copies = ["parallel.teacher"] * (config.parallel.teacher == "copy")
    return [key for key in (*other, *copies) if key not in idle_options(config)]


def _generates_here(config: Any) -> bool:
    """Whether a model in this process may generate: the student, or a teacher that writes."""
    own = code.is_own(config.method.name)  # which may have it write without saying so
    writes = own or config.method.teacher_writes or bool(config.method.asks_teachers)
    here = config.method.self_taught or any(t.engine == "hf" for t in config.taught_by.values())
    return config.rollout.engine == "hf" or (writes and here)


def _changed(section: Section, names: Iterable[str]) -> list[str]:
    """Those of its options that are other than by default."""
    plain = type(section)()
    return [name for name in names if getattr(section, name) != getattr(plain, name)]
