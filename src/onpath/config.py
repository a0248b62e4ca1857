"""The configuration: one YAML section per stage, checked before anything is loaded. No torch.

Defaults are the vetted method on the embedded gym, so that `{}` is a valid config. A wrong key, a wrong value
or an impossible pair raises `UserError` with one sentence.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from onpath.errors import UserError
from onpath.options import METHOD_OPTIONS, Method, OPDOptions, OPSDOptions, Section, TRDOptions

DType = Literal["float32", "bfloat16", "float16"]


class Student(Section):
    model: str = "gym:student"
    """Directory or hub name of a causal LM in Hugging Face format, or gym:student."""
    dtype: DType = "float32"
    """Of the weights that train. bfloat16 without LoRA loses small updates: prefer float32 with optim.bf16.
    """
    device: str = "auto"
    """auto takes the GPU if there is one; else a torch device such as cpu or cuda:0."""
    lora_rank: int = Field(0, ge=0)
    """0 trains all weights; above 0 trains a LoRA adapter of this rank through peft."""
    lora_alpha: float = Field(128.0, gt=0)
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: str | list[str] = "all-linear"
    """Module names to adapt, or all-linear."""
    lora_merge: bool = False
    """Save the final model with the adapter merged into the weights, beside the adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask for it by name."""


class Served(Section):
    """A `vllm serve` that somebody runs (docs/engines.md). Its API key is read from ONPATH_API_KEY."""

    url: str | None = None
    """Of the server, such as http://localhost:8000; None: no server."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that one request may take."""
    patience: float = Field(600.0, ge=0)
    """Seconds to wait for a server that is down or busy before the run stops; it can be continued."""
    concurrency: int = Field(64, ge=1)
    """Requests on the way at a time."""


class Teacher(Served):
    engine: Literal["hf", "vllm"] = "hf"
    """hf: a model in this process; vllm: a server at teacher.url, which scores, rewrites and writes windows.
    It sends the method.support_k likeliest tokens: method.support must be teacher_topk."""
    model: str = "gym:teacher"
    """Directory or hub name of a causal LM with the student's vocabulary, or gym:teacher; with a server
    also the name that it serves it under."""
    dtype: DType = "float32"
    """Of the frozen weights."""
    device: str = "auto"
    """auto takes the student's device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Data(Section):
    train: str = "gym:train"
    """JSONL or Parquet file, `datasets` directory or name (name:split), or gym:train."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training prompts (a finite pool, shuffled by run.seed each epoch)."""
    eval: dict[str, str] = Field({"test": "gym:test"})
    """Evaluation sets: split name → source, as for data.train."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first so many problems of each evaluation set."""
    skip_bad: bool = False
    """Skip unreadable rows, print and store how many; otherwise the first one stops the run."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """auto: the tokenizer's chat template if it has one; plain: the text itself after BOS, if the tokenizer
    has one."""
    system: str | None = None
    """System message put before every chat prompt that has none."""
    enable_thinking: bool | None = None
    """Passed to chat templates that know it (Qwen3); None leaves the template's default."""

    @model_validator(mode="before")
    @classmethod
    def _name_single_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("eval"), str):
            source = value["eval"]
            name = source.removeprefix("gym:") if source.startswith("gym:") else Path(source).stem or "eval"
            return {**value, "eval": {name: source}}
        return value


class RolloutSection(Served):
    engine: Literal["hf", "vllm"] = "hf"
    """hf: sampling from the model that trains, in process. vllm: from a vLLM that is given the new weights
    after each step, in this process, or at rollout.url."""
    vllm: dict[str, Any] = Field({})
    """Arguments of vllm.LLM for an engine in this process, such as {gpu_memory_utilization: 0.4}."""
    prompts: int = Field(64, ge=1)
    """Prompts per optimiser step, over all processes."""
    n: int = Field(1, ge=1)
    """Samples per prompt."""
    temperature: float = Field(1.0, ge=0)
    """1 is the student's own distribution; on-policy objectives refuse anything else."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the samples are no longer on-policy."""
    top_k: int = Field(0, ge=0)
    """0 is off; above 0 the samples are no longer on-policy."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest response; longer ones are cut and counted as unfinished."""
    overlap: bool = False
    """Sample the next batch while this one trains, from a frozen copy of the student: rollouts are one step
    old (staleness 1 in the metrics), and the copy takes memory."""
    batch_tokens: int = Field(32_768, ge=1)
    """Tokens (sequences × longest length) that one generation batch may hold."""


class Optim(Section):
    steps: int = Field(100, ge=1)
    """Optimiser steps."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW. LoRA on pretrained models wants about 5e-6 to 1e-4."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; cosine and linear fall to min_lr_ratio."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    micro_batch_tokens: int = Field(16_384, ge=1)
    """Padded tokens that one forward pass may hold; gradients accumulate over micro-batches, exactly."""
    bf16: bool = False
    """bfloat16 autocast in forward and backward passes; weights and optimiser stay in student.dtype."""


class Eval(Section):
    grader: Literal["auto", "gym", "math", "exact"] = "auto"
    """auto: gym for gym data, else math (math-verify in a process of its own). exact: the last line,
    stripped."""
    every: int = Field(0, ge=0)
    """Evaluate every so many steps; 0 only at the start and the end."""
    start: bool = True
    """Evaluate before the first step."""
    n: int = Field(4, ge=1)
    """Samples per problem."""
    k: int = Field(4, ge=1)
    """pass@k; at most n."""
    temperature: float = Field(1.0, ge=0)
    """Of evaluation samples; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of evaluation samples."""
    top_k: int = Field(0, ge=0)
    """Of evaluation samples; 0 is off."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest response in evaluation."""
    seed: int = 1234
    """Of evaluation samples: the same for every model, so that comparisons are paired."""


class Run(Section):
    name: str = Field("opd-gym", min_length=1)
    """The run's directory under run.dir."""
    dir: str = "runs"
    """Where runs are kept."""
    seed: int = 0
    """Of the data order, the rollouts and LoRA's initialisation."""
    save_every: int = Field(50, ge=0)
    """Write a checkpoint every so many steps (and at the end); 0 only at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept; older ones are removed."""
    trajectories_every: int = Field(10, ge=0)
    """Store what was trained on every so many steps (and at the first and the last); 0 never."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field([])
    """Also log there (extra onpath[trackers]); JSON lines are always written. wandb runs offline unless
    WANDB_MODE says otherwise."""
    threads: int = Field(0, ge=0)
    """torch's CPU threads per process; 0 leaves torch's choice."""


class Config(Section):
    """Everything that a run depends on."""

    student: Student = Student()
    teacher: Teacher = Teacher()
    data: Data = Data()
    method: Annotated[Method, Field(discriminator="name")] = OPDOptions()
    rollout: RolloutSection = RolloutSection()
    optim: Optim = Optim()
    eval: Eval = Eval()
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, value: Any) -> Any:
        """`method: {divergence: …}` without a name means opd."""
        if (
            isinstance(value, Mapping)
            and isinstance(value.get("method"), Mapping)
            and "name" not in value["method"]
        ):
            return {**value, "method": {"name": "opd", **value["method"]}}
        return value

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        try:
            self.method.objective()
        except ValueError as error:
            raise ValueError(f"method: {error}") from None
        if self.eval.k > self.eval.n:
            raise ValueError(
                f"eval.k is {self.eval.k}, but eval.n gives only {self.eval.n} samples per problem; raise "
                f"eval.n or lower eval.k"
            )
        if self.method.on_policy and not (
            self.rollout.temperature == 1 and self.rollout.top_p == 1 and self.rollout.top_k == 0
        ):
            raise ValueError(
                f"method.name {self.method.name} assumes untruncated samples of the student: "
                f"rollout.temperature must be 1, "
                f"rollout.top_p 1 and rollout.top_k 0, not {self.rollout.temperature:g}, "
                f"{self.rollout.top_p:g} and {self.rollout.top_k}"
            )
        if self.student.dtype == "float16" and not self.student.lora_rank:
            raise ValueError(
                "student.dtype float16 cannot train: small updates round to nothing and gradients overflow; "
                "use float32 with optim.bf16, or LoRA (student.lora_rank)"
            )
        self._reachable()
        gym, method = self.data.train.startswith("gym:"), self.method
        if self.rollout.overlap and method.divergence == "sampled" and method.ppo_clip is None:
            raise ValueError(
                "rollout.overlap: method.divergence sampled takes rollouts for samples of the weights that "
                "train; set method.ppo_clip, which corrects for older ones, or rollout.overlap: false"
            )
        if self.rollout.overlap and isinstance(method, TRDOptions) and method.offline:
            raise ValueError(
                "rollout.overlap: with method.offline all rollouts are sampled before the first step; set "
                "rollout.overlap: false"
            )
        if isinstance(method, TRDOptions) and method.minimal_edit and method.locate == "checker" and not gym:
            raise ValueError(
                f"method.locate: checker needs a task with a checker of steps, as the gym is, not "
                f"{self.data.train}; use teacher_logprob"
            )
        if isinstance(method, OPSDOptions) and method.hint == "answer" and method.template is None and gym:
            raise ValueError(
                "method.hint: answer is a prompt that the gym's models were never shown; use hint: solution"
            )
        return self

    def _reachable(self) -> None:
        """What can be asked of a vLLM."""
        method, objective = self.method, self.method.objective()
        for name, section in (("teacher", self.teacher), ("rollout", self.rollout)):
            if section.url is not None and section.engine != "vllm":
                raise ValueError(f"{name}.url is that of a vLLM server: set {name}.engine: vllm")
        if self.teacher.engine == "hf":
            return
        if self.teacher.url is None:
            raise ValueError(
                "teacher.engine: vllm is a server: set teacher.url, such as http://localhost:8000"
            )
        if isinstance(method, OPSDOptions) or (isinstance(method, TRDOptions) and method.teacher == "self"):
            raise ValueError(
                f"teacher.engine: vllm: with method.name {method.name} the student is its own teacher; use "
                "teacher.engine: hf"
            )
        if objective.needs_teacher and method.divergence != "sampled" and method.support != "teacher_topk":
            raise ValueError(
                f"teacher.engine: vllm: a server sends its likeliest tokens only, not the vocabulary; set "
                f"method.support: teacher_topk and method.tail: bucket, not method.support: {method.support}"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load(path: str | Path | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Reads a YAML file (None: the defaults) and applies dotted overrides.

    Args:
        path: YAML mapping of sections.
        overrides: pairs such as `("optim.lr", "1e-4")`; values are read as YAML.

    Raises:
        UserError: unreadable file, wrong key, wrong value or impossible pair.
    """
    data: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for dotted, text in overrides:
        _override(data, dotted, text)
    return build(data, source=str(path) if path else "the command line")


def build(data: Mapping[str, Any], *, source: str = "config") -> Config:
    """A `Config` from plain data; `UserError` says in one sentence what is wrong with it."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {_sentence(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of sections ({', '.join(Config.model_fields)})")
    return data


def _override(data: dict[str, Any], dotted: str, text: str) -> None:
    section, _, key = dotted.partition(".")
    if not key or section not in Config.model_fields:
        raise UserError(
            f"--{dotted}: options are --section.key value; {nearest(section, Config.model_fields)}"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, bool) and text.lower() not in ("true", "false"):
        value = text  # YAML 1.1 reads a run named off, no or y as a truth value
    target = data.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(f"{section}: must be a mapping, not {target!r}")
    *path, last = key.split(".")
    for part in path:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"--{dotted}: {section}.{part} is {inner!r}, which has no key {last}")
        target = inner
    target[last] = value


def _sentence(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence with the dotted key."""
    first = error.errors(include_url=False)[0]
    loc = [str(part) for part in first["loc"]]
    if loc[:1] == ["method"] and len(loc) > 1 and loc[1] in METHOD_OPTIONS:
        del loc[1]  # pydantic names the union's branch
    key = ".".join(loc)
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key {key}; {nearest(loc[-1], _keys_beside(loc, error))}"
        case "union_tag_invalid":
            known = ", ".join(METHOD_OPTIONS)
            return f"method.name is {first['input'].get('name')!r}; it must be one of {known}"
        case "value_error":
            return f"{key + ': ' if key else ''}{first['ctx']['error']}"
        case _:
            return f"{key} is {_short(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys_beside(loc: Sequence[str], error: ValidationError) -> Sequence[str]:
    if len(loc) == 1:
        return list(Config.model_fields)
    if loc[0] != "method":
        return list(_section_type(loc[0]).model_fields)
    names = [str(p) for p in error.errors()[0]["loc"]]
    return list(METHOD_OPTIONS[names[1]].model_fields)


def _section_type(section: str) -> type[BaseModel]:
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """What a mistyped word may have meant, or all that is known."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe() -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, documentation) of every option, for `--help` and the docs."""
    for section in Config.model_fields:
        if section == "method":
            for name, options in METHOD_OPTIONS.items():
                yield from _describe_fields(f"method[{name}]", options)
        else:
            yield from _describe_fields(section, _section_type(section))


def _describe_fields(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    for key, info in model.model_fields.items():
        if key != "name" or prefix == "run":
            default = json.dumps(info.get_default(call_default_factory=True))
            yield f"{prefix}.{key}", _type_name(info.annotation), default, info.description or ""


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(_type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args)}]"
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def json_schema() -> dict[str, Any]:
    """JSON schema of the config, for editors and for checks."""
    return Config.model_json_schema()
