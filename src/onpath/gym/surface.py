"""A student with fewer habits: `gym:student?surface=0.5`.

At 0 it is the bundled student after a warm start: SFT on demonstrations with its own misbeliefs in the
teacher's surface forms. (TOPD's first stage is SFT on the teacher's samples. Here that removes errors before
habits: 16 updates took the student from 41% to 63%, and reverse KL at habits from 5.3 to 2.7 nats only. So
this warm start teaches the forms alone.) In between, the weights are both models' mean.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onpath.gym.models import BUNDLED

TOKENS = 1_000_000
QUICK_TOKENS = 3_000


def student(surface: float) -> Path:
    """Directory of the student that has this share of its habits: bundled at 0 and 1, else made once and kept
    in the user's cache."""
    ends = {1.0: BUNDLED / "student", 0.0: BUNDLED / "student-without-habits"}
    if surface in ends:
        return ends[surface]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onpath"
    made = home / f"gym-student-surface-{surface!r}"
    if not (made / "model.safetensors").is_file():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as beside:
            _mix(ends[1.0], ends[0.0], surface, Path(beside) / "model")
            try:
                (Path(beside) / "model").rename(made)
            except OSError as error:
                # Whoever was first has written the same: the weights depend on `surface` alone.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    return made


def _mix(with_habits: Path, without: Path, share: float, out: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(with_habits, out)
    one, other = (load_file(path / "model.safetensors") for path in (with_habits, without))
    mixed = {name: share * weight + (1 - share) * other[name] for name, weight in one.items()}
    save_file(mixed, out / "model.safetensors", metadata={"format": "pt"})


def make_student(
    out: Path, *, seed: int = 0, quick: bool = False, log: Callable[[str], None] = print
) -> None:
    """The student without habits into `out/student-without-habits`, from the bundled one; some minutes."""
    import torch

    from onpath.gym.mixture import Mixture
    from onpath.gym.pretrain import Recipe, fit, save
    from onpath.gym.recipe import load

    torch.set_num_threads(1)
    recipe = Recipe(role="student", tokens=TOKENS, learning_rate=1e-3, muon_rate=5e-3, decay=1.0, seed=seed)
    model, mixture = load(BUNDLED / "student"), Mixture("student", curriculum=0.0, habits=False)
    fit(model, mixture, replace(recipe, tokens=QUICK_TOKENS) if quick else recipe, log)
    save(model, out / "student-without-habits")
