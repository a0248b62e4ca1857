"""Run and study directories for the report's tests, without a model: every number is a function of a seed."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from onpath.run.trajectories import write_parquet
from tests.stored import read_trajectories

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "\u202eright to left\u202c \u200f",
    "👩‍🔬 \u2028 \u2029 &amp; ]]> <!-- \u0000 \ud800",
    "{{data}} {{script}}",
)
CELLS = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")
WORDS = [
    "a: ",
    "3",
    "5",
    " + ",
    "4",
    "7",
    " = ",
    " -> ",
    "a",
    "b",
    "8",
    "2",
    "; ",
    ", so ",
    "ans ",
    "b: ",
    " * ",
    "wait ",
]
QUANTITIES = (
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logp",
    "teacher_logp",
)


def make_run(
    root: Path,
    *,
    steps: int = 12,
    rows: int = 12,
    length: int = 40,
    hostile: bool = False,
    finished: bool = True,
) -> Path:
    """A run with metrics, evaluations and three stored steps of rewrites, forks and plain rollouts."""
    draw = random.Random(f"{steps} {rows} {length}")
    root.mkdir(parents=True, exist_ok=True)
    name = HOSTILE[0] if hostile else root.name
    config = {
        "student": {"model": "gym:student"},
        "teacher": {"model": "gym:teacher"},
        "data": {"train": "sums.jsonl"},
        "method": {"name": "topd"},
        "rollout": {"prompts": 64, "n": 1},
        "optim": {"steps": steps, "lr": 1e-3},
        "run": {"name": name, "seed": 0},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "environment.json").write_text(json.dumps({"packages": {"onpath": "0.1.0"}, "grader": "exact"}))
    done = steps if finished else steps // 2
    write_lines(root / "metrics.jsonl", [metrics_row(draw, step, steps) for step in range(1, done + 1)])
    write_lines(root / "eval.jsonl", [eval_row(step / steps, step) for step in (0, steps // 2, steps)])
    for step in (1, steps // 2, steps):
        made = [trajectory(draw, step, i, length, hostile) for i in range(rows)]
        write_parquet(root / "trajectories" / f"step_{step:06d}.parquet", made)
    write_probe(root)
    if finished:
        (root / "model").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (root / "model" / name).touch()
    return root


def write_probe(root: Path) -> None:
    """What the prefix-failure probe leaves: four wrong rollouts, first errors at 4 and 8, a right one."""
    rows = [
        {
            "prompt_id": f"p{i}",
            "right": error is None,
            "tokens": ["a"] * 12,
            "first_error": error,
            "positions": [0, 4, 8],
            "trials": 4,
            "student": [2, 1, 0] if i else [4, 1, 0],
            "teacher": [4, 4, 0] if error == 8 else [4, 2, 0],
            "onset_mass": [0.01 * i] * 12,
            "token_probability": [0.5] * 12,
            "failed": [False, False, True],
        }
        for i, error in enumerate((4, 4, 4, 8, None))
    ]
    (root / "probes").mkdir(exist_ok=True)
    write_lines(root / "probes" / "prefix_failure.jsonl", rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics_row(draw: random.Random, step: int, steps: int) -> dict[str, Any]:
    """A line of metrics.jsonl as several methods would write it."""
    part = step / steps
    shares = [0.4 + 0.2 * part, 0.02, 0.3 - 0.1 * part, 0.28 - 0.1 * part]
    return {
        "step": step,
        "loss": 1 - 0.5 * part,
        "tokens": 2000 + step,
        "reverse_kl_nats": 0.6 * 0.2**part + 0.02 * draw.random(),
        "forward_kl_nats": 0.5 * 0.3**part,
        "student_entropy_nats": 0.5 - 0.2 * part,
        "teacher_entropy_nats": 0.2,
        "accuracy": 0.4 + 0.4 * part + 0.05 * draw.random(),
        "mean_length": 40 - 3 * part,
        "finished": 0.98,
        "student_tokens_generated": 2100,
        "grad_norm": 1.5 - part,
        "lr": 1e-3,
        "policy_version": step,
        **dict(zip(CELLS, shares, strict=True)),
        "accuracy_y": shares[0] + shares[1],
        "accuracy_z": shares[0] + shares[2],
        "length_ratio": 0.9,
        "epistemic_mass_y": 0.007,
        "epistemic_mass_z": 0.002,
        "guidance_grad_ratio": 0.5,
        "target_teacher_share": round(0.73 + 0.04 * step, 2),
        "target_own_share": 0.6,
        "target_entropy_nats": None if step == 1 else 0.4,
        "seconds": {
            "sample": 0.8,
            "correct": 1.1 + 0.2 * draw.random(),
            "score": 0.3,
            "train": 0.9,
            "sync": 0.0,
            "grade": 0.1,
        },
    }


def eval_row(part: float, step: int) -> dict[str, Any]:
    middle = 0.42 + 0.4 * part
    return {
        "step": step,
        "split": "test",
        "n": 4,
        "k": 4,
        "problems": 500,
        "avg_at_k": middle,
        "ci95": [middle - 0.03, middle + 0.03],
        "pass_at_k": middle + 0.1,
        "pass_at_k_ci95": [middle + 0.07, middle + 0.12],
        "mean_length": 39.0,
        "finished": 0.99,
    }


def trajectory(draw: random.Random, step: int, i: int, length: int, hostile: bool) -> dict[str, Any]:
    """A stored row: every third is a rewrite, every third has forks."""
    tokens = [draw.choice(HOSTILE if hostile and draw.random() < 0.3 else WORDS) for _ in range(length)]
    ids = [abs(hash(t)) % 30_000 if t not in WORDS else WORDS.index(t) for t in tokens]
    kind = ("none", "rewrite", "forks")[i % 3]
    right = draw.random() < 0.5
    values = {name: [draw.expovariate(1.2) ** 2 for _ in tokens] for name in QUANTITIES}
    values |= {name: [-v for v in values[name]] for name in ("student_logp", "teacher_logp")}
    row: dict[str, Any] = {
        "step": step,
        "prompt_id": f"p{i}",
        "sample": 0,
        "prompt": HOSTILE[i % len(HOSTILE)] if hostile else f"{i} + 7 = ?",
        "answer": str(i + 7),
        "correct": right,
        "student_context": [1, 2],
        "teacher_context": [1, 2],
        "response": ids,
        "response_text": "".join(tokens),
        "tokens": tokens,
        "weights": [1.0] * length,
        "origin_response": ids,
        "origin_text": "".join(tokens),
        "origin_logprobs": values["student_logp"],
        "finish_reason": "stop",
        "policy_version": step - 1,
        "edit": "none",
        "kept": True,
        "reason": "",
        "detail": {},
        **values,
    }
    if i % 4 != 3 and (length < 100 or i < 8):  # as of a run that stored them; older ones have not
        for who in ("student", "teacher"):
            row[f"{who}_top_tokens"] = [[t, *draw.sample(WORDS, 4)] for t in tokens]
            row[f"{who}_top_logp"] = [
                sorted((-draw.expovariate(1) for _ in range(5)), reverse=True) for _ in ids
            ]
    if kind == "rewrite":
        y = [t if draw.random() < 0.8 else draw.choice(WORDS) for t in range(len(WORDS))]
        row |= {
            "origin_response": [t if isinstance(t, int) else WORDS.index(t) for t in y],
            "edit": "rewrite",
        }
        row["origin_text"] = "".join(WORDS[t] for t in row["origin_response"])
        row["detail"] = {
            "attempt_right": right,
            "right": True,
            "edit_distance": 5,
            "length_ratio": length / len(y),
        }
    if kind == "forks":
        places = sorted(draw.sample(range(length), max(2, length // 45)))
        row["detail"] = {
            "forks": [fork(draw, tokens, values["reverse_kl"], at, n) for n, at in enumerate(places)]
        }
    return (
        {
            k: safe(v) if isinstance(v, str) else v
            for k, v in (row | {"detail": json.dumps(row["detail"])}).items()
        }
        | {
            name: [[safe(t) for t in place] for place in row[name]]
            for name in ("student_top_tokens", "teacher_top_tokens")
            if name in row
        }
        | {"tokens": [safe(t) for t in tokens]}
    )


def safe(text: str) -> str:
    """Parquet holds UTF-8: no lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def fork(draw: random.Random, tokens: list[str], losses: list[float], at: int, n: int) -> dict[str, Any]:
    ours = tokens[at : at + 14]
    theirs = [t if draw.random() < 0.6 else draw.choice(WORDS) for t in ours]
    draw.shuffle(theirs) if n % 3 == 2 else None
    plan = [[i, i, 0.85] for i in range(len(ours))] + [[i, i + 1, 0.15] for i in range(len(ours) - 1)]
    decision = ("fork", "surface")[n % 2]
    return {
        "position": at,
        "decision": decision,
        "loss": losses[at],
        "sampled_gap": draw.gauss(1, 1),
        "distance": 0.15 + 0.3 * (decision == "fork") + 0.1 * draw.random(),
        "weight": 1.0,
        "student_tokens": ours,
        "teacher_tokens": theirs,
        "plan": plan if decision == "fork" else [],
    }


def trajectory_rows(run: Path) -> list[dict[str, Any]]:
    """What `make_run` stored, `detail` parsed."""
    return [{**row, "detail": json.loads(row["detail"])} for row in read_trajectories(run)]


def make_study(root: Path) -> Path:
    """Two arms, two seeds of the first, one split of two problems with two samples each."""
    rows, arms = [], []
    for arm, seeds in (("opd", (0, 1)), ("trd <b>", (0,))):
        for seed in seeds:
            name = f"runs/{arm[:3]}-{seed}"
            run = make_run(root / name, steps=4 + 2 * seed, rows=3)
            write_lines(run / "eval.jsonl", [eval_row(0.1 * seed, 4)])
            write_details(run / "evals" / "test_step_000004.jsonl")
            rows.append({"arm": arm, "seed": seed, "run": name, "evals": {"test": eval_row(0.1 * seed, 4)}})
        mean = 0.42 + 0.05 * (arm != "opd")
        apart = {
            "mean": 0.05,
            "ci95": [-0.01, 0.11],
            "p_value": 0.1,
            "p_holm": 0.1,
            "verdict": "inside the noise",
        }
        measured = {
            "mean": mean,
            "ci95": [mean - 0.05, mean + 0.05],
            "difference": apart if arm != "opd" else None,
        }
        used = {
            "updated_tokens": 9e3,
            "tokens_generated_student": 8e3,
            "tokens_generated_teacher": 1e3,
            "wall_seconds": 9.5,
        }
        evals = {"test": {"avg_at_k": measured, "pass_at_k": measured, "mean_length": 39.0, "finished": 1.0}}
        arms.append(
            {
                "arm": arm,
                "kind": "train",
                "runs": len(seeds),
                "seeds": list(seeds),
                "steps": 4,
                "evals": evals,
                **used,
            }
        )
    about = {
        "name": "study",
        "base_arm": "opd",
        "seeds": [0, 1, 7],
        "splits": ["test"],
        "problems": {"test": 2},
        "n": 2,
        "k": 2,
    }
    notes = ["opd has no finished run for seed 7"]
    (root / "study.json").write_text(json.dumps({"study": about, "rows": rows, "arms": arms, "notes": notes}))
    return root


def write_details(path: Path) -> None:
    """Three problems, two samples each: both right, one right, none right."""
    path.parent.mkdir(exist_ok=True)
    shared = {"digest": "", "lengths": [9, 9], "finished": [True, True], "grader": "exact", "sampling": {}}
    rows = [
        {"id": "a", "correct": [True, True]},
        {"id": "b", "correct": [True, False]},
        {"id": "c", "correct": [False, False]},
    ]
    write_lines(path, [{**row, **shared} for row in rows])
