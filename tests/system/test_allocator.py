"""Freed memory stays with the process, unless the user set the allocator."""

import os
import platform
import subprocess
import sys

import pytest

linux = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

FAULTS = """
import ctypes, resource, sys
from onpath.system.allocator import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.free.restype = ctypes.c_void_p, [ctypes.c_void_p], None
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(2**20) for _ in range(32)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(mode: str, **environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and the page faults of the last of four equal steps (32 MiB)."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@linux
def test_the_same_step_faults_nothing_in_again() -> None:
    said, faults = run("keep")
    assert said == "True"
    assert faults < 100
    assert run("leave")[1] > 4000  # else this test would show nothing


@linux
@pytest.mark.parametrize(
    "setting",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_the_users_own_setting_stands(setting: dict[str, str]) -> None:
    assert run("keep", **setting)[0] == "False"
