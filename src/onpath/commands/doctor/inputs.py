"""Checks that need no model: data, columns, reference answers, sampling settings."""

import re
from collections.abc import Sequence

from onpath.commands.doctor.finding import Finding, Status, skipped
from onpath.config.whole import Config
from onpath.data.load import LoadedPrompts, prompts_of_step
from onpath.grade.base import Grader
from onpath.records import Prompt
from onpath.run.inputs import load_evals, load_pool, trained_on

MOST_ANSWERS, MOST_SOLUTIONS = 10_000, 200
"""Reference answers and solutions that are graded: an answer against its own box takes a millisecond."""
_NAMED = 5
"""Prompts named whose answers fail."""
_FEW = 0.1
"""Share of unreadable answers, or of solutions that miss the answer, up to which a check only warns; of
copies among the training prompts, up to which it does not."""
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
_SENTENCE_WORDS = 3


def read_pool(config: Config) -> tuple[LoadedPrompts, Finding]:
    """The training pool.

    Raises:
        UserError: unreadable, or smaller than a step.
    """
    loaded = load_pool(config)
    prompts_of_step(loaded.prompts, size=config.rollout.prompts, seed=0, step=0)
    epochs = config.optim.steps * config.rollout.prompts / len(loaded.prompts)
    count = len(loaded.prompts)
    different = len({repr((p.text, p.messages, p.teacher)) for p in loaded.prompts})
    values = {"prompts": count, "different": different, "skipped": loaded.skipped, "epochs": round(epochs, 2)}
    message = f"{count:,} training prompts, read {epochs:.2g} times in {config.optim.steps} steps"
    advice = []
    if different < count:
        message += f"; {different:,} of them are different"
    if count - different > _FEW * count:
        advice.append("drop the copies, unless they are to be read as often as they stand there")
    if loaded.skipped:
        message += f"; {loaded.skipped} bad rows left out"
        advice.append(f"mend the bad rows; the first is {loaded.reasons[0]}")
    status: Status = "warning" if advice else "ok"
    return loaded, Finding(
        name="data", status=status, message=message, advice="; ".join(advice), values=values
    )


def read_evals(config: Config, pool: Sequence[Prompt]) -> tuple[dict[str, tuple[Prompt, ...]], Finding]:
    """The evaluation sets, and how many of their problems are trained on.

    Raises:
        UserError: unreadable, or without answers.
    """
    loaded = load_evals(config)
    evals = {name: one.prompts for name, one in loaded.items()}
    leaked, problems = trained_on(pool, evals)
    values = {"problems": problems, "trained_on": leaked}
    if not problems:
        message = "no evaluation sets (data.eval), so no accuracy will be measured on unseen problems"
        return evals, Finding(name="evals", status="skipped", message=message, values=values)
    message, advice = f"{problems:,} evaluation problems, none of them trained on", []
    if leaked:
        message = f"{leaked} of {problems} evaluation problems are also training prompts"
        advice.append("take them out of one side, or do not call the result a test score")
    if bad := {name: one for name, one in loaded.items() if one.skipped}:
        first = next(iter(bad.values()))
        told = ", ".join(f"{one.skipped} of {name}" for name, one in bad.items())
        message += f"; bad rows left out: {told}"
        advice.append(f"mend the bad rows; the first is {first.reasons[0]}")
    status: Status = "warning" if advice else "ok"
    return evals, Finding(
        name="evals", status=status, message=message, advice="; ".join(advice), values=values
    )


def columns(config: Config, pool: Sequence[Prompt]) -> Finding:
    """Columns that the method cannot do without: the solution of OPSD, say."""
    method = config.method
    lacking = {column: sum(not (getattr(p, column) or "").strip() for p in pool) for column in method.needs}
    values = {f"without_{column}": count for column, count in lacking.items()}
    for column, count in lacking.items():
        if count:
            message = f"{count} of {len(pool)} training prompts have no {column}, which {method.name} needs"
            advice = f"add the column {column} to {config.data.train}"
            return Finding(name="columns", status="fail", message=message, advice=advice, values=values)
    if not lacking:
        message = f"{method.name} needs no column beside prompt"
    else:
        message = f"every training prompt has what {method.name} needs: {', '.join(lacking)}"
    return Finding(name="columns", status="ok", message=message, values=values)


def answers(grader: Grader, prompts: Sequence[Prompt]) -> Finding:
    """Does a response that states the reference answer pass the grader? (At most MOST_ANSWERS of them.)"""
    known = _spread([p for p in prompts if p.answer is not None], MOST_ANSWERS)
    if not known:
        return skipped("answers", "no prompt has an answer, so no accuracy will be measured")
    stated = [(text, p.answer or "") for p in known if (text := grader.stated(p.answer or "")) is not None]
    if not stated:
        return skipped("answers", f"what {grader.name} compares with states no answer; solutions are tried")
    verdicts = zip(known, grader.grade_many(stated), strict=True)
    failed = [p for p, v in verdicts if not v.correct or (grader.name == "math" and is_prose(p.answer or ""))]
    named = [p.id for p in failed]
    values = {"grader": grader.name, "graded": len(known), "unreadable": len(failed), "ids": named}
    if not failed:
        message = f"{len(known)} reference answers, stated plainly, all pass the {grader.name} grader"
        return Finding(name="answers", status="ok", message=message, values=values)
    shown = (failed[0].answer or "")[:60]
    message = (
        f"{len(failed)} of {len(known)} reference answers cannot be read by the {grader.name} grader, or are "
        f"sentences; the first is {shown!r} of prompt {failed[0].named}"
        + (f", then {', '.join(map(repr, named[1:_NAMED]))}" if failed[1:] else "")
    )
    return Finding(
        name="answers",
        status="fail" if len(failed) > _FEW * len(known) else "warning",
        message=message,
        advice="the column answer must hold the final answer alone; or choose another eval.grader",
        values=values,
    )


def is_prose(answer: str) -> bool:
    """A sentence, of which math-verify would make a product of letters.

    >>> is_prose("see page 4 of the key"), is_prose("\\\\frac{1}{2} apples")
    (True, False)
    """
    return len(_WORD.findall(answer)) >= _SENTENCE_WORDS


def solutions(grader: Grader, prompts: Sequence[Prompt]) -> Finding:
    """Do the reference solutions end in the reference answers? (At most MOST_SOLUTIONS of them.)"""
    known = [p for p in prompts if p.answer is not None and (p.solution or "").strip()]
    known = _spread(known, MOST_SOLUTIONS)
    if not known:
        return skipped("solutions", "no prompt has both a solution and an answer")
    verdicts = grader.grade_many([(p.solution or "", p.answer or "") for p in known])
    failed = [p for p, v in zip(known, verdicts, strict=True) if not v.correct]
    values = {"grader": grader.name, "graded": len(known), "wrong": len(failed)}
    if not failed:
        message = f"{len(known)} reference solutions all end in their answers"
        return Finding(name="solutions", status="ok", message=message, values=values)
    strict = grader.name != "exact" and len(failed) > _FEW * len(known)  # exact: a solution may end in prose
    return Finding(
        name="solutions",
        status="fail" if strict else "warning",
        message=f"{len(failed)} of {len(known)} reference solutions do not pass the {grader.name} grader, "
        f"the first is that of prompt {failed[0].named}",
        advice="a solution must end in its answer, in the form that the grader reads",
        values=values,
    )


def sampling(config: Config, refused: str | None) -> Finding:
    """Are the rollouts what the objective takes them for?

    Args:
        refused: why `onpath train` would not take the config, if that is because of its sampling.
    """
    rollout, evaluation = config.rollout, config.eval
    settings = f"temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, top-k {rollout.top_k or 'off'}"
    values = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
    if refused:
        return Finding(
            name="sampling",
            status="fail",
            message=refused,
            advice="set rollout.temperature 1, rollout.top_p 1, rollout.top_k 0",
            values=values,
        )
    if config.method.writes_rollouts and not config.method.trains_on_rollouts:
        message = f"what is trained on is drawn from the teacher ({settings})"
        return Finding(name="sampling", status="ok", message=message, values=values)
    plain = (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, 0)
    if not plain:
        trained, corrected = config.method.trains_on_rollouts, config.method.ppo_clip is not None
        message = f"rollouts are drawn at {settings}: not the student's own distribution"
        return Finding(
            name="sampling",
            status="warning" if trained else "ok",
            message=message + ("" if trained else f"; {config.method.name} does not train on them"),
            advice="drop off_policy unless you want this" if trained and not corrected else "",
            values=values,
        )
    alike = (evaluation.temperature, evaluation.top_p, evaluation.top_k) == (1.0, 1.0, 0)
    message = f"rollouts are the student's own samples ({settings})"
    message += ", one step old (rollout.overlap)" if rollout.overlap else ""
    if not alike:
        top = f"top-p {evaluation.top_p:g}, top-k {evaluation.top_k or 'off'}"
        message += f"; evaluation samples differently (temperature {evaluation.temperature:g}, {top})"
    return Finding(name="sampling", status="ok", message=message, values=values)


def _spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most so many, from all over."""
    stride = max(1, -(-len(prompts) // most))
    return list(prompts[::stride])
