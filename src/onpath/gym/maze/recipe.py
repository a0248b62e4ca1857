"""The bundled pair of the maze: both from scratch, on demonstrations, one after the other on one core."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from onpath.gym.maze.mixture import Mixture
from onpath.gym.maze.vocab import LANGUAGE
from onpath.gym.pretrain import Recipe, build_model, fit, save

RECIPES = {
    "student": Recipe(role="student", tokens=1_600_000, batch_tokens=2000, decay=0.5, language=LANGUAGE),
    "teacher": Recipe(role="teacher", tokens=2_500_000, batch_tokens=2000, decay=0.5, language=LANGUAGE),
}
QUICK_TOKENS = 6_000


def make_models(out: Path, *, seed: int = 0, quick: bool = False, log: Callable[[str], None] = print) -> None:
    """Both models into `out/teacher` and `out/student`."""
    torch.set_num_threads(1)
    for role, recipe in RECIPES.items():
        recipe = replace(recipe, seed=seed, tokens=QUICK_TOKENS if quick else recipe.tokens)
        model = build_model(role, seed, LANGUAGE)
        fit(model, Mixture(role), recipe, log)
        save(model, out / role, LANGUAGE)
