"""Configs in which nothing is trained: the student as it is, the teacher in its place, a run's final model.

A run's config demands of its rollouts and its student what its method needs; an evaluation needs none of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onpath.config.sections import RolloutSection, Student
from onpath.config.whole import Config
from onpath.engines.adapters import is_adapter

EVALUATIONS = "evaluations-"
"""Begins the name of the directory in which models answer other questions than their runs had."""
_SERVED = {
    "vllm": {"support": "teacher_topk"},
    "chat": {"writer": "teacher", "divergence": "cross_entropy"},
}
"""Engine of a teacher → what OPD needs beside it."""


def as_it_is(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tree with the student that it has: OPD, which the engines of all teachers can serve, and
    samples as that demands."""
    engines = {section["engine"] for section in (tree["teacher"], *tree.get("teachers", {}).values())}
    options = next((_SERVED[engine] for engine in _SERVED if engine in engines), {})
    rollout = tree["rollout"] | {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    if not tree["student"]["lora_rank"]:
        rollout["push"] = "weights" if rollout["push"] == "adapter" else rollout["push"]
    return {**tree, "method": {"name": "opd", **options}, "rollout": rollout}


def teacher_as_it_is(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Likewise with the teacher in the student's place."""
    theirs = {key: tree["teacher"][key] for key in ("model", "dtype", "quantization", "trust_remote_code")}
    student = Student().model_dump() | theirs | {"device": tree["student"]["device"]}
    rollout = tree["rollout"]
    if student["quantization"] is not None:  # an adapter that is not trained changes nothing
        student["lora_rank"] = 1
        plain = RolloutSection().model_dump()
        rollout = rollout | {key: plain[key] for key in ("engine", "vllm", "url", "push", "overlap")}
    elif student["dtype"] == "float16":  # no dtype to train in, and this does not
        student["dtype"] = "bfloat16"
    return as_it_is({**tree, "student": student, "rollout": rollout})


def final_model(tree: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Likewise with the final model of a run. An adapter is merged into its base; on one that is quantised or
    of half precision it lies as it was trained (`adapter_of`)."""
    student = dict(tree["student"])
    if student["quantization"] is None and student["dtype"] != "float16":
        lora = {name: value for name, value in Student().model_dump().items() if name.startswith("lora_")}
        student |= {**lora, "model": str(run / "model")}
    return as_it_is({**tree, "student": student, "rollout": tree["rollout"] | {"overlap": False}})


def adapter_of(config: Config) -> Path | None:
    """Of an evaluation whose student is a run's base with its adapter, where that lies; else None."""
    folder = Path(config.run.dir)
    model = folder.parent / "runs" / config.run.name / "model"
    found = config.student.lora_rank and folder.name.startswith(EVALUATIONS) and is_adapter(model)
    return model if found else None
