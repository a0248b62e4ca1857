"""What it takes to repeat a run."""

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from onpath.run.parts import Parts
from onpath.system import __version__, distributed, products

_PACKAGES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy")


def environment(parts: Parts) -> dict[str, Any]:
    """Versions, device, commit, seeds: what it takes to repeat a run. No environment variables."""
    cuda = parts.models.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "packages": dict(versions()),
        "device": torch.cuda.get_device_name(parts.models.device)
        if cuda
        else platform.processor() or platform.machine(),
        "processes": distributed.world(),
        "threads": torch.get_num_threads(),
        "float32_products": "oneDNN" if not cuda and products.ahead() else "PyTorch's own",
        "git_commit": _commit(),
        "seeds": {"run": parts.config.run.seed, "eval": parts.config.eval.seed},
        "stops": parts.stops.to_json(),
        "skipped_rows": parts.prompts.skipped,
        "skipped_eval_rows": dict(parts.prompts.skipped_evals),
        "grader": parts.text.grader.name,
    }


@cache
def versions() -> dict[str, str]:
    """Of what decides numbers."""
    return {"onpath": __version__, **{name: version(name) for name in _PACKAGES}}


@cache
def _commit() -> str | None:
    return commit_of(Path(__file__).parents[1] / "__init__.py")


def commit_of(package: Path) -> str | None:
    """The commit of onpath's checkout, with -dirty where tracked files are others than there.

    Args:
        package: onpath's `__init__.py`, as it runs.

    Returns:
        None: it runs from no checkout of its own. An environment inside somebody's repository is none.
    """
    with suppress(OSError, subprocess.SubprocessError):
        top = Path(_git(package.parent, "rev-parse", "--show-toplevel"))
        if (top / "src" / "onpath" / "__init__.py").samefile(package):
            return _git(top, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=5, check=True
    ).stdout.strip()
