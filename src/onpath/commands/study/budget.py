"""Budgets: how many optimiser steps an arm gets.

A budget in updates is a number of steps. One in tokens or seconds is divided by the arm's use per step, which
a pilot run of the arm measures; so the schedule of the learning rate is complete in every arm, which it
would not be if runs were cut off. Lengths change as a student learns, so an arm may miss its budget: what it
used is counted and stands in the results, with a note where it is off by more than OFF_BY.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from onpath.commands.study.config import Budget, StudyConfig
from onpath.commands.study.plan import Job, arm_config
from onpath.run.log import read_lines
from onpath.system.errors import UserError

OFF_BY = 0.1


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a run's steps took; a pilot's are means per step."""

    updated_tokens: float
    tokens_generated_student: float
    tokens_generated_teacher: float
    """Rewrites, windows and samples in the teacher's name, a teacher that is the student itself included."""
    wall_seconds: float
    """Sum over the stages of all steps: without start-up, evaluation and checkpoints."""

    @property
    def generated_tokens(self) -> float:
        return self.tokens_generated_student + self.tokens_generated_teacher

    def of(self, measure: str) -> float:
        """By the name of a budget's measure."""
        amount: float = getattr(self, measure)
        return amount


def used(rows: Sequence[Mapping[str, Any]]) -> Used:
    """Sum over lines of metrics.jsonl."""
    return Used(
        updated_tokens=sum(row["tokens"] for row in rows),
        tokens_generated_student=sum(row["student_tokens_generated"] for row in rows),
        tokens_generated_teacher=sum(row.get("teacher_tokens_generated", 0) for row in rows),
        wall_seconds=sum(sum(row["seconds"].values()) for row in rows),
    )


def per_step(job: Job) -> Used:
    """A pilot's use per step. The first step is left out: it warms up."""
    rows = [used([row]) for row in read_lines(job.directory / "metrics.jsonl")[1:]]
    return Used(**{key: mean(getattr(row, key) for row in rows) for key in Used.__dataclass_fields__})


def steps_of(study: StudyConfig, rates: Mapping[str, Used]) -> dict[str, int]:
    """Optimiser steps of each arm that trains, from the use per step where that is needed; an arm whose pilot
    failed is left out."""
    steps: dict[str, int] = {}
    for arm in sorted(study.trained, key=lambda a: isinstance(_amount(study.budget_of(a)), str)):
        budget = study.budget_of(arm)
        if budget is None:
            steps[arm] = arm_config(study, arm).optim.steps
        elif budget.updates is not None:
            steps[arm] = budget.updates
        elif arm in rates:
            amount = budget.amount
            if isinstance(amount, str):
                if amount not in rates or amount not in steps:
                    continue
                amount = steps[amount] * rates[amount].of(budget.measure)
            each = rates[arm].of(budget.measure)
            if not each:
                raise UserError(
                    f"{study.named(arm)}: its steps use no {budget.measure}, so no number of them meets its "
                    "budget; give it one in updates"
                )
            steps[arm] = max(1, round(amount / each))
    return steps


def _amount_text(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:,.3g}"


def _amount(budget: Budget | None) -> float | str | None:
    return budget.amount if budget else None


def missed(study: StudyConfig, use: Mapping[str, Used]) -> list[str]:
    """Arms whose mean use is off their budget, as sentences."""
    notes = []
    for arm, taken in use.items():
        budget = study.budget_of(arm)
        if budget is None or budget.measure == "updates":
            continue
        wanted = budget.amount
        if isinstance(wanted, str):
            if wanted not in use:
                continue
            wanted = use[wanted].of(budget.measure)
        used_up = taken.of(budget.measure)
        if abs(used_up - wanted) > OFF_BY * wanted:
            off = f", {used_up / wanted - 1:+.0%}" if wanted else ""
            notes.append(
                f"{arm} used {_amount_text(used_up)} {budget.measure}{off} of its budget "
                f"{_amount_text(wanted)}"
            )
    return notes
