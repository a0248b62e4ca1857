"""The whole configuration, and the pairs of options that cannot be together. No torch."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from onpath.config.methods import MethodOptions, SomeMethod
from onpath.config.methods.base import check_answers, check_with
from onpath.config.methods.opd import OPDOptions
from onpath.config.section import Section
from onpath.config.sections import (
    NEVER,
    Data,
    Eval,
    Optim,
    Parallel,
    Refresh,
    Reward,
    RolloutSection,
    Run,
    Student,
    Teacher,
    check_labels,
    labelled,
)
from onpath.config.several import check_several
from onpath.data.tasks import brings, task_of
from onpath.records import Sampling
from onpath.system import code
from onpath.system.text import short, yaml_text

LABELLED: dict[str, type[Section]] = {"rewards": Reward, "teachers": Teacher}
"""Sections that hold several of a kind, by names of the user's."""

ROLLOUTS, EVALUATIONS = "rollout.max_new_tokens", "eval.max_new_tokens"
_OF_A_MODEL = ("model", "dtype", "device", "trust_remote_code")
"""Options of a teacher that is another model."""
_SPARE = 60.0
"""Seconds beyond a server's last answer, in which its sentence reaches every process."""


class Evaluation(NamedTuple):
    """One set of problems, sampled in one way."""

    split: str
    """Of data.eval."""
    sampling: Sampling
    n: int
    k: int


class Config(Section):
    """Everything that a run depends on."""

    student: Student = Student()
    teacher: Teacher = Teacher()
    teachers: dict[str, Teacher] = Field({})
    """Several teachers, by name: in place of `teacher`, the same options each. `data.teacher_column` says
    which one teaches a row; the one called default has the rows that name none."""
    data: Data = Data()
    method: SomeMethod = OPDOptions()
    rollout: RolloutSection = RolloutSection()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    eval: Eval = Eval()
    rewards: dict[str, Reward] = Field({})
    """Functions of your own that score rollouts: label → reward. One reward, or a list of them, will do: the
    function's name is its label."""
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`method: {divergence: …}` without a name means opd; rewards need no labels."""
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        method = value.get("method", {})
        if not isinstance(method, Mapping | MethodOptions):
            raise ValueError(f"method is {short(method)}; it must be a mapping such as {{name: opd}}")
        if isinstance(method, Mapping) and "name" not in method:
            value["method"] = {"name": "opd", **method}
        if "rewards" in value:
            value["rewards"] = labelled(value["rewards"])
        rollout, asked = value.get("rollout") or {}, value.get("eval") or {}
        if (
            isinstance(rollout, Mapping)
            and isinstance(asked, Mapping)
            and asked.get("max_new_tokens") is None
        ):
            longest = rollout.get("max_new_tokens", RolloutSection().max_new_tokens)
            value["eval"] = {**asked, "max_new_tokens": longest}
        return value

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        if code.is_own(self.method.name):
            check_answers(self.method)
        try:
            self.method.objective()
        except ValueError as error:
            raise ValueError(f"method: {error}") from None
        self._evaluable()
        if self.method.on_policy and not self.rollout.sampling(seed=0).untruncated:
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
        check_labels(self.rewards)
        check_several(self)
        for name, teacher in self.taught_by.items():
            self._reachable(teacher, teacher_key(name))
        self._shardable()
        self._overlappable()
        self._writable()
        self._refreshable()
        self._quantisable()
        if self.method.importance != "none" and self.method.ppo_clip is not None:
            raise ValueError(
                f"method.importance: {self.method.importance} and method.ppo_clip both weigh tokens by the "
                "ratio of the two policies; take one of them out"
            )
        check_with(self.method, self)
        self._of_one_language()
        self._cachable(loses=self._loses())
        return self

    def _evaluable(self) -> None:
        if self.eval.k > self.eval.n:
            raise ValueError(
                f"eval.k is {self.eval.k}, but eval.n gives only {self.eval.n} samples per problem; raise "
                f"eval.n or lower eval.k"
            )
        also_at = self.eval.also_at
        best, splits = self.run.keep_best, ", ".join(self.data.eval) or "there are none"
        if best is not None and best not in self.data.eval:
            raise ValueError(f"run.keep_best is {best!r}; it must be a set of data.eval: {splits}")
        if self.run.stop_after and not (best and self.eval.every):
            raise ValueError(
                "run.stop_after compares evaluations: set run.keep_best to one of data.eval, and eval.every"
            )

        names = [name for split in self.data.eval for name in (split, *map(partial(_also, split), also_at))]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"two evaluations would be called {twice}, of data.eval and eval.also_at: name the set "
                "otherwise, or leave a temperature out"
            )

    def _overlappable(self) -> None:
        if not self.rollout.overlap:
            return
        if self.method.divergence == "sampled" and self.method.ppo_clip is None:
            raise ValueError(
                "rollout.overlap: method.divergence sampled takes rollouts for samples of the weights that "
                "train; set method.ppo_clip, which corrects for older ones, or rollout.overlap: false"
            )
        if self.rollout.max_staleness < 1:
            raise ValueError(
                "rollout.overlap makes rollouts one step old; set rollout.max_staleness: 1, not 0"
            )
        if self.rollout.vllm.get("enable_sleep_mode"):
            raise ValueError(
                "rollout.overlap has vLLM sample while the student trains, so it cannot sleep; drop "
                "enable_sleep_mode from rollout.vllm, or rollout.overlap"
            )

    def _writable(self) -> None:
        """What goes together with a method that writes the rollouts."""
        if not self.method.writes_rollouts:
            return
        who = f"method.name {self.method.name} writes the rollouts of each step itself"
        other = "take a method that does not (relay: from_start: false)"
        task = task_of(self.data.train)
        if self.rollout.overlap or self.refresh is not None:
            key = "rollout.overlap" if self.rollout.overlap else "rollout.refresh"
            raise ValueError(
                f"{who}, and {key} has the student's own of other steps; leave it out, or {other}"
            )
        if task is not None and task.world is not None and task.world.spoils:
            raise ValueError(
                f"{who}, and {self.data.train} puts errors into the student's own rollouts; use data without "
                f"spoil, or {other}"
            )

    def _of_one_language(self) -> None:
        """A task's models go with its data."""
        task = task_of(self.data.train)
        models: dict[str, Student | Teacher] = {"student": self.student}
        if not self.method.self_taught:
            models |= {teacher_key(name): teacher for name, teacher in self.taught_by.items()}
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
                    f"{self.data.train}: use {remedy}"
                )

    def _loses(self) -> bool:
        """Whether the teacher is lost behind errors, which not every one can be."""
        task = task_of(self.data.train)
        loses = task is not None and task.world is not None and task.world.loses
        if loses and (self.method.self_taught or self.teachers or self.teacher.engine != "hf"):
            raise ValueError(
                f"data.train: {self.data.train}: lost is about a teacher model in this process; leave lost "
                "out, or take a method and a teacher.engine with one"
            )
        if loses and self.parallel.shard != "none":
            raise ValueError(
                f"data.train: {self.data.train}: lost needs whole models; set parallel.shard: none, or leave "
                "lost out"
            )
        return loses

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Everything that an evaluation samples: each set as eval.temperature says, and also_at others."""
        section, found = self.eval, {}
        for split in self.data.eval:
            found[split] = Evaluation(split, section.sampling(), section.n, section.k)
            for t in section.also_at:
                n = section.n if t else 1
                found[_also(split, t)] = Evaluation(split, section.at(t), n, min(section.k, n))
        return found

    @property
    def taught_by(self) -> dict[str | None, Teacher]:
        """Of each teacher that is another model the name that prompts call it by, and its section."""
        models = {name: teacher for name, teacher in self.teachers.items() if teacher.mixture is None}
        return dict(models.items()) if self.teachers else {None: self.teacher}

    @property
    def longest_wait(self) -> float:
        """Seconds that the processes wait for each other: at least as long as one of them may wait for a
        server, and for its last answer."""
        servers = [s for s in (self.rollout, *self.taught_by.values()) if s.url is not None]
        return max([self.parallel.timeout, *(s.patience + s.timeout + _SPARE for s in servers)])

    @property
    def longest_response(self) -> tuple[int, str]:
        """Most tokens behind a prompt, a window that begins before a response's last token included; and the
        options that say so."""
        most, (window, option) = self.rollout.max_new_tokens, self.method.longest_window
        if window < 2:
            return most, ROLLOUTS
        return most + window - 1, f"rollout.max_new_tokens or {option}"

    @property
    def longest_generated(self) -> tuple[int, str]:
        """Most tokens behind a training prompt, what the method asks for beside the rollout included; and the
        options that say so."""
        return max(self.longest_response, self.method.longest_generated, key=lambda limit: limit[0])

    @property
    def generated(self) -> dict[str, int]:
        """Option → most tokens that the student's engine generates behind a prompt."""
        evaluated = {EVALUATIONS: self.eval.sampling().max_new_tokens} if self.evaluations else {}
        return {ROLLOUTS: self.rollout.max_new_tokens, **evaluated}

    def too_long(self, longest: Mapping[str, int], room: int | None) -> tuple[str, int, int] | None:
        """The option, the prompt's tokens and the new ones that together do not fit an engine; None: all do.

        Args:
            longest: option, see `generated` → tokens of the longest prompt that it is for.
            room: tokens that the engine takes, prompt and response; None: nobody knows.
        """
        sizes = ((option, prompt, self.generated[option]) for option, prompt in longest.items())
        return next((size for size in sizes if room is not None and size[1] + size[2] > room), None)

    @property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """Of each teacher that is a mixture of others its name, and their weights."""
        return {
            name: teacher.mixture for name, teacher in self.teachers.items() if teacher.mixture is not None
        }

    @property
    def sharing_ids(self) -> dict[str | None, Teacher]:
        """Those of `taught_by` that read the student's ids: their vocabulary must be the student's."""
        shares = not self.method.self_taught
        return {name: t for name, t in self.taught_by.items() if shares and t.engine != "chat"}

    def _cachable(self, *, loses: bool) -> None:
        """Whose scores can be kept."""
        weights = self.method.teacher_weights
        if all(t.cache is None for t in self.taught_by.values()):
            return
        if weights in ("live", "ema"):
            raise ValueError(
                f"teacher.cache keeps the scores of weights that stand still, and this teacher's are "
                f"{weights}; leave it out, or use base"
            )
        if self.teacher.engine == "chat":
            raise ValueError("teacher.cache keeps scores, and teacher.engine: chat gives none; leave it out")
        if loses:
            raise ValueError(
                f"data.train: {self.data.train}: what a teacher that is lost scores is not kept; leave "
                "teacher.cache or lost out"
            )

    def _quantisable(self) -> None:
        """What goes together with weights that only their own kernels read."""
        student = self.student
        quantised = {teacher_key(n): t for n, t in self.taught_by.items() if t.quantization is not None}
        if student.quantization is None and not quantised:
            return
        key = "student" if student.quantization is not None else next(iter(quantised))
        if self.parallel.shard != "none":
            raise ValueError(f"{key}.quantization: such weights are not sharded; set parallel.shard: none")
        if quantised and (self.method.self_taught or any(t.engine != "hf" for t in quantised.values())):
            raise ValueError(
                f"{next(iter(quantised))}.quantization is of a teacher model in this process; here it is "
                + ("the student: use student.quantization" if self.method.self_taught else "on a server")
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
        if self.method.teacher_weights == "ema" or self.rollout.overlap or self.rollout.engine != "hf":
            raise ValueError(
                "student.quantization needs the student's own weights for everything: not weights: ema, not "
                "rollout.overlap, and rollout.engine: hf"
            )

    @property
    def idle_options(self) -> dict[str, str]:
        """Options that are set and have no effect beside the others: key → what it goes with."""
        sections: dict[str, Section] = {
            name: value
            for name in type(self).model_fields
            if isinstance(value := getattr(self, name), Section)
        }
        sections |= {teacher_key(name): teacher for name, teacher in self.taught_by.items()}
        found = {f"{s}.{o}": f"{s}.{n}" for s, section in sections.items() for o, n in section.idle.items()}
        if any(t.engine == "vllm" for t in self.taught_by.values()):
            found.pop("method.support_k", None)  # servers are asked for so many tokens, whatever is compared
        if self.teacher.engine == "chat":
            found.pop("method.best_of", None)  # whose greedy answers may differ
        if any(self.eval.also_at):
            found = {key: needs for key, needs in found.items() if key not in ("eval.top_p", "eval.top_k")}
        if self.method.importance != "none" and not self.method.trains_on_own_tokens:
            found["method.importance"] = "tokens that the student drew, and none are trained on"
        if self.method.self_taught:
            needs = (
                f"another model as the teacher: with method.name {self.method.name} the student is its own"
            )
            found |= {f"teacher.{name}": needs for name in _changed(self.teacher, _OF_A_MODEL)}
        if self.rollout.vllm and self.rollout.url is not None:
            found["rollout.vllm"] = "a vLLM in this process, and rollout.url is that of a server"
        if not self._generates_here and _changed(self.rollout, ["batch_tokens"]):
            found["rollout.batch_tokens"] = "generation by models in this process"
        if self.parallel.teacher == "copy" and self.parallel.shard == "none":
            found["parallel.teacher"] = "parallel.shard: layer or step"
        return found

    @property
    def idle_alone(self) -> list[str]:
        """Options of `parallel` that are set and have no effect in one process, beside `idle_options`."""
        other = [f"parallel.{name}" for name in _changed(self.parallel, ["shard", "hosts", "balance"])]
        copies = ["parallel.teacher"] * (self.parallel.teacher == "copy")
        return [key for key in (*other, *copies) if key not in self.idle_options]

    @property
    def _generates_here(self) -> bool:
        """Whether a model in this process may generate: the student, or a teacher that writes."""
        own = code.is_own(self.method.name)  # which may have it write without saying so
        writes = own or self.method.teacher_writes or bool(self.method.asks_teachers)
        here = self.method.self_taught or any(t.engine == "hf" for t in self.taught_by.values())
        return self.rollout.engine == "hf" or (writes and here)

    @property
    def refresh(self) -> Refresh | None:
        """When rollouts are sampled anew; None: at each step."""
        if self.method.generates_ahead or self.rollout.refresh == "never":
            return NEVER
        return None if self.rollout.refresh == "always" else self.rollout.refresh

    def _refreshable(self) -> None:
        """What goes together with rollouts that are older than the weights that train."""
        rule, method, rollout = self.refresh, self.method, self.rollout
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
        if method.divergence == "sampled" and method.ppo_clip is None:
            raise ValueError(
                f"{key}: method.divergence sampled takes rollouts for samples of the weights that train; set "
                "method.ppo_clip, which corrects for older ones, or rollout.refresh: always"
            )
        if rule.overlap_below is not None and not rollout.sampling(seed=0).untruncated:
            raise ValueError(
                "rollout.refresh.overlap_below compares the student with what it was at temperature 1, and "
                "rollouts are drawn otherwise; set rollout.temperature 1, top_p 1 and top_k 0, or use every"
            )

    def _shardable(self) -> None:
        """What goes together with weights that no process has whole."""
        if self.parallel.shard == "none":
            return
        for name, teacher in self.taught_by.items():
            apart = teacher.device not in ("auto", self.student.device)
            if apart and teacher.engine == "hf" and not self.method.self_taught:
                raise ValueError(
                    f"{teacher_key(name)}.device is {teacher.device}: with parallel.shard the teacher is "
                    "where its process's student is; leave it at auto"
                )
        if self.student.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"student.device is {self.student.device}: with parallel.shard each process takes the GPU "
                "that torchrun gives it; leave it at auto"
            )

    def _reachable(self, teacher: Teacher, key: str) -> None:
        """What can be asked of a server."""
        method = self.method
        if self.rollout.url is not None and self.rollout.engine != "vllm":
            raise ValueError("rollout.url is that of a vLLM server: set rollout.engine: vllm")
        if self.rollout.push == "adapter" and (self.rollout.url is None or not self.student.lora_rank):
            raise ValueError(
                "rollout.push: adapter gives a server the student's adapter: set rollout.url and "
                "student.lora_rank, or leave it at weights"
            )
        if self.rollout.push == "nccl" and self.rollout.url is None:
            raise ValueError(
                "rollout.push: nccl sends weights to servers: set rollout.url, or leave it at weights"
            )
        if teacher.engine == "hf":
            if teacher.url is not None:
                raise ValueError(
                    f"{key}.url is that of a server: set {key}.engine: vllm, or chat for text only"
                )
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
        self._learns_from_text() if teacher.engine == "chat" else self._learns_from_top_k(key)

    def _learns_from_top_k(self, key: str) -> None:
        method = self.method
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

    def _learns_from_text(self) -> None:
        method = self.method
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

    def to_yaml(self) -> str:
        return yaml_text(self.model_dump(mode="json"))


def _changed(section: Section, names: Iterable[str]) -> list[str]:
    """Those of its options that are other than by default."""
    plain = type(section)()
    return [name for name in names if getattr(section, name) != getattr(plain, name)]


def _also(split: str, temperature: float) -> str:
    """The name of a set that is also sampled at another temperature."""
    return f"{split}_T{temperature:g}" if temperature else f"{split}_greedy"


def teacher_key(name: str | None) -> str:
    """The option that a teacher is set by: `name` is its own, or None where it is the only one.

    >>> teacher_key(None), teacher_key("math")
    ('teacher', 'teachers.math')
    """
    return "teacher" if name is None else f"teachers.{name}"
