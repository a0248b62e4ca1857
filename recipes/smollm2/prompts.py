"""Arithmetic prompts with answers from reasoning-gym, as JSONL: train and test from different seeds.

python recipes/smollm2/prompts.py
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym

TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "gsm_symbolic": {},
}


def rows(task: str, *, size: int, seed: int) -> Iterator[dict[str, str]]:
    """Problems of one task; `answer` is what math-verify compares with."""
    for i, item in enumerate(reasoning_gym.create_dataset(task, size=size, seed=seed, **TASKS[task])):
        yield {"id": f"{task}/{seed}/{i}", "prompt": item["question"], "answer": item["answer"]}


def write(path: Path, *, size: int, seed: int, without: frozenset[str] = frozenset()) -> frozenset[str]:
    """Half of each task, no prompt twice, none of `without`; returns the prompts written."""
    found: dict[str, dict[str, str]] = {}
    for task in TASKS:
        fresh = (row for row in rows(task, size=4 * size, seed=seed) if row["prompt"] not in without)
        for row in fresh:
            found.setdefault(row["prompt"], row)
            if sum(r["id"].startswith(task) for r in found.values()) == size // 2:
                break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.values()))
    print(f"{path}: {len(found)} prompts")
    return frozenset(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"), help="default: build/smollm2")
    parser.add_argument("--train", type=int, default=400, help="training prompts (default: 400)")
    parser.add_argument("--test", type=int, default=40, help="test prompts (default: 40)")
    options = parser.parse_args()
    test = write(options.out / "test.jsonl", size=options.test, seed=1)
    write(options.out / "train.jsonl", size=options.train, seed=0, without=test)


if __name__ == "__main__":
    main()
