"""What all benchmarks share: the environment line, medians with spread, peak memory of this process."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment(*packages: str) -> dict[str, Any]:
    """When, with what and on what: enough to repeat a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("ONPATH_COMMIT") or commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }


def commit() -> str | None:
    """None where there is no git, or no repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def environment_line(found: Mapping[str, Any]) -> str:
    """The same as one line of text."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['date']}, commit {found['commit']}, {found['processor']}, {found['threads']} threads, "
        f"Python {found['python']}, {versions}"
    )


def processor() -> str:
    """The GPU if torch sees one, else the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles.

    >>> str(Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]))
    '3.000 [2.000, 4.000]'
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=middle, low=low, high=high, n=len(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


class PeakMemory:
    """Peak resident memory of this process by phase, from the kernel's own high-water mark (Linux)."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
        yield
        self.mib[phase] = max(self.mib.get(phase, 0.0), _status("VmHWM"))

    @staticmethod
    def now() -> float:
        """Resident memory at this moment, MiB."""
        return _status("VmRSS")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def gym_settings(directory: Path, *, train: str, prompts: int, micro_batch_tokens: int) -> dict[str, Any]:
    """The config of steps on the gym that hardly move the weights, with no evaluation."""
    return {
        "student": {"device": "cpu"},
        "teacher": {"device": "cpu"},
        "data": {"train": train, "eval": {}},
        "rollout": {"prompts": prompts},
        "optim": {"steps": 1000, "lr": 1e-7, "schedule": "constant", "warmup": 0.0,
                  "micro_batch_tokens": micro_batch_tokens},
        "run": {"dir": str(directory / "runs"), "name": "step"},
    }  # fmt: skip


def write(name: str, data: Mapping[str, Any], markdown: str) -> None:
    """`results/<name>.json` and `.md`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown.rstrip() + "\n")
    print(markdown)
