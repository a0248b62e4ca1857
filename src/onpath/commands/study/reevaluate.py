"""Other questions to the same models: a run is not trained again because `evals` has changed.

<study>/evaluations-<questions>/<run>     the final model of runs/<run> on what `evals` says now
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onpath import config as configuration
from onpath.commands.study.plan import HARMLESS, Job, changed, made_with, questions
from onpath.commands.study.untrained import EVALUATIONS, final_model


def as_made(job: Job) -> Job:
    """The job; where its run is there and differs from the plan in what a run may, or in questions, with the
    run's own config, or of an unfinished one with the questions that it began with."""
    theirs, found, asked = made_with(job), changed(job), questions(job.config)
    if theirs is None or not found:
        return job
    if any(change.rule not in HARMLESS and change.key not in asked for change in found):
        return job  # to be refused
    here = {"name": job.name, "dir": job.config.run.dir}
    tree = {**theirs, "run": {**theirs["run"], **here}}
    made = replace(job, config=configuration.build(tree, source=f"{job.directory}/config.yaml"))
    if made.finished:
        return made
    tree = job.config.model_dump(mode="json")
    for section, name in (change.key.split(".", 1) for change in found if change.key in asked):
        tree[section][name] = theirs[section][name]
    return replace(job, config=configuration.build(tree, source=f"{job.directory}/config.yaml"))


def evaluations(study: Path, planned: Sequence[Job], made: Sequence[Job]) -> dict[str, Job]:
    """Run → the evaluation of its model, where a finished run has answered other questions than planned."""
    return {
        job.name: _evaluation(study, job, run)
        for job, run in zip(planned, made, strict=True)
        if run.finished and questions(job.config) != questions(run.config)
    }


def _evaluation(study: Path, job: Job, run: Job) -> Job:
    asked = json.dumps(questions(job.config), sort_keys=True).encode()
    folder = study / f"{EVALUATIONS}{hashlib.sha256(asked).hexdigest()[:8]}"
    tree = job.config.model_dump(mode="json")
    tree["run"] |= {"dir": str(folder)}
    if job.trains:
        tree = final_model(tree, run.directory)
    config = configuration.build(tree, source=f"evaluation of {job.name}")
    return Job(arm=job.arm, seed=job.seed, config=config, trains=False)
