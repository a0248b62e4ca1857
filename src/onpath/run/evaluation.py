"""Evaluations of a run: graded samples, a line of eval.jsonl each."""

from collections.abc import Sequence
from typing import Any

from onpath.data.render import Renderer
from onpath.data.tasks import task_of
from onpath.evaluate.scores import Decode, ErrorKind, EvalResult, Generate, evaluate, write_details
from onpath.grade.base import Grader, Verdict
from onpath.records import Graded, Prompt, Rollout, Sampling
from onpath.run.directory import Run
from onpath.run.log import Display, flatten, tell
from onpath.run.parts import Parts
from onpath.run.trajectories import sample_row, write_parquet
from onpath.system import distributed
from onpath.system.errors import UserError


def error_kind_of(source: str, renderer: Renderer) -> ErrorKind | None:
    """What goes wrong first in wrong samples of a source, if its task can tell."""
    task = task_of(source)
    if task is None or not task.error_kinds:
        return None
    # A wrong response without a wrong step has stopped too early: the last kind is for the rest.
    return lambda r: task.error_kind(r.prompt.question, renderer.tokens(r.ids)) or task.error_kinds[-1]


class _EachItsShare(Grader):
    """Each text is graded by one process: a verdict that is not the same twice (a judge, a limit of time)
    must not tell processes different things, which decide by it whether the run goes on. What one refuses
    all refuse."""

    def __init__(self, grader: Grader) -> None:
        self.grader, self.name = grader, grader.name

    def _grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        mine: list[Verdict] = []
        refusals: list[UserError] = []
        try:
            mine = self.grader.grade_many(distributed.share(pairs))
        except UserError as error:
            refusals = [error]
        for refusal in distributed.gather(refusals):
            raise refusal
        return distributed.gather(mine)


def evaluate_together(
    prompts: Sequence[Prompt], generate: Generate, decode: Decode, grader: Grader, **options: Any
) -> tuple[EvalResult, list[Graded]]:
    """`evaluate` by all processes: each samples its share of the prompts, and grades its share of the texts;
    what they find is the same on every one."""

    def samples(prompts: Sequence[Prompt], n: int) -> list[Rollout]:
        mine = generate(distributed.share(prompts), n)
        by_prompt = [tuple(mine[i : i + n]) for i in range(0, len(mine), n)]
        return [r for group in distributed.gather(by_prompt) for r in group]

    return evaluate(prompts, samples, decode, _EachItsShare(grader), **options)


def evaluate_all(parts: Parts, run: Run, display: Display, *, step: int) -> list[EvalResult]:
    """Every evaluation set with the weights as they are; one line of eval.jsonl each."""
    config, results = parts.config, []
    for split, asked in config.evaluations.items():

        def generate(prompts: Sequence[Prompt], n: int, sampling: Sampling = asked.sampling) -> list[Rollout]:
            with parts.whole(prepares=False):
                return parts.generators.student.generate(prompts, sampling, n=n)

        result, graded = evaluate_together(
            parts.prompts.evals[asked.split],
            generate,
            parts.text.renderer.graded,
            parts.text.grader,
            n=asked.n,
            k=asked.k,
            step=step,
            split=split,
            error_kind=error_kind_of(config.data.eval[asked.split], parts.text.renderer),
        )
        results.append(result)
        if distributed.rank() == 0:
            run.evals.write(result.to_json())
            write_details(run.directory / "evals" / f"{split}_step_{step:06d}.jsonl", result)
            write_parquet(
                run.directory / "evals" / f"{split}_step_{step:06d}.parquet",
                [sample_row(g, parts.text.renderer) for g in graded],
            )
            low, high = result.ci95
            tell(run.trackers, flatten({f"eval/{split}": result.to_json()}), step)
            display.say(
                f"eval {split} at step {step}: avg@{result.n} {result.avg_at_k:.1%} [{low:.1%}, {high:.1%}]  "
                f"pass@{result.k} {result.pass_at_k:.1%}  unfinished {1 - result.finished:.1%}  "
                f"{result.problems:,} problems"
            )
    return results
