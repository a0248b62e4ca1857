"""The bundled models' recipe: a student on noisy demonstrations, a teacher that also saw its attempts.

Student and the teacher's first stage are independent and train side by side, one core each; in its second
stage the teacher refines real attempts of the finished student.
"""

import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from onpath.gym.demos import EVEN_SLIP, TEACHER_SLIP
from onpath.gym.mixture import Mixture
from onpath.gym.pretrain import Recipe, build_model, fit, save
from onpath.gym.sample import sample
from onpath.gym.tasks import random_problem

STUDENT = Recipe(role="student", tokens=12_000_000)
TEACHER_FIRST = Recipe(role="teacher", tokens=7_500_000, decay=0.0)
TEACHER_SECOND = Recipe(role="teacher", tokens=5_000_000, decay=0.7)
POOL = 8000
QUICK_TOKENS = 6_000
QUICK_POOL = 10

Log = Callable[[str], None]


def train_student(out: Path, seed: int, tokens: int = STUDENT.tokens, log: Log = print) -> None:
    """The student, from scratch, on demonstrations with its misbeliefs and habits."""
    torch.set_num_threads(1)
    model = build_model("student", seed)
    fit(model, Mixture("student"), replace(STUDENT, tokens=tokens, seed=2 * seed), log)
    save(model, out)


def train_teacher(
    out: Path,
    seed: int,
    tokens: int,
    start: Path | None = None,
    pool: list[tuple[str, str]] | None = None,
    log: Log = print,
) -> None:
    """The teacher's first stage (no `start`), or its second, on a pool of the student's attempts."""
    torch.set_num_threads(1)
    if start is None:
        model, recipe, curriculum = build_model("teacher", seed), TEACHER_FIRST, 0.2
    else:
        model, recipe, curriculum = load(start), TEACHER_SECOND, 0.0
    slips = EVEN_SLIP if start is None else TEACHER_SLIP
    mixture = Mixture("teacher", curriculum=curriculum, pool=pool or [], slips=slips)
    fit(model, mixture, replace(recipe, tokens=tokens, seed=2 * seed + (start is not None)), log)
    save(model, out)


def load(path: Path) -> Any:
    """A checkpoint, in training mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).train()


def sample_pool(student: Path, n: int, seed: int) -> list[tuple[str, str]]:
    """Real attempts of the student on training problems: (problem text, response text)."""
    torch.manual_seed(seed)
    rng = random.Random(f"pool/{seed}")
    messages = [random_problem(rng, "train").text for _ in range(n)]
    made = sample(load(student).eval(), messages)
    return [(m, "".join(t for t in tokens if t != "<eos>")) for m, tokens in zip(messages, made, strict=True)]


def make_models(out: Path, *, seed: int = 0, quick: bool = False, log: Log = print) -> None:
    """Both models into `out/student` and `out/teacher`."""
    first = out / "teacher-first-stage"
    if quick:
        train_student(out / "student", seed, QUICK_TOKENS, log)
        train_teacher(first, seed, QUICK_TOKENS, log=log)
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as both:
            jobs = [
                both.submit(train_student, out / "student", seed),
                both.submit(train_teacher, first, seed, TEACHER_FIRST.tokens),
            ]
            for job in jobs:
                job.result()
    pool = sample_pool(out / "student", QUICK_POOL if quick else POOL, seed)
    train_teacher(out / "teacher", seed, QUICK_TOKENS if quick else TEACHER_SECOND.tokens, first, pool, log)
