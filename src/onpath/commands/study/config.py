"""A study's YAML: a base config, arms as overrides of it, seeds, a budget. Checked before anything runs."""

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from onpath import config as configuration
from onpath.config.section import Section
from onpath.config.sentences import closest, first_problem
from onpath.config.whole import LABELLED, Config
from onpath.data.tasks import split_name
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.text import short

MEASURES = ("updates", "updated_tokens", "generated_tokens", "wall_seconds")
Kind = Literal["train", "untouched", "teacher"]
Amount = int | float | str | None
_OF_RUNS = {
    "seed": "the study decides: give its seeds",
    "name": "the study decides, by arm and seed",
    "dir": "the study decides: give its dir",
}
"""Options of a run that an arm cannot have of its own."""
_NO_NAME = "cannot name a directory: use letters, digits and _ . + -"
_MOST_SEEDS = 10_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


class Budget(Section):
    """Where an arm stops: exactly one measure. A number, or the name of the arm whose use is matched."""

    updates: int | None = Field(None, ge=1)
    """Optimiser steps."""
    updated_tokens: Amount = None
    """Response tokens trained on."""
    generated_tokens: Amount = None
    """Tokens written by student and teacher together, in training."""
    wall_seconds: Amount = None
    """Seconds of training, without start-up and evaluation."""
    pilot_steps: int = Field(10, ge=2)
    """Steps of the pilot run that measures an arm's use per step; the first is left out."""

    @property
    def measure(self) -> str:
        """The one that is given."""
        return next(m for m in MEASURES if getattr(self, m) is not None)

    @property
    def amount(self) -> float | str:
        """A number, or an arm."""
        value: float | str = getattr(self, self.measure)
        return value

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        given = [m for m in MEASURES if getattr(self, m) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(MEASURES)}, not {' and '.join(given) or 'none'}")
        if not isinstance(self.amount, str) and self.amount <= 0:
            raise ValueError(f"{self.measure} must be above 0, not {self.amount:g}")
        return self


class Arm(Section):
    """One thing that is compared.

    In YAML a word (`untouched`: the student as it is; `teacher`: the teacher model itself) or a mapping of
    overrides, nested or dotted, with two keys of its own: `budget` and `tuned_like`.
    """

    kind: Kind = "train"
    overrides: dict[str, Any] = Field({})
    """Laid over the base config; another `method.name` starts from that method's defaults."""
    budget: Budget | None = None
    """Instead of the study's."""
    tuned_like: str | None = None
    """Take the learning rate that tuning chose for this arm."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in get_args(Kind):
                raise ValueError(f"it is {value!r}; an arm is untouched, teacher, or a mapping of overrides")
            return {"kind": value}
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ValueError("an arm is untouched, teacher, or a mapping of overrides")
        own = {key: value[key] for key in ("budget", "tuned_like") if key in value}
        return {**own, "overrides": nested({k: v for k, v in value.items() if k not in own})}


class Evals(Section):
    """What every arm is measured on; what is None is the base config's."""

    splits: dict[str, str] | None = None
    """Name → source; a list of sources will do."""
    n: int | None = Field(None, ge=1)
    """Samples per problem."""
    k: int | None = Field(None, ge=1)
    """pass@k."""
    limit: int | None = Field(None, ge=1)
    """Problems of each split."""
    every: int | None = Field(None, ge=0)
    """Also every so many steps, for learning curves."""
    also_at: list[float] | None = None
    """Further temperatures (eval.also_at). None: those of the base; where that does not say any, 0.6 and
    greedy if the task knows kinds of errors, as the gym does."""
    start: bool = False
    """Also before the first step of each run; the arm untouched measures that once."""

    @field_validator("splits", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        named: dict[str, Any] = {}
        for source in value:
            name = split_name(str(source))
            if name in named:
                raise ValueError(
                    f"{named[name]} and {source} would both be called {name}: give names, as in "
                    f"{{{name}: {named[name]}, other: {source}}}"
                )
            named[name] = source
        return named


class Tune(Section):
    """Learning rates are chosen per arm: the same grid, the same budget, a split and a seed of their own."""

    lrs: list[float] = Field(min_length=2)
    """The grid."""
    split: str = "gym:validation"
    """Problems that no arm trains on or is compared on."""
    limit: int = Field(200, ge=1)
    """Problems."""
    n: int = Field(2, ge=1)
    """Samples per problem; the best average wins, of equal ones the lower rate."""
    seed: int = 1000
    """Of the tuning runs; none of the study's seeds."""

    @field_validator("lrs")
    @classmethod
    def _apart(cls, value: list[float]) -> list[float]:
        names = [f"{rate:g}" for rate in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"holds {twice} twice; rates differ within six digits")
        return value


class Parallel(Section):
    processes: int | Literal["auto"] = "auto"
    """Runs at a time; auto: one per GPU, else cores / threads, divided by `ranks`."""
    threads: int = Field(1, ge=1)
    """CPU threads of each process (OMP_NUM_THREADS)."""
    ranks: int = Field(1, ge=1)
    """Processes of each run, as torchrun would start them on this host: data parallel, or in shards where
    `base` says so (parallel.shard)."""

    @field_validator("processes")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1, or auto, not {value}")
        return value


class StudyConfig(Section):
    """Everything that a study depends on."""

    name: str
    """Its directory under dir; default: the file's name (that of its directory for config.yaml)."""
    dir: str = "studies"
    """Where studies are kept."""
    base: Config = Config()
    """A config, or the path of one, beside this file or else in the working directory."""
    arms: dict[str, Arm] = Field(min_length=1)
    base_arm: str = "opd"
    """The arm that the others are subtracted from."""
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    """run.seed of the repetitions; a number n means 0 to n − 1."""
    budget: Budget | None = None
    """None: optim.steps of the config."""
    tune: Tune | None = None
    """None: optim.lr of the config."""
    evals: Evals = Evals()
    parallel: Parallel = Parallel()
    _file: str = PrivateAttr("")
    """Where it was read."""

    def named(self, arm: str) -> str:
        """An arm, for sentences."""
        return f"{self._file}: arm {arm}" if self._file else f"arm {arm}"

    @property
    def directory(self) -> Path:
        return Path(self.dir) / self.name

    def budget_of(self, arm: str) -> Budget | None:
        """The arm's own, else the study's."""
        return self.arms[arm].budget or self.budget

    @property
    def trained(self) -> list[str]:
        """Names of the arms that train."""
        return [name for name, arm in self.arms.items() if arm.kind == "train"]

    @field_validator("dir")
    @classmethod
    def _a_place(cls, value: str) -> str:
        path = place(value)
        return str(path) if value.startswith("~") else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value < 1:
            raise ValueError(f"{value} makes no run; give a number of seeds, at least 1, or a list of them")
        if value > _MOST_SEEDS:
            raise ValueError(
                f"{short(value)} is more than {_MOST_SEEDS:,} seeds; give fewer, or a list of them"
            )
        return list(range(value))

    @model_validator(mode="after")
    def _possible(self) -> "StudyConfig":
        for name in (self.name, *self.arms):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} {_NO_NAME}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} holds one twice; a repetition needs a seed of its own")
        if not (self.evals.splits or self.base.data.eval):
            raise ValueError(
                "evals.splits names no set to compare the arms on, and neither does base.data.eval; e.g. "
                "splits: {test: test.jsonl}"
            )
        if self.base_arm not in self.arms:
            raise ValueError(f"base_arm is {self.base_arm}, which is none of the arms {', '.join(self.arms)}")
        if self.tune:
            self._check_tuning(self.tune)
        for name in self.arms:
            self._check_arm(name)
        of_seeds = {f"{arm}-seed{seed}": arm for arm in self.trained for seed in self.seeds}
        if shared := next((name for name in self.arms if name in of_seeds), None):
            raise ValueError(
                f"arm {shared} would have the directory of a run of arm {of_seeds[shared]}; call it otherwise"
            )
        return self

    def _check_tuning(self, tune: Tune) -> None:
        if tune.seed in self.seeds:
            raise ValueError(
                f"tune.seed {tune.seed} is one of the seeds: what is tuned must not be compared on it"
            )
        compared = (self.evals.splits or self.base.data.eval).values()
        if _same_place(tune.split) in map(_same_place, (*compared, self.base.data.train)):
            raise ValueError(
                f"tune.split {tune.split} is also trained on or compared on; tune on a split of its own"
            )

    def _check_arm(self, name: str) -> None:
        arm, given = self.arms[name], self.arms[name].overrides.get("optim")
        optim = given if isinstance(given, Mapping) else {}  # what is none, the config's own check refuses
        run = self.arms[name].overrides.get("run")
        if fixed := next((key for key in _OF_RUNS if isinstance(run, Mapping) and key in run), None):
            raise ValueError(f"arm {name} sets run.{fixed}, which {_OF_RUNS[fixed]}")
        if self.budget_of(name) and "steps" in optim:
            raise ValueError(f"arm {name} sets optim.steps, which the budget decides")
        if self.tune and "lr" in optim:
            raise ValueError(f"arm {name} sets optim.lr, which tune chooses")
        if arm.tuned_like is not None:
            other = self.arms.get(arm.tuned_like)
            if other is None or other.kind != "train" or other.tuned_like is not None or not self.tune:
                raise ValueError(f"arm {name}: tuned_like is {arm.tuned_like}, which is no arm that is tuned")
        if arm.budget and isinstance(arm.budget.amount, str):
            other, own = self.arms.get(arm.budget.amount), arm.budget
            if (
                other is None
                or other.kind != "train"
                or (other.budget and isinstance(other.budget.amount, str))
            ):
                raise ValueError(
                    f"arm {name}: budget.{own.measure} is {own.amount!r}, neither a number nor an arm with a "
                    "budget in numbers"
                )
        if self.budget and isinstance(self.budget.amount, str):
            raise ValueError(f"budget.{self.budget.measure} must be a number, not {self.budget.amount!r}")


def _same_place(source: str) -> str:
    """A source, a file by where it lies."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def load_study(path: str | Path) -> StudyConfig:
    """Reads a study's YAML.

    Raises:
        UserError: unreadable file, wrong key, wrong value or impossible pair.
    """
    path = place(path)
    tree, name = read_study(path)
    if "x" in tree:
        raise UserError(f"{path}: x makes it a study per level, and here one study is asked for")
    return study_of({**tree, "name": name}, path)


def read_study(path: Path) -> tuple[dict[str, Any], str]:
    """A study's YAML as it stands there, and its name."""
    tree: dict[str, Any] = code.beside(_read(path), path.parent)
    return tree, _name(tree, path)


def _name(tree: dict[str, Any], path: Path) -> str:
    """What a study is called, taken out of its tree."""
    of, default = ("directory", path.resolve().parent.name) if path.stem == "config" else ("file", path.stem)
    name = text(tree.pop("name", default), path, "name")
    if name == default and not _NAME.fullmatch(name):
        raise UserError(
            f"{path}: without name the study is called by its {of}, and {name!r} cannot name the directory "
            "of its results: give it a name, of letters, digits and _ . + -"
        )
    if not _NAME.fullmatch(name):
        raise UserError(f"{path}: name is {name!r}, which {_NO_NAME}")
    return name


def text(value: Any, path: Path, key: str) -> str:
    """What must be text, and was not always meant as something else.

    Raises:
        UserError: YAML reads it as no text.
    """
    if not isinstance(value, str):
        raise UserError(f"{path}: {key} is {_shown(value)}, which is no text: {_quote(value)}")
    return value


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else short(value)


def _quote(value: Any) -> str:
    if isinstance(value, bool):
        return "write it in quotes, as yes, no, on and off are none without them"
    return "write it in quotes" if isinstance(value, int | float) else "give it some, or leave it out"


def study_of(data: dict[str, Any], path: Path) -> StudyConfig:
    """A study from its tree; `path` is where that stands.

    Raises:
        UserError: see `load_study`.
    """
    if "arms" not in data and "base" not in data and _is_of_a_run(data):
        raise UserError(f"{path} has no arms: it is the config of one run; use onpath train {path}")
    if unknown := next((key for key in data if key not in StudyConfig.model_fields), None):
        raise UserError(f"{path}: {_unknown(str(unknown), str(unknown), '')}")
    arms = data.get("arms")
    for arm in arms if isinstance(arms, Mapping) else ():
        if not isinstance(arm, str):
            raise UserError(f"{path}: arms: the name {_shown(arm)} is no text: {_quote(arm)}")
    base = data.get("base")
    if isinstance(base, str):
        data["base"] = configuration.load(_base_file(base, path))
    elif base is not None:
        if not isinstance(base, dict):
            raise UserError(f"{path}: base must be a mapping of sections or the path of a config")
        data["base"] = configuration.build(nested(base), source=f"{path}: base")
    try:
        study = StudyConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error, data)}") from None
    study._file = str(path)
    return study


def _is_of_a_run(data: Mapping[str, Any]) -> bool:
    """Whether it has sections of a run's config, and nothing that may have been meant as arms."""
    sections = Config.model_fields.keys() - StudyConfig.model_fields.keys()
    return bool(data.keys() & sections) and not any(closest(str(key), ["arms"], cutoff=0.7) for key in data)


def _base_file(base: str, path: Path) -> Path:
    """Beside the study's file, else in the working directory, as own code is looked for."""
    here = place(base, key=f"{path}: base")
    found = next((file for file in (path.parent / base, here) if file.is_file()), None)
    if found is None:
        raise UserError(f"{path}: base is {base}: no such config file, beside this one or where you are")
    return found


def nested(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings: {"optim.lr": 1} → {"optim": {"lr": 1}}. A key is split behind its section and
    once behind its option; what stands below, such as the names of evaluation sets, is the user's own.

    >>> nested({"data": {"eval.math.hard": "a.jsonl"}, "rollout.refresh.every": 2})
    {'data': {'eval': {'math.hard': 'a.jsonl'}}, 'rollout': {'refresh': {'every': 2}}}
    """
    result: dict[str, Any] = {}
    for key, value in tree.items():
        section, _, rest = str(key).partition(".")
        options = {rest: value} if rest else value
        if isinstance(options, Mapping):
            layers = [_layer(section, str(k), v, dotted=bool(rest)) for k, v in options.items()]
            options = reduce(merged, layers, {})
        result[section] = merged(result.get(section), options)
    return result


def _layer(section: str, key: str, value: Any, *, dotted: bool) -> dict[str, Any]:
    """One option of a section. In one that holds several of a kind (`teachers`) a name comes before it, which
    may have dots itself.

    Args:
        dotted: the section stands in the same key.
    """
    head, _, below = key.partition(".")
    if section in LABELLED:
        parts, known = key.split("."), LABELLED[section].model_fields
        options = [place for place in range(len(parts) - 1, 0, -1) if parts[place] in known]
        if not options or (isinstance(value, Mapping) and not dotted):
            return {key: value}
        label, option = ".".join(parts[: options[0]]), ".".join(parts[options[0] :])
        return {label: _layer("", option, value, dotted=True)}
    return {head: {below: value} if below else value}


def merged(below: Any, above: Any) -> Any:
    """`above` laid over `below`, mapping by mapping."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}


def _read(path: Path) -> dict[str, Any]:
    data = configuration.read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping with base, arms, seeds, …; see docs/study.md")
    return data


_FIELDS = {
    "": StudyConfig.model_fields,
    "budget": Budget.model_fields,
    "evals": Evals.model_fields,
    "tune": Tune.model_fields,
    "parallel": Parallel.model_fields,
}


def _sentence(error: ValidationError, data: Mapping[str, Any]) -> str:
    first, key = first_problem(error, data)
    form = ", such as {opd: {}, trd: {method: {name: trd}}}" if key == "arms" else ""
    match first["type"]:
        case "extra_forbidden":
            *inside, last = map(str, first["loc"])
            return _unknown(key, last, ".".join(inside))
        case "missing":
            return f"{key} is missing: it has no default, so set it{form}"
        case "dict_type" | "model_type":
            return f"{key} is {str(first['input'])[:60]!r}; it must be a mapping{form}"
        case "string_type":
            return f"{key} is {_shown(first['input'])}, which is no text: {_quote(first['input'])}"
        case "value_error":
            return f"{key + ': ' if key else ''}{first['ctx']['error']}"
        case _:
            return f"{key} is {str(first['input'])[:60]!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _unknown(key: str, last: str, section: str) -> str:
    known = _FIELDS.get(section, {})
    guess = closest(last, known, cutoff=0.7)
    told = f"{section or 'a study'} has {', '.join(known)}"
    return f"unknown key {key}; {guess}{' ' if guess else ''}{told}"
