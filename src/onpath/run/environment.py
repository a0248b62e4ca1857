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
from onpath.system import distributed

_PACKAGES = ("onpath", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")


def environment(parts: Parts) -> dict[str, Any]:
    """Versions, device, commit, seeds: what it takes to repeat a run. No environment variables."""
    cuda = parts.models.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "device": torch.cuda.get_device_name(parts.models.device)
        if cuda
        else platform.processor() or platform.machine(),
        "processes": distributed.world(),
        "threads": torch.get_num_threads(),
        "git_commit": _commit(),
        "seeds": {"run": parts.config.run.seed, "eval": parts.config.eval.seed},
        "stops": parts.stops.to_json(),
        "skipped_rows": parts.prompts.skipped,
        "skipped_eval_rows": dict(parts.prompts.skipped_evals),
        "grader": parts.text.grader.name,
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


@cache
def _commit() -> str | None:
    """Of the checkout that onpath runs from; None: it runs from none."""
    with suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return None
