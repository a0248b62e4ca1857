"""The bundled pair of the maze: both from scratch, on demonstrations, one after the other on one core."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from onpath.gym.maze.mixture import Mixture
from onpath.gym.maze.vocab import LANGUAGE
from onpath.gym.pretrain import Recipe, build_model, fit, save

RECIPES = {
    "student": Recipe(role="student", tokens=2_200_000, batch_tokens=2000, decay=0.5, language=LANGUAGE),
    "teacher": Recipe(role="teacher", tokens=7_000_000, batch_tokens=2000, decay=0.5, language=LANGUAGE),
    "refiner": Recipe(
        role="refiner", tokens=3_000_000, batch_tokens=2000, decay=0.8, language=LANGUAGE,
        learning_rate=1.5e-3, muon_rate=0.01,
    ),
}  # fmt: skip
"""The refiner goes on from the teacher, at half its rates."""
QUICK_TOKENS = 6_000


def make_models(out: Path, *, seed: int = 0, quick: bool = False, log: Callable[[str], None] = print) -> None:
    """Both models into `out/teacher` and `out/student`."""
    torch.set_num_threads(1)
    for model_of, stages in {"student": ("student",), "teacher": ("teacher", "refiner")}.items():
        model = build_model(model_of, seed, LANGUAGE)
        for stage in stages:
            recipe = RECIPES[stage]
            recipe = replace(recipe, seed=seed, tokens=QUICK_TOKENS if quick else recipe.tokens)
            fit(model, Mixture(stage), recipe, log)
        save(model, out / model_of, LANGUAGE)
