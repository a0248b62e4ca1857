"""From a study's config to its runs: one ordinary config each, under one directory.

<study>/runs/<arm>-seed<s>        what is compared          (untouched, teacher: <study>/runs/<arm>)
<study>/tuning/<arm>-lr<rate>     learning rates on the validation split
<study>/pilots/<arm>              tokens and seconds per step, where the budget is in those
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpath import config as configuration
from onpath.commands.study.config import StudyConfig, merged
from onpath.commands.study.untrained import as_it_is, teacher_as_it_is
from onpath.config.changes import Change, changes
from onpath.config.whole import Config
from onpath.data.tasks import task_of
from onpath.run.checkpoint import holds_model
from onpath.run.log import read_lines
from onpath.system.errors import UserError

_BARE = {"start": False, "every": 0, "also_at": []}
TUNING_SPLIT = "tuning"
HARMLESS = ("neutral", "rounding")
"""Changes with which a run is still the same: its weights are, but for sums in another order."""
_NOT_ASKED = ("eval.every", "eval.start")  # of the training run: a finished one has no curve to add to


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process: a run of `onpath train`, or the evaluation of a model as it is."""

    arm: str
    seed: int | None
    """None: the same for every seed."""
    config: Config
    trains: bool = True

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def stage(self) -> str:
        """pilots, tuning or runs."""
        return Path(self.config.run.dir).name

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name

    @property
    def last_step(self) -> int:
        """The step of the final evaluation: of a finished run that run.stop_after ended, its own last one."""
        if not self.trains:
            return 0
        ended = self.config.run.stop_after and self.finished
        done = read_lines(self.directory / "metrics.jsonl") if ended else []
        return done[-1]["step"] if done else self.config.optim.steps

    @property
    def stopped_early(self) -> bool:
        """Whether run.stop_after ended it before all its steps."""
        return self.trains and self.last_step < self.config.optim.steps

    @property
    def finished(self) -> bool:
        """Whether its last file is there."""
        if self.trains:
            return holds_model(self.directory / "model")
        return all(self.details(split).is_file() for split in self.config.evaluations)

    def details(self, split: str) -> Path:
        """Verdicts problem by problem at the end."""
        return self.directory / "evals" / f"{split}_step_{self.last_step:06d}.jsonl"


def arm_config(study: StudyConfig, arm: str) -> Config:
    """The arm's config before seed, budget and learning rate: evals over base, then the arm's overrides.

    Raises:
        UserError: the overrides do not give a valid config.
    """
    spec, evals = study.arms[arm], study.evals
    tree = study.base.model_dump(mode="json")
    given = {key: getattr(evals, key) for key in ("n", "k", "every", "start", "also_at")}
    tree["eval"] |= {key: value for key, value in given.items() if value is not None}
    tree["data"] |= {"eval": evals.splits} if evals.splits else {}
    tree["data"] |= {"eval_limit": evals.limit} if evals.limit else {}
    unset = evals.also_at is None and "also_at" not in study.base.eval.model_fields_set
    if unset and _tell_errors(tree["data"]["eval"].values()):
        tree["eval"]["also_at"] = [0.6, 0.0]
    if spec.kind == "teacher" and tree["teachers"]:
        raise UserError(
            f"{study.named(arm)}: there are several teachers, none of which knows all prompts; drop this arm"
        )
    if spec.kind == "teacher" and tree["teacher"]["engine"] == "chat":
        raise UserError(
            f"{study.named(arm)}: teacher.engine: chat has no weights here to evaluate; drop this arm"
        )
    if spec.kind != "train":
        tree = teacher_as_it_is(tree) if spec.kind == "teacher" else as_it_is(tree)
        return configuration.build(tree, source=study.named(arm))
    method = spec.overrides.get("method")
    if isinstance(method, dict) and method.get("name", tree["method"]["name"]) != tree["method"]["name"]:
        tree["method"] = {}  # the options of another method mean nothing here
    return configuration.build(merged(tree, spec.overrides), source=study.named(arm))


def _tell_errors(sources: Iterable[str]) -> bool:
    """Whether all sources are of tasks that know kinds of errors: then how often each occurs is asked at
    other temperatures too, since some are indecision alone."""
    tasks = [task_of(source) for source in sources]
    return bool(tasks) and all(task is not None and task.error_kinds for task in tasks)


def check_alike(study: StudyConfig) -> None:
    """Arms are compared on the same data with the same grader, or not at all.

    Raises:
        UserError: an arm has other `data` or `eval`; the key and both values are named.
    """
    base = arm_config(study, study.base_arm)
    for name in study.arms:
        other = arm_config(study, name)
        for section in ("data", "eval"):
            ours, theirs = (getattr(c, section).model_dump() for c in (base, other))
            if key := next((k for k in ours if ours[k] != theirs[k]), None):
                raise UserError(
                    f"{study.named(name)} has {section}.{key} {theirs[key]!r} and arm {study.base_arm} "
                    f"{ours[key]!r}: arms of one study share data and grader; make it another study"
                )


def piloted(study: StudyConfig) -> list[str]:
    """Arms whose use per step must be known."""
    needed: dict[str, None] = {}
    for arm in study.trained:
        budget = study.budget_of(arm)
        if budget and budget.measure != "updates":
            needed[arm] = None
            if isinstance(budget.amount, str):
                needed[budget.amount] = None
    return list(needed)


def check_pilots(study: StudyConfig) -> None:
    """A pilot must be able to tell what an arm uses per step.

    Raises:
        UserError: the first step of its phase pays for all of it.
    """
    for arm in piloted(study):
        if arm_config(study, arm).refresh is not None:
            raise UserError(
                f"{study.named(arm)} keeps rollouts (rollout.refresh), and the first step of a phase pays "
                "for all of it: no pilot can measure a step; give it, and the arms that are matched to it, a "
                "budget in updates"
            )


def pilots(study: StudyConfig) -> list[Job]:
    """Short runs of the arms whose use per step must be known."""
    jobs = []
    for arm in piloted(study):
        budget = study.budget_of(arm)
        steps = budget.pilot_steps if budget else 10
        changes = {"optim": {"steps": steps}, "data": {"eval": {}}, "eval": _BARE}
        jobs.append(_job(study, arm, min(study.seeds), "pilots", arm, _light(changes)))
    return jobs


def tuning(study: StudyConfig, steps: Mapping[str, int]) -> list[Job]:
    """Every rate of the grid for every arm that is tuned."""
    tune = study.tune
    if tune is None:
        return []
    data = {"eval": {TUNING_SPLIT: tune.split}, "eval_limit": tune.limit}
    sections = {"data": data, "eval": {**_BARE, "n": tune.n, "k": 1}}
    return [
        _job(
            study,
            arm,
            tune.seed,
            "tuning",
            f"{arm}-lr{rate:g}",
            _light({**sections, "optim": {"steps": steps[arm], "lr": rate}}),
        )
        for arm in study.trained
        if study.arms[arm].tuned_like is None and arm in steps
        for rate in tune.lrs
    ]


def runs(study: StudyConfig, steps: Mapping[str, int], rates: Mapping[str, float]) -> list[Job]:
    """What is compared, all arms of the first seed first. An arm without steps or a rate failed before."""
    jobs = [
        _job(study, arm, None, "runs", arm, {}) for arm, spec in study.arms.items() if spec.kind != "train"
    ]
    for seed in study.seeds:
        for arm in study.trained:
            if arm not in steps or (study.tune and arm not in rates):
                continue
            optim = {"steps": steps[arm]} | ({"lr": rates[arm]} if study.tune else {})
            jobs.append(_job(study, arm, seed, "runs", f"{arm}-seed{seed}", {"optim": optim}))
    return jobs


def stages(study: StudyConfig) -> list[list[Job]]:
    """All jobs before anything is measured: for counting, their steps and rates are made up."""
    steps, rates = dict.fromkeys(study.trained, 1), dict.fromkeys(study.trained, 1.0)
    return [pilots(study), tuning(study, steps), runs(study, steps, rates)]


def _light(changes: dict[str, Any]) -> dict[str, Any]:
    """With no best weights and no early stop either: both look at sets that these runs do not evaluate."""
    run = {"save_every": 0, "trajectories_every": 0, "trackers": [], "keep_best": None, "stop_after": 0}
    return {**changes, "run": run}


def _job(
    study: StudyConfig, arm: str, seed: int | None, folder: str, name: str, changes: Mapping[str, Any]
) -> Job:
    tree = arm_config(study, arm).model_dump(mode="json")
    if "data" in changes:
        tree["data"]["eval"] = {}  # replaced, not laid over
    run = {"name": name, "dir": str(study.directory / folder)} | ({} if seed is None else {"seed": seed})
    config = configuration.build(merged(merged(tree, changes), {"run": run}), source=study.named(arm))
    return Job(arm=arm, seed=seed, config=config, trains=study.arms[arm].kind == "train")


def check_existing(jobs: list[Job]) -> None:
    """Runs that are there already must be those that are planned.

    Raises:
        UserError: one has another config, with the key and both values.
    """
    for job in jobs:
        if found := [change for change in changed(job) if change.rule not in HARMLESS]:
            asked = questions(job.config)  # these alone would be no reason (study/reevaluate.py)
            first = min(found, key=lambda change: change.key in asked)
            raise UserError(
                f"{job.directory} was made with {first.key} {first.before!r}, the study now says "
                f"{first.after!r}: give the study or the arm another name, or go back to what it said"
            )


def left(job: Job) -> bool:
    """Whether it has not run, or answered other questions."""
    asked = questions(job.config)
    return not job.finished or any(change.key in asked for change in changed(job))


def questions(config: Config) -> dict[str, Any]:
    """Dotted key → value of all that a final evaluation depends on, beside the model."""
    tree = config.model_dump(mode="json")
    keys = ["data.eval", "data.eval_limit", *(f"eval.{key}" for key in tree["eval"])]
    sections = {key: key.split(".", 1) for key in keys if key not in _NOT_ASKED}
    return {key: tree[section][name] for key, (section, name) in sections.items()}


def made_with(job: Job) -> Mapping[str, Any] | None:
    """The config of the run that is in the job's directory; None if there is none."""
    path = job.directory / "config.yaml"
    if not path.is_file():
        return None
    return configuration.resolved(configuration.read_yaml(path))


def changed(job: Job) -> list[Change]:
    """What the run in the job's directory was made with otherwise, as a resumed run compares; where it lies,
    and what it is called, is no difference."""
    theirs = made_with(job)
    found = changes(theirs, job.config) if theirs else []
    return [c for c in found if c.key not in ("run.dir", "run.name") and not _moved(c, job)]


def _moved(change: Change, job: Job) -> bool:
    """Whether it is the same run's final model, of a study that lay elsewhere."""
    if change.key != "student.model" or job.trains:
        return False
    ends = {Path(model).parts[-3:] for model in (change.before, change.after)}
    return ends == {("runs", job.name, "model")}
