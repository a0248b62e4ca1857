"""The C library's allocator on CPUs, set so that what a step frees is still there for the next one."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_OWN_MAPPING = 32 * 2**20  # larger blocks go back to the system at once: glibc's own upper limit
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """glibc gives free memory at the end of the heap back to the system, and the next step faults it in anew,
    4 KiB at a time. From now on this process keeps it.

    Returns:
        False where the user chose (`MALLOC_…`, `GLIBC_TUNABLES`, `LD_PRELOAD`) or the C library is another.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if chosen or "LD_PRELOAD" in os.environ or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _OWN_MAPPING) and mallopt(_TRIM_THRESHOLD, _NEVER))


def give_back() -> None:
    """What this process has freed so far goes back to the system, once: models that were whole while they
    were loaded, or checked, leave holes into which nothing of a step fits."""
    if platform.libc_ver()[0] == "glibc" and "LD_PRELOAD" not in os.environ:
        ctypes.CDLL(None).malloc_trim(0)
