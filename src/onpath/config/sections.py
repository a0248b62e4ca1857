"""The sections of the configuration but `method`, each option with its documentation. No torch."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from onpath.config.section import LONGER, NEUTRAL, PLACE, ROUNDING, GoesWith, OneOf, Section
from onpath.data.tasks import other_split, split_name, task_of
from onpath.records import Sampling
from onpath.system import code
from onpath.system.files import place

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

DType = Literal["float32", "bfloat16", "float16"]


class Student(Section):
    model: Annotated[str, PLACE] = "gym:student"
    """Directory or hub name of a causal LM in Hugging Face format, or gym:student (with fewer habits:
    gym:student?surface=0)."""
    dtype: DType = "float32"
    """Of the weights that train. bfloat16 without LoRA loses small updates: prefer float32 with optim.bf16.
    """
    quantization: dict[str, Any] | None = None
    """Of the base's weights, as transformers' own quantisation configs: {quant_method: bitsandbytes,
    load_in_4bit: true}. Needs student.lora_rank: the adapter trains (QLoRA). Its library is yours to install.
    """
    device: str = "auto"
    """auto takes the GPU if there is one; else a torch device such as cpu or cuda:0."""
    lora_rank: int = Field(0, ge=0)
    """0 trains all weights; above 0 trains a LoRA adapter of this rank through peft."""
    lora_alpha: Annotated[float, GoesWith("lora_rank")] = Field(128.0, gt=0)
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_targets: Annotated[str | list[str], GoesWith("lora_rank")] = "all-linear"
    """Module names to adapt, or all-linear."""
    lora_dropout: Annotated[float, GoesWith("lora_rank"), GoesWith("dropout")] = Field(0.0, ge=0, lt=1)
    """Share of what an adapter reads that is dropped in the pass that trains, with student.dropout: true; not
    on head and embeddings, which are read by their weight."""
    lora_merge: Annotated[bool, NEUTRAL, GoesWith("lora_rank")] = False
    """Save the final model with the adapter merged into the weights, beside the adapter."""
    gradient_checkpointing: Annotated[bool, NEUTRAL] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dropout: bool = False
    """Let the model's own dropout, its adapter's and router noise act in the pass that trains. Off, a student
    that is its teacher has loss 0; scores and samples are always without. On, masks are drawn in each
    process, in the order of its micro-batches: another optim.micro_batch_tokens or number of processes gives
    other ones."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you ask for it by name."""


class Served(Section):
    """Servers that somebody runs (docs/engines.md). Their API key is read from ONPATH_API_KEY."""

    url: Annotated[str | list[str] | None, NEUTRAL] = None
    """Of the server, such as http://localhost:8000, or of several that serve the same model: a list, or with
    commas between them. Requests are spread over them. null: no server."""
    timeout: Annotated[float, NEUTRAL, GoesWith("url")] = Field(600.0, gt=0)
    """Seconds that one request may take."""
    patience: Annotated[float, NEUTRAL, GoesWith("url")] = Field(600.0, ge=0)
    """Seconds to wait while no server answers, down or busy, before the run stops; it can be continued."""
    concurrency: Annotated[int, NEUTRAL, GoesWith("url")] = Field(64, ge=1)
    """Requests on the way at a time, to each server."""

    @field_validator("url", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            return [part.strip() for part in value.split(",")]
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @field_validator("url")
    @classmethod
    def _each_once(cls, value: str | list[str] | None) -> str | list[str] | None:
        """A server twice in the list would be handed new weights twice, and get twice as much to do."""
        if isinstance(value, list) and not all(value):
            raise ValueError("an empty address among the servers'; separate addresses by one comma")
        if isinstance(value, list) and len({u.rstrip("/").removesuffix("/v1") for u in value}) < len(value):
            raise ValueError("one server is listed twice; name each once")
        if value == []:
            raise ValueError("an empty list of servers; null means that there is none")
        return value

    @property
    def urls(self) -> tuple[str, ...]:
        """Of the servers, as they are listed."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url or ())


class Teacher(Served):
    engine: Literal["hf", "vllm", "chat"] = "hf"
    """hf: a model in this process. vllm: a server at teacher.url, which scores, rewrites and generates
    windows; it sends the method.support_k likeliest tokens: method.support must be teacher_topk, or the
    divergence one that needs no distribution (sampled; cross_entropy). chat: any
    OpenAI-compatible chat endpoint at teacher.url, of any vocabulary, which only generates: trd, or opd with
    method.writer: teacher, and method.divergence: cross_entropy."""
    model: Annotated[str, PLACE] = "gym:teacher"
    """Directory or hub name of a causal LM with the student's vocabulary, or a bundled one (gym:teacher,
    gym:persona); with a server also the name that it serves it under; with chat nothing but that name."""
    mixture: dict[str, float] | None = None
    """Of several teachers: names of others and their weights, such as {math: 0.7, code: 0.3}. This one is the
    mixture of their probabilities, token by token; it scores and writes nothing. Nothing else is set then.
    """
    extra_body: Annotated[dict[str, Any], GoesWith("engine", "chat")] = Field({})
    """chat: further fields of every request, such as {reasoning_effort: low}; null leaves one of ours out."""
    dtype: Annotated[DType, GoesWith("engine", "hf")] = "float32"
    """Of the frozen weights."""
    quantization: dict[str, Any] | None = None
    """As student.quantization; onpath doctor measures what it changes."""
    cache: Annotated[str | None, PLACE] = None
    """Directory in which scores are kept, by a digest of weights, context and response: what comes again is
    not read again. Runs, processes and a study's arms may share it (docs/teachers.md; onpath cache). Null
    keeps none."""
    cache_dtype: Annotated[Literal["float16", "float32"], GoesWith("cache")] = "float16"
    """Of kept hidden states: 2 or 4 bytes times the teacher's hidden size a token."""
    cache_gb: Annotated[float, NEUTRAL, GoesWith("cache")] = Field(20.0, gt=0)
    """Largest size of the directory; the files used longest ago go first."""
    device: Annotated[str, GoesWith("engine", "hf")] = "auto"
    """auto takes the student's device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def teacher_option(name: str | None) -> str:
    """The option that a teacher is set by: `name` is its own, or None where it is the only one.

    >>> teacher_option(None), teacher_option("math")
    ('teacher', 'teachers.math')
    """
    return "teacher" if name is None else f"teachers.{name}"


def check_names(teachers: Mapping[str, Teacher]) -> None:
    """They become names of metrics.

    Raises:
        ValueError: one is no name.
    """
    for name in teachers:
        if not _NAME.fullmatch(name):
            raise ValueError(f"teachers: {name[:60]!r} is no name: letters, digits, . _ and - are")


class Data(Section):
    train: Annotated[str, PLACE] = Field("gym:train", min_length=1)
    """JSONL, JSON, CSV or Parquet file, `datasets` directory or name (name:split), gym:train (its worlds:
    gym:train?late=1&spoil=0.8&lost=1), pack:humaneval and other packs (docs/packs.md), or a function of
    yours, file.py:rows, that gives rows."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training prompts (a finite pool, shuffled by run.seed each epoch)."""
    eval: Annotated[dict[str, str], PLACE] = Field({"test": "gym:test"})
    """Evaluation sets: split name → source, as for data.train. Without it: the task's test split for the
    gym's training data, none for a file."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first so many problems of each evaluation set."""
    columns: dict[Literal["prompt", "messages", "answer", "tests", "solution", "id"], str] = Field({})
    """What your rows call them, such as {prompt: problem, answer: meta.final}; an evaluation set without them
    has ours. The gym's rows are ours."""
    teacher_column: str | None = None
    """Column of the training rows that names each one's teacher, with `teachers` (docs/teachers.md)."""
    skip_bad: Annotated[bool, NEUTRAL] = False
    """Skip unreadable rows, print and store how many; otherwise the first one stops the run."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """auto: the tokenizer's chat template if it has one; plain: the text itself as the tokenizer encodes it,
    with BOS where it adds one."""
    chat_template: str | None = None
    """File of a Jinja chat template, used in place of the tokenizer's and saved with the model: for base
    models, which have none."""
    system: str | None = None
    """System message put before every chat prompt that has none."""
    enable_thinking: bool | None = None
    """Passed to chat templates that know it (Qwen3); null leaves the template's default."""

    @property
    def train_columns(self) -> dict[str, str]:
        """Ours → what the training rows call it."""
        routed = {} if self.teacher_column is None else {"teacher": self.teacher_column}
        return {**dict(self.columns.items()), **routed}

    @model_validator(mode="after")
    def _template_is_used(self) -> "Data":
        if self.chat_template is not None and self.template == "plain":
            raise ValueError("chat_template is for chat prompts, but template is plain; take one of them out")
        for name in self.of_chat if self.template == "plain" else ():
            raise ValueError(f"{name} is for chat prompts, but template is plain; take one of them out")
        return self

    @property
    def of_chat(self) -> list[str]:
        """Options that are set and mean nothing to prompts of plain text."""
        given = {"system": self.system, "enable_thinking": self.enable_thinking}
        return [name for name, value in given.items() if value is not None]

    @field_validator("eval")
    @classmethod
    def _names_are_names(cls, value: dict[str, str]) -> dict[str, str]:
        """They become names of files."""
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name[:60]!r} is no name for a split: letters, digits, . _ and - are")
            if not value[name]:
                raise ValueError(f"the source of {name!r} is empty; name it, as for data.train")
        return value

    @model_validator(mode="before")
    @classmethod
    def _complete_eval(cls, value: Any) -> Any:
        rows = value.get("train") if isinstance(value, Mapping) else None
        if isinstance(rows, list | tuple) and rows and all(isinstance(row, str) for row in rows):
            raise ValueError(
                f"train is a list of {len(rows)}; it names one source, so write them into one file"
            )
        if hasattr(rows, "to_json") or isinstance(rows, list | tuple):
            written = ', with .to_json("prompts.jsonl", orient="records", lines=True)'
            raise ValueError(
                f"train is a {type(rows).__name__}, and a config names its data: pass it as "
                "onpath.train(…, train_dataset=…), or write the rows once"
                f"{written if hasattr(rows, 'to_json') else ', as JSON lines'}, and name that file"
            )
        if isinstance(value, Mapping) and isinstance(value.get("eval"), str):
            return {**value, "eval": {split_name(value["eval"]) or "eval": value["eval"]}}
        if isinstance(value, Mapping) and "eval" not in value and "train" in value:
            task = task_of(str(value["train"]))
            own = {"test": other_split(str(value["train"]), "test")} if task and "test" in task.splits else {}
            return {**value, "eval": own}
        return value


class Refresh(Section):
    """When rollouts are sampled anew; whichever comes first."""

    every: int | None = Field(None, ge=1)
    """After so many steps: the weights of the first of them generate what all of them train on."""
    overlap_below: float | None = Field(None, gt=0, lt=1)
    """Once the student has moved so far from the weights that wrote them: the mean of min(1, π/μ) over their
    tokens, which is the mass that both distributions have in common, is below this."""


NEVER = Refresh()
_ESCAPES = re.compile(r"(\\[nrt])+")


class RolloutSection(Served):
    engine: Literal["hf", "vllm"] = "hf"
    """hf: sampling from the model that trains, in process. vllm: from a vLLM that is given the new weights
    after each step, in this process, or at rollout.url."""
    vllm: Annotated[dict[str, Any], GoesWith("engine", "vllm")] = Field({})
    """Arguments of vllm.LLM for an engine in this process, such as {gpu_memory_utilization: 0.4}."""
    push: Literal["weights", "adapter", "nccl"] = "weights"
    """What a server at rollout.url is given after each step: all weights, adapters merged, over a file that
    it can read; with student.lora_rank, the adapter alone, which it must be allowed to load; nccl: all
    weights, from GPU to GPU by vLLM's own transfer, which it must be started for (docs/engines.md)."""
    prompts: int = Field(64, ge=1)
    """Prompts per optimiser step, over all processes."""
    n: int = Field(1, ge=1, le=100_000)
    """Samples per prompt."""
    temperature: float = Field(1.0, ge=0)
    """1 is the student's own distribution; on-policy objectives refuse anything else."""
    top_p: Annotated[float, GoesWith("temperature")] = Field(1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the samples are no longer on-policy."""
    top_k: Annotated[int, GoesWith("temperature")] = Field(0, ge=0)
    """0 is off; above 0 the samples are no longer on-policy."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest response; longer ones are cut and counted as unfinished."""
    stop: list[str] = Field([], max_length=100)
    """Texts that end a response, beside both models' EOS, at the token that completes one (which is kept
    whole): for base models. Of rollouts, evaluations and whatever the teacher writes; the spelling of a
    special token stands for it."""
    stop_ids: list[int] = Field([])
    """Token ids that end a response likewise."""
    overlap: bool = False
    """Sample the next batch while this one trains: rollouts are one step old (staleness 1 in the metrics). hf
    samples from a frozen copy of the student, which takes memory; a vLLM from its own weights. What is stale
    are the prefixes: the divergence at each token is the current student's."""
    refresh: Literal["always", "never"] | Refresh = "always"
    """always: each step samples its own rollouts. never: the starting weights generate all that the run
    trains on, each prompt once. {every: n}, {overlap_below: x} or both: anew by that rule. What the method
    makes of rollouts (rewrites, windows, repairs) is kept with them; the divergence is always the current
    student's (docs/teachers.md)."""
    max_staleness: Annotated[int, NEUTRAL] = Field(1, ge=0)
    """A limit: steps by which the weights that generated a rollout may be older than those that train; older
    ones stop the run. rollout.overlap draws one batch ahead, which makes them 1; rollout.refresh has its own
    rule."""
    batch_tokens: Annotated[int, ROUNDING] = Field(32_768, ge=1)
    """Tokens (sequences × longest length) that one generation batch may hold."""

    @field_validator("refresh", mode="before")
    @classmethod
    def _a_word_or_a_rule(cls, value: Any) -> Any:
        if value not in ("always", "never") and not isinstance(value, Mapping | Refresh):
            raise ValueError(
                f"refresh is {value!r}; it must be always, never, or a rule: {{every: 2}}, "
                "{overlap_below: 0.8}, or both"
            )
        return value

    @field_validator("refresh")
    @classmethod
    def _by_a_rule(cls, value: Any) -> Any:
        if value == NEVER:
            raise ValueError("give every, overlap_below or both; or the word always, or never")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty text would end every response at once")
        for text in value:
            if _ESCAPES.fullmatch(text):
                raise ValueError(
                    f"{text} is a backslash and a letter here; in double quotes YAML reads the character: "
                    f'"{text}", on the command line \'"{text}"\''
                )
        return value

    @field_validator("stop_ids")
    @classmethod
    def _ids(cls, value: list[int]) -> list[int]:
        if any(i < 0 for i in value):
            raise ValueError(f"token ids are 0 or above, not {min(value)}")
        return value

    def sampling(self, *, seed: int) -> Sampling:
        """How this stage draws tokens."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
        )


class Optim(Section):
    steps: Annotated[int, LONGER] = Field(100, ge=1, le=10**9)
    """Optimiser steps."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW. LoRA on pretrained models wants about 5e-6 to 1e-4."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; cosine and linear fall towards min_lr_ratio."""
    min_lr_ratio: Annotated[float, GoesWith("schedule", "cosine", "linear")] = Field(0.0, ge=0, le=1)
    """Share of the peak that the rate falls towards: what the step after the last one would have."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly; a run of one step has none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; norms and biases are exempt."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    micro_batch_tokens: Annotated[int, ROUNDING] = Field(16_384, ge=1)
    """Padded tokens that one forward pass may hold; gradients accumulate over micro-batches, exactly."""
    bf16: bool = False
    """bfloat16 autocast in forward and backward passes; weights and optimiser stay in student.dtype."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"must be two numbers from 0 to below 1, not {list(value)}")
        return value


class Parallel(Section):
    """How the processes that torchrun starts share the work, and the weights (docs/scale.md)."""

    shard: Annotated[Literal["none", "layer", "step"], ROUNDING] = "none"
    """none: every process has whole models. layer: it has some rows of each weight (FSDP2), and gathers a
    layer when it runs. step: it gathers the student once for each step: more memory, fewer exchanges."""
    hosts: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"], ROUNDING, GoesWith("shard", "layer", "step")
    ] = "auto"
    """Copies of the shards: auto has one on each host, so that weights are gathered inside hosts only; 1
    shards over all processes."""
    teacher: Annotated[Literal["same", "copy", "offload"], ROUNDING] = "same"
    """same: sharded like the student. copy: whole in every process. offload: likewise, and of several
    teachers one is on the device at a time; the others wait in host memory."""
    balance: Annotated[bool, ROUNDING] = True
    """Deal rollouts to the processes by length, so that none waits for another's long ones."""
    timeout: Annotated[float, NEUTRAL] = Field(600.0, gt=0)
    """Seconds that a process waits for the others before the run ends; with servers at least as long as one
    may wait for them (patience and timeout)."""


class Eval(Section):
    grader: Annotated[str, OneOf(("auto", "gym", "math", "exact", "code"), "function")] = "auto"
    """auto: the task's own checker for the gym's data, a pack's grader, code where rows bring tests, else
    math (math-verify in a process of its own). exact: the last line, stripped. code: the answer's program
    against tests, confined (docs/code.md). Or a function of yours, file.py:grade, of (text, answer) → bool.
    """
    every: Annotated[int, NEUTRAL] = Field(0, ge=0)
    """Evaluate every so many steps; 0 only at the start and the end."""
    start: Annotated[bool, NEUTRAL] = True
    """Evaluate before the first step."""
    n: int = Field(4, ge=1, le=100_000)
    """Samples per problem."""
    k: int = Field(4, ge=1)
    """pass@k; at most n."""
    temperature: float = Field(1.0, ge=0)
    """Of evaluation samples; 0 is greedy."""
    top_p: Annotated[float, GoesWith("temperature")] = Field(1.0, gt=0, le=1)
    """Of evaluation samples."""
    top_k: Annotated[int, GoesWith("temperature")] = Field(0, ge=0)
    """Of evaluation samples; 0 is off."""
    also_at: list[Annotated[float, Field(ge=0)]] = Field([])
    """Temperatures at which each evaluation set is sampled as well, as sets of their own, such as test_T0.6
    and, of one sample a problem, test_greedy. [0.6, 0] costs 1 + 1/n times as much again."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest response in evaluation; null: rollout.max_new_tokens."""
    seed: int = 1234
    """Of evaluation samples: the same for every model, so that comparisons are paired."""

    def falls_on(self, step: int) -> bool:
        """Whether `every` has an evaluation behind this step; the first is 1."""
        return self.every > 0 and step % self.every == 0

    def sampling(self) -> Sampling:
        """How evaluation draws tokens."""
        assert self.max_new_tokens is not None, "a config gives it that of the rollouts"
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )

    def at(self, temperature: float) -> Sampling:
        """The same at another temperature."""
        return replace(self.sampling(), temperature=temperature)

    @staticmethod
    def name_at(split: str, temperature: float) -> str:
        """The name of a set that is also sampled at another temperature."""
        return f"{split}_T{temperature:g}" if temperature else f"{split}_greedy"


OF_A_STEP = frozenset((
    "step", "loss", "tokens", "reverse_kl_nats", "forward_kl_nats", "student_entropy_nats",
    "teacher_entropy_nats", "importance_ratio", "importance_capped", "top_overlap", "accuracy",
    "mean_length", "finished", "tokens_behind_error", "student_tokens_generated", "tokens_written_by",
    "grad_norm", "gradient_cosine", "guidance", "guidance_grad_ratio", "teachers", "seconds", "lr",
    "policy_version", "staleness", "teacher_tokens_scored", "teacher_tokens_from_cache",
    "teacher_tokens_scored_early",
))  # fmt: skip
"""What a line of metrics.jsonl may say of its own."""
OF_A_TRAJECTORY = frozenset((
    "step", "prompt_id", "sample", "prompt", "answer", "solution", "teacher", "correct",
    "student_context", "teacher_context", "response", "response_text", "tokens", "weights", "writers",
    "origin_response", "origin_text", "origin_tokens", "origin_logprobs", "finish_reason",
    "policy_version", "edit", "kept", "reason", "detail", "reverse_kl", "forward_kl", "student_entropy",
    "teacher_entropy", "student_logp", "teacher_logp", "student_top_tokens", "student_top_logp",
    "teacher_top_tokens", "teacher_top_logp",
))  # fmt: skip
"""What a row of trajectories/ may hold of its own."""


class Reward(Section):
    """A function of your own that scores rollouts (docs/extending.md); its mean is logged."""

    name: str
    """file.py:function; its parameters say what it is given: text, answer, prompt, rollout."""
    weight: float = 1.0
    """Of this reward in the total, which is logged as reward and which methods may use."""
    at_least: float | None = None
    """Trajectories of rollouts with a smaller value are recorded, but not trained on; null trains on all."""
    weights_tokens: bool = False
    """Weigh a trajectory's tokens by its value (0 or above), scaled to mean 1 over the step."""

    @field_validator("name")
    @classmethod
    def _own(cls, value: str) -> str:
        if not code.is_own(value):
            raise ValueError(f"must name a function of yours as file.py:function, not {value}")
        return value


def labelled(rewards: Any) -> Any:
    """One reward, or a list of them, by the functions' names."""
    given = [rewards] if isinstance(rewards, Mapping) and isinstance(rewards.get("name"), str) else rewards
    if not isinstance(given, list) or not all(isinstance(r, Mapping) and "name" in r for r in given):
        return rewards
    return {str(r["name"]).rpartition(":")[2]: r for r in given}


def check_labels(rewards: Mapping[str, Reward]) -> None:
    """Looks at what rewards are called.

    Raises:
        ValueError: a label would stand in the place of something else, where values are written.
    """
    taken = {"metrics.jsonl": OF_A_STEP | {"rollout_overlap"}, "trajectories/": OF_A_TRAJECTORY}
    for label in rewards:
        where = next((file for file, names in taken.items() if label in names), None)
        if where is not None:
            raise ValueError(
                f"rewards.{label}: {where} has a {label} of its own; give the reward another label, as in "
                f"rewards: {{my_{label}: {{name: file.py:function}}}}"
            )


class Run(Section):
    name: Annotated[str, NEUTRAL] = Field("opd-gym", min_length=1)
    """The run's directory under run.dir."""
    dir: Annotated[str, NEUTRAL] = "runs"
    """Where runs are kept."""
    seed: int = 0
    """Of the data order, the rollouts and LoRA's initialisation."""
    save_every: Annotated[int, NEUTRAL] = Field(50, ge=0)
    """Write a checkpoint every so many steps (and at the end); 0 only at the end."""
    save_in_background: Annotated[bool, NEUTRAL] = True
    """Write a checkpoint while the next step runs, from a copy in host memory (of the trained weights and the
    optimiser's state); false: wait for it."""
    keep: Annotated[int, NEUTRAL] = Field(2, ge=1)
    """Checkpoints kept; older ones are removed."""
    keep_best: Annotated[str | None, NEUTRAL] = None
    """An evaluation set: the weights that did best on it (avg@n) are kept in best/, beside the final ones."""
    stop_after: Annotated[int, NEUTRAL] = Field(0, ge=0)
    """Stop after so many evaluations in a row that were no better than the best one; 0 never."""
    trajectories_every: Annotated[int, NEUTRAL] = Field(10, ge=0)
    """Store what was trained on every so many steps (and at the first and the last); 0 never."""
    trackers: Annotated[
        list[Annotated[str, OneOf(("tensorboard", "trackio", "wandb"), "class")]], NEUTRAL
    ] = Field([])
    """Also log there: tensorboard, trackio, wandb (the extra `trackers`), or a class of yours,
    file.py:Class; JSON lines are always written. wandb runs offline unless WANDB_MODE says otherwise."""
    threads: Annotated[int, ROUNDING] = Field(0, ge=0, le=4096)
    """torch's CPU threads per process; 0 leaves torch's choice."""

    @field_validator("name")
    @classmethod
    def _one_directory(cls, value: str) -> str:
        if value in (".", "..") or not value.isprintable() or "/" in value or "\\" in value:
            raise ValueError(f"{value!r} cannot name a directory; put its parents into run.dir")
        if len(value.encode()) > 200:
            raise ValueError("is too long to name a directory")
        return value

    @field_validator("dir")
    @classmethod
    def _a_place(cls, value: str) -> str:
        """Whose ~ is written out: what is made there must not be called so."""
        path = place(value)
        return str(path) if value.startswith("~") else value
