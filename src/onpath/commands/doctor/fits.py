"""What a step needs of every process's memory, calculated: which way of sharding fits where.

    peak = weights + moments + frozen models + a vLLM that does not sleep + on a CPU a checkpoint that is
           being written + max(sampling, what the teacher generates, passes and gradients, the optimiser's
           own); with rollout.overlap sampling goes on beside all others

    none    whole copies in every process
    step    whole weights while a step lasts, shards of everything else
    layer   shards of everything, each layer gathered when it runs; all of them where a model samples

Counts in, bytes out: nothing is loaded or measured. `benchmarks/memory.py` compares with measured peaks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from onpath.config.sections import RolloutSection, Student, Teacher, teacher_option
from onpath.config.whole import Config
from onpath.engines import foreign
from onpath.engines.head import unwrapped
from onpath.engines.models import model_directory
from onpath.engines.student import trainable
from onpath.losses.one_pass import workspace
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.system.text import one_line

Shard = Literal["none", "step", "layer"]
SHARDS: tuple[Shard, ...] = ("none", "step", "layer")
WHOLE: tuple[Shard, int] = ("none", 1)
"""A way to hold models, and processes that share them."""
_ASLEEP = "enable_sleep_mode: true in rollout.vllm, without rollout.overlap"
_HOLES = 0.25
"""Of an adapter's passes on a CPU, measured (benchmarks/memory.py): its temporaries lie between blocks that
are kept, and glibc puts no aligned block where one of its size was freed."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Counts of one model; widths in numbers per token."""

    parameters: int
    layers: int
    width: int
    """H, of the residual stream."""
    queries: int
    """Heads times their size."""
    keys: int
    """Heads of keys times their size: a token's keys in one layer, and its values."""
    inner: int
    """I, of the gated feed-forward layer; of experts what one token passes through."""
    vocabulary: int
    tied: bool
    """Whether the output layer is the embedding."""
    normed_queries: bool = False
    """Whether queries and keys have norms of their own (Qwen3)."""
    weight_bytes: int = 4
    """Of one weight."""
    trained: int = 0
    """Weights that train; with an adapter its own."""
    trained_bytes: int = 4
    """Of one of them: peft keeps an adapter in float32 whatever its base has."""

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the output layer."""
        return self.vocabulary * self.width

    @property
    def layer(self) -> float:
        """Weights of one layer."""
        return (self.parameters - self.table * (1 if self.tied else 2)) / max(1, self.layers)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return (self.parameters - self.trained) * self.weight_bytes + self.trained * self.trained_bytes


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a step beside the models."""

    student: Decoder
    teacher: Decoder | None
    """None: the student teaches itself, or a server does. Of several the largest."""
    more_teachers: float = 0.0
    """Bytes of the others that are on the device."""
    mixed: bool = False
    """Whether several teachers score one token (`mixture`)."""
    micro_batch_tokens: int
    """Padded tokens of one forward pass."""
    batch_tokens: int
    """Tokens of one batch of sampling in this process; 0: sampled elsewhere."""
    written_tokens: int = 0
    """Tokens of one batch that the teacher, in this process, generates for the method."""
    side_by_side: bool = False
    """Whether the student writes them with it."""
    response_tokens: int = 0
    """Of the whole step in this process, whose hidden states of the teacher, or of the student that teaches
    itself, are kept for the loss by the method that has read them."""
    half: bool = False
    """optim.bf16."""
    recompute: bool = False
    """student.gradient_checkpointing."""
    averaged: bool = False
    """Whether the teacher is a moving average of the student, which is in float32."""
    at_start: bool = False
    """Whether it is the student as it was, and no adapter can be switched off for that."""
    ahead: bool = False
    """Whether a copy of the student samples the next batch (rollout.overlap)."""
    saves: bool = False
    """Whether checkpoints are written beside the steps (run.save_every, run.save_in_background), from copies
    on the host."""
    continues: bool = False
    """Whether the teacher goes on from its scoring pass (TOPD, relay): its keys and values are kept."""
    prepares: bool = False
    """Whether the method runs models before it scores: shards are whole for that."""
    vllm: float = 0.0
    """Bytes of a vLLM in this process."""
    vllm_sleeps: bool = False
    """Whether it has them only while something is sampled."""
    device: str = "cuda"


def activations(model: Decoder, tokens: int, *, half: bool, recompute: bool, stream: int = 4) -> float:
    """Bytes that a forward pass leaves for the backward pass, the head aside.

    Counted by what autograd saves in transformers' Llama and Qwen3: inputs and normalised inputs of norms,
    inputs of products, queries, repeated keys and values, attention's output, four of the gated layer;
    float32 norms under autocast. With recomputation the residual stream at each layer, and one layer whole.

    Args:
        stream: bytes of a number of the residual stream: 4 under autocast, as the embedding's weights.
    """
    h, q, k, i = model.width, model.queries, model.keys, model.inner
    if half:
        each = 28 * h + 8 * i + 8 * q + 2 * k + (6 * (q + k) if model.normed_queries else 0)
    else:
        each = 4 * (6 * h + 4 * i + 4 * q + k + (2 * (q + k) if model.normed_queries else 0))
    kept = stream * h * model.layers + each if recompute else each * model.layers
    return float(tokens * (kept + 8 * h))  # and the last norm


def loss_bytes(step: Step) -> float:
    """The loss's own buffers, its gradient of the head, and both sides' hidden states of one micro-batch."""
    student, width = step.student, step.student.width
    buffers = workspace(
        step.device, student.vocabulary, step.micro_batch_tokens, teachers=2 if step.mixed else 1
    )
    head = 4 * student.table if student.trained >= student.table else 0
    copies = 2 * student.table if step.half and step.device == "cuda" and student.weight_bytes == 4 else 0
    theirs = 0 if step.teacher is None else step.teacher.width * step.teacher.weight_bytes
    return float(buffers + head + copies + step.micro_batch_tokens * (2 * 4 * width + theirs))


def cache_bytes(model: Decoder, tokens: int, *, half: bool, stream: int | None = None) -> float:
    """Keys and values of so many tokens in every layer.

    Args:
        half: under autocast, where values are as products leave them; what rotates keys is as the stream.
        stream: see `activations`; None: as the weights.
    """
    stream = model.weight_bytes if stream is None else stream
    return float(model.layers * model.keys * tokens * (stream + (2 if half else stream)))


def copy_bytes(step: Step, *, shards: int) -> float:
    """Copies of the student beside it. Those of a whole model share what does not train; with shards they
    share nothing, and the one that samples ahead is whole all the same.

    Args:
        shards: processes that share a sharded model; 1: it is whole.
    """
    student = step.student
    others = (student.parameters - student.trained) * student.weight_bytes if shards > 1 else 0
    frozen = student.trained * student.trained_bytes + others
    average = 4 * student.trained + others
    return (step.averaged * average + step.at_start * frozen) / shards + step.ahead * frozen


def saved_bytes(step: Step) -> float:
    """What a checkpoint is written from beside the steps, on the host: here where that is the device."""
    if not step.saves or step.device != "cpu":
        return 0.0
    trained = step.student.trained * step.student.trained_bytes
    return float(3 * trained + step.averaged * 4 * step.student.trained + step.ahead * trained)


def gathered_bytes(step: Step, *, student: bool, teacher: bool) -> float:
    """What is there of sharded weights: of a model that runs layer by layer two layers and the table.

    Args:
        student: whether all of it is; `teacher` likewise, of every one.
    """
    a = step.student
    b = a if step.averaged or step.at_start else step.teacher  # shards share nothing with a copy
    found = (a.parameters if student else 2 * a.layer + a.table) * (2 if step.half else a.weight_bytes)
    if b is not None:
        found += (b.parameters if teacher else 2 * b.layer + b.table) * b.weight_bytes
    return found + (step.more_teachers if teacher else 0.0)


def parts_of(step: Step, *, shard: Shard = "none", world: int = 1) -> dict[str, float]:
    """Bytes of each part of one process's peak, and `peak` itself.

    Args:
        shard: see the module's head.
        world: processes that share the shards.
    """
    student, teacher = step.student, step.teacher
    # No sharded gradient is whole for longer than its layer; everything else is divided as it lies.
    n = 1 if shard == "none" else world
    gathered = more = 0.0
    if shard != "none" and world > 1:
        all_step = shard == "step"
        gathered = gathered_bytes(step, student=all_step, teacher=False)
        whole = all_step or step.prepares or step.batch_tokens > 0
        more = gathered_bytes(step, student=whole, teacher=step.prepares) - gathered
    half_copies, whole_half = 0.0, 0.0
    if step.half and student.weight_bytes == 4:
        whole_half = 2.0 * student.layer * student.layers  # kept while a forward pass or generation lasts
        half_copies = whole_half if gathered == 0.0 else 0.0
    stream = 2 if gathered and step.half else student.weight_bytes
    passes = activations(
        student, step.micro_batch_tokens, half=step.half, recompute=step.recompute, stream=stream
    )
    loss = loss_bytes(step)
    writer, theirs = (student, stream) if teacher is None else (teacher, teacher.weight_bytes)
    own = 1.25 * cache_bytes(student, step.batch_tokens, half=step.half, stream=stream)
    written = 1.25 * cache_bytes(writer, step.written_tokens, half=step.half, stream=theirs)
    # A graph of the reading pass serves the loss where one micro-batch holds all, and weights stay gathered.
    past, one_graph = 0.0, n == 1 or shard == "step"
    one_graph &= 0 < step.response_tokens <= step.micro_batch_tokens
    if step.continues and teacher is not None:
        past = 2.25 * cache_bytes(teacher, step.micro_batch_tokens, half=teacher.weight_bytes == 2)
    gradients = student.trained * student.trained_bytes / n
    holes = _HOLES * (passes + loss) if step.device == "cpu" and student.trained < student.parameters else 0.0
    parts = {
        "weights": student.bytes / n,
        "moments": 2 * student.trained * student.trained_bytes / n,
        "teacher": 0.0 if teacher is None else (teacher.bytes + step.more_teachers) / n,
        "copies": copy_bytes(step, shards=n),
        "gathered": gathered,
        "kept": float(step.response_tokens * writer.width * writer.weight_bytes),
        "vllm": 0.0 if step.vllm_sleeps else step.vllm,
        "saving": saved_bytes(step) / n,
        "ahead": own + whole_half if step.ahead else 0.0,
    }
    shared = (more if step.prepares else 0.0) + half_copies
    waking = step.vllm if step.vllm_sleeps else 0.0
    phases = {
        "sampling": more + (half_copies if step.batch_tokens else 0.0) + own + waking,
        "training": gradients + half_copies + passes + loss + holes,
        "correcting": shared + past + loss + (passes if one_graph else 0.0),
        "writing": shared + written + (own if step.side_by_side else 0.0),  # of this step
        "optimiser": gradients + (gradients if step.device == "cuda" else 0.0),
    }
    return {
        **parts,
        "gradients": gradients,
        "activations": passes + half_copies + holes,
        "loss": loss,
        **{f"phase_{name}": value for name, value in phases.items()},
        "peak": sum(parts.values()) + max(phases.values()),
    }


def together(step: Step, processes: int) -> Step:
    """One process that does the work of so many, each of which does such a step."""
    return replace(step, response_tokens=step.response_tokens * processes)


def spread(step: Step, processes: int) -> Step:
    """One of so many processes that do this step together: it keeps what it has read of its own rollouts."""
    return replace(step, response_tokens=-(-step.response_tokens // processes))


def beside_vllm(step: Step, rollout: RolloutSection, room: float) -> Step:
    """The step with what a vLLM in this process takes of `room` bytes, if there is one: on a GPU the part
    that it is told, by default 0.92; on a CPU its rows of the student, and keys and values."""
    if rollout.engine != "vllm" or rollout.url is not None:
        return step
    weights = step.student.parameters * (2 if step.half or step.student.weight_bytes == 2 else 4)
    keys = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 1)) * 2**30
    share = float(rollout.vllm.get("gpu_memory_utilization", 0.92))
    rows = weights / int(rollout.vllm.get("tensor_parallel_size", 1))
    taken = share * room if step.device == "cuda" else rows + keys
    return replace(step, vllm=taken, vllm_sleeps=bool(rollout.vllm.get("enable_sleep_mode")))


def fewest_processes(step: Step, room: float, *, shard: Shard) -> int | None:
    """By doubling, so many that a peak fits into `room` bytes each; None: not with 64.

    Args:
        step: of one process that does all the work.
    """
    sizes = (2**i for i in range(7))
    return next((n for n in sizes if parts_of(spread(step, n), shard=shard, world=n)["peak"] <= room), None)


def cures(step: Step, room: float, *, processes: int = 1) -> list[str]:
    """Options each of which, alone, makes whole copies fit into `room` bytes; then shards.

    Args:
        processes: of which each does such a step now.
    """
    smaller = max(1, step.micro_batch_tokens // 4)
    adapter = replace(step.student, trained=step.student.parameters // 50, weight_bytes=2)
    served = step
    if step.teacher is not None:  # nothing is kept of a server's states
        served = replace(
            step, teacher=None, more_teachers=0.0, written_tokens=0, response_tokens=0, side_by_side=False
        )
    changed = {
        "student.gradient_checkpointing: true": replace(step, recompute=True),
        f"optim.micro_batch_tokens: {smaller}": replace(step, micro_batch_tokens=smaller),
        f"rollout.batch_tokens: {max(step.batch_tokens, step.written_tokens) // 4}": replace(
            step, batch_tokens=step.batch_tokens // 4, written_tokens=step.written_tokens // 4
        ),
        "a teacher on a server (teacher.engine: vllm)": served,
        **({"parallel.teacher: offload": replace(step, more_teachers=0.0)} if step.more_teachers else {}),
        "student.lora_rank: 64 with student.dtype: bfloat16": replace(step, student=adapter),
        **({_ASLEEP: replace(step, vllm_sleeps=True)} if step.vllm and not step.vllm_sleeps else {}),
        **({"a server that samples (rollout.url)": replace(step, vllm=0.0)} if step.vllm else {}),
    }
    found = [name for name, other in changed.items() if parts_of(other)["peak"] <= room]
    over = fewest_processes(together(step, processes), room, shard="layer")
    return [*found, *([f"the models sharded over {over} processes"] if over else [])]


def decoder_of_config(
    config: Any, *, weight_bytes: int, parameters: int, trained: int = 0, trained_bytes: int = 4
) -> Decoder:
    """The counts of a transformers config, by the names that Llama and its kin use."""
    text = config.get_text_config()
    named: dict[str, Any] = text.to_dict()
    heads = int(named.get("num_attention_heads") or 1)
    size = int(named.get("head_dim") or text.hidden_size // heads)
    groups = int(named.get("num_key_value_heads") or heads)
    experts = int(named.get("num_experts_per_tok") or 1)
    inner = named.get("moe_intermediate_size") or named.get("intermediate_size") or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    return Decoder(
        parameters=parameters,
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        queries=heads * size,
        keys=groups * size,
        inner=int(inner) * experts,
        vocabulary=int(text.vocab_size),
        tied=bool(named.get("tie_word_embeddings")),
        normed_queries=str(named.get("model_type", "")).startswith("qwen3"),
        weight_bytes=weight_bytes,
        trained=trained,
        trained_bytes=trained_bytes,
    )


def decoder_of(model: nn.Module) -> Decoder:
    """The counts of a loaded model; adapters count as its weights."""
    weights = list(model.parameters())
    trained = [p for p in weights if p.requires_grad]
    return decoder_of_config(
        unwrapped(model).config,
        weight_bytes=weights[0].element_size(),
        parameters=sum(p.numel() for p in weights),
        trained=sum(p.numel() for p in trained),
        trained_bytes=next((p.element_size() for p in trained), 4),
    )


def step_of(parts: Parts, *, response_tokens: int) -> Step:
    """Of a run that is assembled.

    Args:
        response_tokens: of a step.
    """
    models, ahead = parts.models, parts.overlap is not None and bool(parts.overlap.state())
    return _step_of(
        parts.config,
        models.student,
        models.teacher.models,
        response_tokens,
        ahead=ahead,
        device=models.device,
    )


def step_of_config(config: Config, *, device: torch.device) -> Step:
    """Of a run whose models are not loaded, from their config.json alone: a whole step of longest responses.

    Raises:
        UserError: a model's config is not here.
    """
    with torch.device("meta"):  # an adapter has no weights either
        student = trainable(config, _outline(config.student, "student.model"))
    taught = {} if config.method.self_taught else config.taught_by
    bases: dict[str, nn.Module] = {}
    for name, teacher in taught.items():
        if teacher.engine == "hf":  # several adapters of one base, and that base, share it
            key = f"{teacher_option(name)}.model"
            bases.setdefault(model_directory(teacher.model, key), _outline(teacher, key))
    others = list(bases.values())
    tokens = config.rollout.prompts * config.rollout.n * config.rollout.max_new_tokens
    return _step_of(config, student, others, tokens, ahead=config.rollout.overlap, device=device)


def _outline(section: Student | Teacher, key: str) -> nn.Module:
    """A model without its weights.

    Raises:
        UserError: it cannot be told from its config.
    """
    options = {"trust_remote_code": section.trust_remote_code}
    if section.quantization is not None:
        raise UserError(f"{key}: what quantised weights take is not calculated before they are loaded")
    try:
        told = AutoConfig.from_pretrained(model_directory(section.model, key), **options)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                told, dtype=getattr(torch, section.dtype), **options
            )
    except foreign.FAILURES as error:
        raise UserError(f"{key}: {section.model}: {one_line(str(error), 200)}") from None
    return model.requires_grad_(False)


def _step_of(
    config: Config,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    response_tokens: int,
    *,
    ahead: bool,
    device: torch.device,
) -> Step:
    method = config.method
    # A teacher that keeps its past goes on from that, which is counted there.
    here = method.self_taught or any(teacher.engine == "hf" for teacher in config.taught_by.values())
    writes = here and method.writes_in_batches
    others = [] if method.self_taught else [decoder_of(model) for model in teachers]
    largest = max(others, key=lambda model: model.bytes, default=None)
    weights = {id(p): p for model in teachers for p in model.parameters()}  # adapters share some
    more = sum(p.numel() * p.element_size() for p in weights.values()) - largest.bytes if largest else 0
    return Step(
        student=decoder_of(student),
        teacher=largest,
        more_teachers=0.0 if config.parallel.teacher == "offload" else float(more),
        mixed=bool(config.mixtures),
        micro_batch_tokens=config.optim.micro_batch_tokens,
        batch_tokens=config.rollout.batch_tokens if config.rollout.engine == "hf" else 0,
        written_tokens=config.rollout.batch_tokens if writes else 0,
        side_by_side=writes and method.side_by_side,
        response_tokens=response_tokens if here and method.keeps_states else 0,
        half=config.optim.bf16,
        recompute=config.student.gradient_checkpointing,
        averaged=method.teacher_weights == "ema",
        at_start=method.teacher_weights == "base" and not config.student.lora_rank,
        ahead=ahead,
        saves=config.run.save_every > 0 and config.run.save_in_background,
        continues=method.keeps_past,
        prepares=method.gathers_models,
        device=device.type,
    )
