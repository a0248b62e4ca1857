"""Writes docs/reliability.md from the tables of tests/faults, of which a test reads every row; `--check`
fails if the page is out of date."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults import answers, inputs, kills, models, runs, servers, templates  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BREAKS = (
    ("a process is killed", "the same command goes on from the newest whole checkpoint, to the same weights"),
    (
        "it is killed while a directory takes another's place (`best/`)",
        "the next start puts the old one back",
    ),
    (
        "one rank of several gives up",
        "all of them end with its sentence (`system/distributed.one_fate`); where it died without a word, "
        "the others say that, not gloo's traceback. On GPUs the others may hang in NCCL until the launcher "
        "ends them. Below it torchrun, another program, prints a traceback of its own and a table of its "
        "processes, which ends with the sentence too",
    ),
    (
        "processes are given different options, versions, data, models or directories",
        "all of them say which before the first step, exit code 2",
    ),
    ("two commands on one run directory", "the second one ends in a sentence: the first holds a lock on it"),
    ("a disk is full", "one sentence; what was there stays"),
    ("memory runs out", "one sentence that names the options that take it, exit code 2"),
    (
        "a disk spoils a file",
        "a reader per kind of file (`system/reading.py`) names it; lines of metrics.jsonl that are none are "
        "passed over, and `onpath report` says which steps are missing",
    ),
    (
        "the final model is empty or half there",
        "the run is not finished, for `train` and for `report`: the same command writes it again",
    ),
    ("no trajectory was ever kept", "the run ends with exit code 2 and says so; no model is written"),
    (
        "a server stays away, stalls, floods, lies",
        "see [SECURITY.md](../SECURITY.md) and [engines](engines.md)",
    ),
)
TRIED = """## What was tried

`docs/make_reliability.py` counts the tables in `tests/faults/`, of which a test reads every row; `make check`
fails where this page says otherwise. Beside them each reader is given 500 or more inputs with bytes flipped,
values swapped and types changed: YAML, JSON lines, prompts, Parquet, stored runs, config.json of models and
adapters, four kinds of server answers.
"""


@dataclass(frozen=True)
class Kind:
    """A row of the page."""

    name: str
    cases: int
    example: str
    happens: str


def bad_inputs() -> list[Kind]:
    every = len(inputs.PATHS) * len(inputs.READERS_OF_PATHS)
    sentence = "a sentence with file and line, exit code 2"
    return [
        Kind("config.yaml", len(inputs.YAML), "alias bomb", sentence),
        Kind("options and sections", len(inputs.OPTIONS), "method: 5", "a sentence with the key"),
        Kind("studies", len(inputs.STUDIES), "seeds: [true]", "a sentence with the key or the arm"),
        Kind("command lines", len(inputs.COMMANDS), "train --rollout.promts 3", "a sentence; did you mean"),
        Kind(
            f"paths, in {len(inputs.READERS_OF_PATHS)} commands", every, "~nouser/x", "no such path, and why"
        ),
        Kind("rows of train.jsonl", len(inputs.ROWS), '{"answer": 1e400}', f"{sentence}; or skip_bad"),
        Kind(
            "rows that name a teacher", len(inputs.TAUGHT_ROWS), '{"of": "maths"}', f"{sentence}; or skip_bad"
        ),
        Kind("sources of data", len(inputs.SOURCES), "gym:nope", "what a source is"),
        Kind("files that are no data", len(inputs.FILES), "text.parquet", "a sentence with the file"),
        Kind("saved data sets", len(inputs.SAVED), "state.json: 5", "a sentence with the directory"),
    ]


def damaged_runs() -> list[Kind]:
    contents = len(runs.CONTENTS)
    found = [
        Kind(
            "stored files", len(runs.FILES) * contents, "metrics.jsonl: half", "report and inspect: " + _WHOLE
        ),
        *(
            Kind(
                f"what is read of {where}",
                len(files) * contents,
                f"{files[1]}: {{}}",
                "eval and export: " + _WHOLE,
            )
            for where, files in runs.OF_MODELS.items()
        ),
    ]
    resumed = len(runs.TRAIN_FILES) * len(runs.TRAIN_CONTENTS)
    return [*found, Kind("an unfinished run", resumed, "state.json: null", "train: goes on, or a sentence")]


_WHOLE = "what is whole, or a sentence; nothing damaged is copied"


def misbehaviours() -> list[Kind]:
    return [
        Kind(
            "trickles", len(servers.TRICKLES), "headers without an end", "ends after teacher.timeout in all"
        ),
        Kind("bytes on the wire", len(servers.WIRE), "a gzip bomb", "asked again, then a sentence"),
        Kind(
            "log-probs", len(answers.SCORES), "probabilities that sum to 1.2", "asked again, then a sentence"
        ),
        Kind("log-probs without mass", 2 * len(answers.NO_MASS), "all -9999", "refused: the KL would be 0"),
        Kind("completions", len(answers.COMPLETIONS), "ids that are true", "asked again, then a sentence"),
        Kind("lists of models", len(answers.NO_MODELS), '{"data": null}', "asked again, then a sentence"),
        Kind("addresses", len(answers.NO_ADDRESSES), "ftp://host", "a sentence at once"),
    ]


def model_directories() -> list[Kind]:
    files: dict[str, list[str]] = {}
    for name, (file, _, _) in models.MODELS.items():
        files.setdefault(file, []).append(name)
    return [
        *(
            Kind(file, len(names), names[0], "refused before it trains, or a model")
            for file, names in files.items()
        ),
        Kind(
            "chat templates without an end",
            len(templates.ENDLESS),
            "{{ 'x' * 10000000000 }}",
            "refused: limits",
        ),
        Kind("chat templates that fail", len(templates.FAILING), "{{ 1 / 0 }}", "a sentence with the prompt"),
    ]


def killed() -> list[Kind]:
    return [
        *(
            Kind(name, count, "before each operation on files", "old or new, whole")
            for name, count in kills.KILLS.items()
        ),
        Kind("a whole run", kills.RUNS, "spread over all of its operations", "the same bits at the end"),
    ]


TABLES = {
    "bad inputs": (bad_inputs, 200, ("tests/faults/test_inputs.py",)),
    "damaged run directories": (damaged_runs, 100, ("tests/commands/test_damage.py",)),
    "server misbehaviours": (
        misbehaviours, 60, ("tests/faults/test_servers.py", "tests/engines/test_server_answers.py")
    ),
    "model directories": (
        model_directories, 50, ("tests/faults/test_models.py", "tests/data/test_templates.py")
    ),
    "kills": (killed, 100, ("tests/faults/test_kills.py",)),
}  # fmt: skip
"""What is counted, at least how many of it there must be, and where it is tried."""


def page() -> str:
    """The whole page.

    Raises:
        ValueError: too few cases.
    """
    breaks = [f"| {what} | {happens} |" for what, happens in BREAKS]
    head = ["# What happens when something breaks", "", "| what breaks | what happens |", "|---|---|"]
    parts = ["\n".join([*head, *breaks, ""]), TRIED]
    for title, (rows, least, tests) in TABLES.items():
        found = rows()
        total = sum(kind.cases for kind in found)
        if total < least:
            raise ValueError(f"{total} {title}, not {least}")
        where = ", ".join(f"`{test}`" for test in tests)
        parts.append(f"### {total} {title}\n\n{where}\n\n{_table(found)}")
    parts.append(_MORE)
    return "\n".join(parts)


_MORE = """Whole commands on broken models, data and run directories: `tests/config/test_bad_input.py`. Every
option of the config with anything at all: `tests/faults/test_inputs.py`. SIGKILLs by another process, in the
middle of a checkpoint that is written slowly: `tests/run/test_kill.py`.

Not held: a chat template whose loop depends on what a prompt holds (it is tried with one short question); a
file that is changed while it is read; a disk that says it has written what it has not.
"""


def _table(kinds: Sequence[Kind]) -> str:
    rows = [f"| {k.name} | {k.cases} | `{k.example}` | {k.happens} |" for k in kinds]
    return "\n".join(["| kind | cases | one of them | what happens |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/reliability.md is out of date: run make docs")
    else:
        PAGE.write_text(text, encoding="utf-8")
