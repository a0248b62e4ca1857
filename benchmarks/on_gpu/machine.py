"""What it runs on, and the two ceilings: a matrix product and a copy."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from common import environment

from on_gpu.device import DEVICE, copy_bandwidth, matrix_flops

PACKAGES = ("torch", "transformers", "peft", "triton", "trl", "liger-kernel", "datasets", "pydantic")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(record: Any, *, tiny: bool, left: Any) -> None:
    found = environment()
    what = {"device": found["processor"], "commit": found["commit"], "date": found["date"]}
    if DEVICE.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        what |= {"memory, GiB": about.total_memory / 2**30, "multiprocessors": about.multi_processor_count}
        what |= {"CUDA": torch.version.cuda}
    record("Machine", **what, Python=platform.python_version())
    record("Versions", **{name: _version(name) for name in PACKAGES})
    size, copied = (256, 2**20) if tiny else (8192, 2**32)
    record(
        "Ceilings",
        **{
            f"bf16 product {size}³, TFLOP/s": matrix_flops(size) / 1e12,
            "copy, TB/s read and written": copy_bandwidth(copied) / 1e12,
        },
    )
