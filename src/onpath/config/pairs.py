"""The pairs of options that cannot be together. No torch.

Raises everywhere ValueError: one sentence that names the keys and says what would be right.
"""

from typing import Any

from onpath.config.methods.base import check_answers, check_with
from onpath.config.sections import Student, Teacher, check_labels, teacher_option
from onpath.config.several import check_several
from onpath.data.tasks import brings, misread, task_of
from onpath.system import code


def check_pairs(config: Any) -> None:
    """Looks at the whole config (`onpath.config.Config`) for what cannot go together."""
    if code.is_own(config.method.name):
        check_answers(config.method)
    try:
        config.method.objective()
    except ValueError as error:
        raise ValueError(f"method: {error}") from None
    _evaluable(config)
    if config.method.on_policy and not config.rollout.sampling(seed=0).untruncated:
        raise ValueError(
            f"method.name {config.method.name} assumes untruncated samples of the student: "
            f"rollout.temperature must be 1, "
            f"rollout.top_p 1 and rollout.top_k 0, not {config.rollout.temperature:g}, "
            f"{config.rollout.top_p:g} and {config.rollout.top_k}"
        )
    if config.student.dtype == "float16" and not config.student.lora_rank:
        raise ValueError(
            "student.dtype float16 cannot train: small updates round to nothing and gradients overflow; "
            "use float32 with optim.bf16, or LoRA (student.lora_rank)"
        )
    check_labels(config.rewards)
    check_several(config)
    for name, teacher in config.taught_by.items():
        _reachable(config, teacher, teacher_option(name))
    _shardable(config)
    _overlappable(config)
    _writable(config)
    _refreshable(config)
    _quantisable(config)
    if config.method.importance != "none" and config.method.ppo_clip is not None:
        raise ValueError(
            f"method.importance: {config.method.importance} and method.ppo_clip both weigh tokens by the "
            "ratio of the two policies; take one of them out"
        )
    check_with(config.method, config)
    _of_one_language(config)
    _cachable(config, loses=_loses(config))


def _evaluable(config: Any) -> None:
    if config.eval.k > config.eval.n:
        raise ValueError(
            f"eval.k is {config.eval.k}, but eval.n gives only {config.eval.n} samples per problem; raise "
            f"eval.n or lower eval.k"
        )
    best, splits = config.run.keep_best, ", ".join(config.data.eval) or "there are none"
    if best is not None and best not in config.data.eval:
        raise ValueError(f"run.keep_best is {best!r}; it must be a set of data.eval: {splits}")
    if config.run.stop_after and not (best and config.eval.every):
        raise ValueError(
            "run.stop_after compares evaluations: set run.keep_best to one of data.eval, and eval.every"
        )
    also = [config.eval.name_at(split, t) for split in config.data.eval for t in config.eval.also_at]
    names = [*config.data.eval, *also]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"two evaluations would be called {twice}, of data.eval and eval.also_at: name the set "
            "otherwise, or leave a temperature out"
        )
    for source in (config.data.train, *config.data.eval.values()):
        if why := misread(config.eval.grader, source):
            raise ValueError(why)


def _takes_for_own(method: Any) -> bool:
    """Whether the gradient is one of tokens that the weights that train have drawn, and nothing corrects for
    older ones."""
    return method.divergence == "sampled" and method.ppo_clip is None and method.importance == "none"


def _overlappable(config: Any) -> None:
    if not config.rollout.overlap:
        return
    if _takes_for_own(config.method):
        raise ValueError(
            "rollout.overlap: method.divergence sampled takes rollouts for samples of the weights that "
            "train; set method.ppo_clip or method.importance, which correct for older ones, or "
            "rollout.overlap: false"
        )
    if config.rollout.max_staleness < 1:
        raise ValueError("rollout.overlap makes rollouts one step old; set rollout.max_staleness: 1, not 0")
    if config.rollout.vllm.get("tensor_parallel_size", 1) != 1:
        raise ValueError(
            "rollout.overlap has every process ask its vLLM when it likes, and tensor_parallel_size in "
            "rollout.vllm has several share one; drop either, or start a server (rollout.url)"
        )
    if config.rollout.vllm.get("enable_sleep_mode"):
        raise ValueError(
            "rollout.overlap has vLLM sample while the student trains, so it cannot sleep; drop "
            "enable_sleep_mode from rollout.vllm, or rollout.overlap"
        )


def _writable(config: Any) -> None:
    """What goes together with a method that writes the rollouts."""
    if not config.method.writes_rollouts:
        return
    who = f"method.name {config.method.name} writes the rollouts of each step itself"
    other = "take a method that does not (relay: from_start: false; opd: writer: student)"
    task = task_of(config.data.train)
    mine = not config.method.takes_rollouts  # of the student: refresh keeps them, and a world spoils them
    if config.rollout.overlap or (config.refresh is not None and mine):
        key = "rollout.overlap" if config.rollout.overlap else "rollout.refresh"
        raise ValueError(f"{who}, and {key} has the student's own of other steps; leave it out, or {other}")
    if config.refresh is not None and config.refresh.overlap_below is not None:
        raise ValueError(
            f"{who}, and rollout.refresh.overlap_below compares the student with what it wrote; use every or "
            "never"
        )
    if mine and task is not None and task.world is not None and task.world.spoils:
        raise ValueError(
            f"{who}, and {config.data.train} puts errors into the student's own rollouts; use data without "
            f"spoil, or {other}"
        )


def _of_one_language(config: Any) -> None:
    """A task's models go with its data."""
    task = task_of(config.data.train)
    models: dict[str, Student | Teacher] = {"student": config.student}
    if not config.method.self_taught:
        models |= {teacher_option(name): teacher for name, teacher in config.taught_by.items()}
    for key, section in models.items():
        other = task_of(section.model)
        if task is not None and other is not None and other.name != task.name:
            role = "student" if key == "student" else "teacher"
            remedy = (
                f"{task.name}:{role}"
                if brings(task, role)
                else f"one that does ({task.name} brings no {role})"
            )
            raise ValueError(
                f"{key}.model is {section.model}, which does not know the language of data.train, "
                f"{config.data.train}: use {remedy}"
            )


def _loses(config: Any) -> bool:
    """Whether the teacher is lost behind errors, which not every one can be."""
    task = task_of(config.data.train)
    loses = task is not None and task.world is not None and task.world.loses
    if loses and (config.method.self_taught or config.teachers or config.teacher.engine != "hf"):
        raise ValueError(
            f"data.train: {config.data.train}: lost is about a teacher model in this process; leave lost "
            "out, or take a method and a teacher.engine with one"
        )
    if loses and config.parallel.shard != "none":
        raise ValueError(
            f"data.train: {config.data.train}: lost needs whole models; set parallel.shard: none, or leave "
            "lost out"
        )
    return loses


def _cachable(config: Any, *, loses: bool) -> None:
    """Whose scores can be kept."""
    weights = config.method.teacher_weights
    if all(t.cache is None for t in config.taught_by.values()):
        return
    if weights in ("live", "ema"):
        raise ValueError(
            f"teacher.cache keeps the scores of weights that stand still, and this teacher's are "
            f"{weights}; leave it out, or use base"
        )
    if config.teacher.engine == "chat":
        raise ValueError("teacher.cache keeps scores, and teacher.engine: chat gives none; leave it out")
    if loses:
        raise ValueError(
            f"data.train: {config.data.train}: what a teacher that is lost scores is not kept; leave "
            "teacher.cache or lost out"
        )


def _quantisable(config: Any) -> None:
    """What goes together with weights that only their own kernels read."""
    student = config.student
    quantised = {teacher_option(n): t for n, t in config.taught_by.items() if t.quantization is not None}
    if student.quantization is None and not quantised:
        return
    key = "student" if student.quantization is not None else next(iter(quantised))
    if config.parallel.shard != "none":
        raise ValueError(f"{key}.quantization: such weights are not sharded; set parallel.shard: none")
    if quantised and (config.method.self_taught or any(t.engine != "hf" for t in quantised.values())):
        raise ValueError(
            f"{next(iter(quantised))}.quantization is of a teacher model in this process; here it is "
            + ("the student: use student.quantization" if config.method.self_taught else "on a server")
        )
    if student.quantization is None:
        return
    if not student.lora_rank:
        raise ValueError(
            "student.quantization: such weights do not train; set student.lora_rank: the adapter does"
        )
    if student.lora_merge:
        raise ValueError(
            "student.lora_merge would round the adapter to quantised weights; leave it out: onpath "
            "export merges it into the base as it is"
        )
    if config.method.teacher_weights == "ema" or config.rollout.overlap or config.rollout.engine != "hf":
        raise ValueError(
            "student.quantization needs the student's own weights for everything: not weights: ema, not "
            "rollout.overlap, and rollout.engine: hf"
        )


def _refreshable(config: Any) -> None:
    """What goes together with rollouts that are older than the weights that train."""
    rule, method, rollout = config.refresh, config.method, config.rollout
    if rule is None:
        return
    key = "method.offline" if rollout.refresh == "always" else "rollout.refresh"
    if method.generates_ahead and rollout.refresh not in ("always", "never"):
        raise ValueError("method.offline is rollout.refresh: never; take one of them out")
    if rollout.overlap:
        raise ValueError(
            f"rollout.overlap samples the next step's rollouts, and with {key} they are there already; "
            "set rollout.overlap: false"
        )
    if _takes_for_own(method):
        raise ValueError(
            f"{key}: method.divergence sampled takes rollouts for samples of the weights that train; set "
            "method.ppo_clip or method.importance, which correct for older ones, or rollout.refresh: always"
        )
    if rule.overlap_below is not None and not rollout.sampling(seed=0).untruncated:
        raise ValueError(
            "rollout.refresh.overlap_below compares the student with what it was at temperature 1, and "
            "rollouts are drawn otherwise; set rollout.temperature 1, top_p 1 and top_k 0, or use every"
        )


def _shardable(config: Any) -> None:
    """What goes together with weights that no process has whole."""
    if config.parallel.shard == "none":
        return
    for name, teacher in config.taught_by.items():
        apart = teacher.device not in ("auto", config.student.device)
        if apart and teacher.engine == "hf" and not config.method.self_taught:
            raise ValueError(
                f"{teacher_option(name)}.device is {teacher.device}: with parallel.shard the teacher is "
                "where its process's student is; leave it at auto"
            )
    if config.student.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"student.device is {config.student.device}: with parallel.shard each process takes the GPU "
            "that torchrun gives it; leave it at auto"
        )


def _reachable(config: Any, teacher: Teacher, key: str) -> None:
    """What can be asked of a server."""
    method = config.method
    if config.rollout.url is not None and config.rollout.engine != "vllm":
        raise ValueError("rollout.url is that of a vLLM server: set rollout.engine: vllm")
    if config.rollout.push == "adapter" and (config.rollout.url is None or not config.student.lora_rank):
        raise ValueError(
            "rollout.push: adapter gives a server the student's adapter: set rollout.url and "
            "student.lora_rank, or leave it at weights"
        )
    if config.rollout.push == "nccl" and config.rollout.url is None:
        raise ValueError(
            "rollout.push: nccl sends weights to servers: set rollout.url, or leave it at weights"
        )
    if teacher.engine == "hf":
        if teacher.url is not None:
            raise ValueError(f"{key}.url is that of a server: set {key}.engine: vllm, or chat for text only")
        return
    if teacher.url is None:
        raise ValueError(
            f"{key}.engine: {teacher.engine} is a server: set {key}.url, such as http://localhost:8000"
        )
    if method.self_taught:
        raise ValueError(
            f"{key}.engine: {teacher.engine}: with method.name {method.name} the student is its own "
            f"teacher; use {key}.engine: hf"
        )
    _learns_from_text(config) if teacher.engine == "chat" else _learns_from_top_k(config, key)


def _learns_from_top_k(config: Any, key: str) -> None:
    method = config.method
    if method.ends == "one":
        raise ValueError(
            f"{key}.engine: vllm: a server sends its likeliest tokens only, so the probability of all "
            "ends together is not known; use method.ends: apart"
        )
    needs_all = method.objective().needs_teacher and method.divergence != "sampled"
    if method.teacher_temperature != 1:
        raise ValueError(
            f"method.teacher_temperature needs the teacher's whole vocabulary, and {key}.engine: vllm "
            f"sends its likeliest tokens only; set it to 1, or use {key}.engine: hf"
        )
    if needs_all and method.support != "teacher_topk":
        raise ValueError(
            f"{key}.engine: vllm: a server sends its likeliest tokens only, not the vocabulary; set "
            f"method.support: teacher_topk and method.tail: bucket, not method.support: {method.support}"
        )


def _learns_from_text(config: Any) -> None:
    method = config.method
    if not method.learns_from_text or method.divergence != "cross_entropy":
        raise ValueError(
            "teacher.engine: chat gives text and no log-probs: use method.name trd, or opd with "
            "method.writer: teacher, and method.divergence: cross_entropy"
        )
    if method.reweight in ("teacher_entropy", "divergence"):
        raise ValueError(
            f"method.reweight: {method.reweight} needs the teacher's log-probs, and teacher.engine: chat "
            "gives none; use none or student_entropy"
        )
