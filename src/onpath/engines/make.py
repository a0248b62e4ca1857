"""Who writes and who scores, as the config says: models in this process, a vLLM, servers."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from onpath.config.build import Config
from onpath.config.methods.opsd import OPSDOptions
from onpath.config.methods.trd import TRDOptions
from onpath.data.render import Renderer
from onpath.engines.base import Engine
from onpath.engines.chat import ChatWriter
from onpath.engines.head import check_head, head_of, unwrapped
from onpath.engines.hf import HFEngine
from onpath.engines.models import context_length, load_model, locate, pick_device
from onpath.engines.replay import Cache, CachedEngine, weights_digest
from onpath.engines.served import ServedTeacher
from onpath.engines.teacher import ModelTeacher, SelfTeacher, SilentTeacher
from onpath.engines.wire import Line
from onpath.system import distributed
from onpath.system.errors import UserError

AnyTeacher = ModelTeacher | SelfTeacher | ServedTeacher | SilentTeacher
_EXACT, _HALF = 1e-3, 0.5  # nats by which a vLLM's log-probs may differ from the trainer's, by dtype


def student_engine(config: Config, student: nn.Module, own: HFEngine) -> Engine:
    """Writes the rollouts and the evaluations.

    Args:
        own: over the student itself.
    """
    section, half = config.rollout, config.optim.bf16 or config.student.dtype != "float32"
    if section.engine == "hf":
        return own
    assert own.vocabulary is not None
    if section.url is not None:
        from onpath.engines.server import ServerEngine
        from onpath.engines.wire import Server

        return ServerEngine(
            Server(section, "rollout", [config.student.model, str(locate(config.student.model))]),
            own.renderer,
            stop_ids=own.stop_ids,
            vocabulary=own.vocabulary,
            student=student,
            weights=Path(config.run.dir) / config.run.name / "weights",
            tolerance=_HALF if half else _EXACT,
        )
    if distributed.world() > 1:
        raise UserError(
            "rollout.engine: vllm in this process is for one process; for several start a server and set "
            "rollout.url"
        )
    from onpath.engines.vllm import VLLMEngine

    return VLLMEngine(
        student,
        _directory(config, student),
        own.renderer,
        stop_ids=own.stop_ids,
        vocabulary=own.vocabulary,
        room=context_length(unwrapped(student)),
        dtype="bfloat16" if half else "float32",
        tolerance=_HALF if half else _EXACT,
        options=section.vllm,
    )


def _directory(config: Config, student: nn.Module) -> str:
    """Weights that vLLM can start from: the student's directory, or a copy (of an adapter's model, say)."""
    from onpath.engines.weights import save_weights

    given = Path(locate(config.student.model))
    if not given.is_dir() or ((given / "config.json").is_file() and list(given.glob("*.safetensors"))):
        return str(given)
    copy = Path(tempfile.mkdtemp(prefix="onpath-vllm-"))
    save_weights(student, copy)
    return str(copy)


def make_teacher(
    config: Config,
    student: nn.Module,
    renderer: Renderer,
    vocabulary: int,
    stop_ids: frozenset[int],
    device: torch.device,
) -> AnyTeacher:
    """Another model, in this process or on a server, or the student itself."""
    method = config.method
    if method.self_taught:
        assert isinstance(method, OPSDOptions | TRDOptions)
        return SelfTeacher(student, weights=method.weights, decay=method.ema_decay, vocabulary=vocabulary)
    if config.teacher.engine == "chat":
        return SilentTeacher()
    if config.teacher.engine == "vllm":
        from onpath.engines.server import ServerEngine
        from onpath.engines.wire import Server

        names = [config.teacher.model, str(locate(config.teacher.model))]
        server = Server(config.teacher, "teacher", names)
        engine = ServerEngine(server, renderer, stop_ids=stop_ids, vocabulary=vocabulary)
        return ServedTeacher(engine, k=min(method.support_k, vocabulary))
    where = pick_device(config.teacher.device, "teacher.device", otherwise=device)
    model = load_model(config.teacher, "teacher.model", where)
    rows = head_of(model).vocabulary
    if rows < vocabulary:
        raise UserError(
            f"teacher.model gives logits for {rows} ids only, but the student for {vocabulary}; resize its "
            "embeddings"
        )
    return ModelTeacher(model, vocabulary=vocabulary)


def make_writer(
    config: Config,
    teacher: AnyTeacher,
    renderer: Renderer,
    stop_ids: frozenset[int],
    engine_over: Callable[[nn.Module], HFEngine],
) -> Engine | ChatWriter:
    """Writes in the teacher's name."""
    if isinstance(teacher, ServedTeacher):
        return teacher.engine
    if isinstance(teacher, SilentTeacher):
        section, line = config.teacher, Line(config.teacher, "teacher")
        return ChatWriter(line, section.model, renderer, stop_ids=stop_ids, extra=section.extra_body)
    return engine_over(teacher.model)


def room_of(teacher: AnyTeacher, student: nn.Module) -> int:
    """Most tokens, prompt and response, that the teacher takes. What a black box takes only it knows."""
    if isinstance(teacher, SilentTeacher):
        return sys.maxsize
    if isinstance(teacher, ServedTeacher):
        return teacher.engine.server.room or context_length(unwrapped(student))
    return context_length(unwrapped(teacher.model))


def check_teacher(config: Config, teacher: AnyTeacher, longest: int) -> None:
    """It must be able to read what the student reads and writes."""
    if isinstance(teacher, SelfTeacher | SilentTeacher):
        return
    if isinstance(teacher, ModelTeacher):
        check_head(teacher.model, "teacher.model")
        room: int | None = context_length(unwrapped(teacher.model))
        needed = longest + config.rollout.max_new_tokens
    else:
        room = teacher.engine.server.room
        needed = longest + config.rollout.max_new_tokens + 1  # a server writes a token after what it scores
    if room is not None and needed > room:
        raise UserError(
            f"teacher.model: its context of {room} tokens is too short for prompts of up to {longest} and "
            f"{config.rollout.max_new_tokens} new ones; lower rollout.max_new_tokens or drop long prompts"
        )


def offline_cache(
    config: Config,
    sampler: Engine,
    writer: Engine | ChatWriter,
    student: nn.Module,
    renderer: Renderer,
) -> tuple[Cache | None, Engine, Engine | ChatWriter]:
    """The cache, the sampler and the writer: caching ones where the starting weights write everything."""
    if not (isinstance(config.method, TRDOptions) and config.method.offline):
        return None, sampler, writer
    cache = Cache(Path(config.run.dir) / config.run.name / "cache")

    def caching(engine: Engine, weights: str) -> Engine:
        return CachedEngine(engine, cache, weights=weights, renderer=renderer)

    sampler = caching(sampler, weights_digest(student))
    if isinstance(writer, ChatWriter):
        writer.cache = cache
        return cache, sampler, writer
    theirs = (
        weights_digest(writer.model)
        if isinstance(writer, HFEngine)
        else f"{config.teacher.url}/{config.teacher.model}"
    )
    return cache, sampler, caching(writer, theirs)
