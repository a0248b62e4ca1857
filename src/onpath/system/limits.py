"""What somebody else's code may take at most: it is tried in a process of its own first."""

import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

_DONE, _TOO_MUCH, _FAILED = b"d", b"m", b"f"
_SIZES = Path("/proc/self/statm")


def excess(run: Callable[[], object], *, seconds: float, memory: int) -> str:
    """Runs something in a copy of this process, which nothing of it outlives.

    Args:
        seconds: wall time until it is killed.
        memory: bytes that it may take beside what this process has.

    Returns:
        What it takes too much of; empty: nothing, also where it raises (that will be said when it runs here).
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads: the copy runs pure Python and takes no lock that one could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _try(run, writing, memory)
    os.close(writing)
    try:
        ended, _, _ = select.select([reading], [], [], seconds)
        if not ended:
            return f"takes more than {seconds:g} s"
        return "" if os.read(reading, 1) in (_DONE, _FAILED) else f"takes more than {memory / 2**20:.0f} MiB"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _try(run: Callable[[], object], writing: int, memory: int) -> None:
    """In the copy; never returns."""
    said = _TOO_MUCH
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if _SIZES.exists():  # Linux; elsewhere time is the only limit
            most = int(_SIZES.read_text().split()[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        run()
        said = _DONE
    except MemoryError:
        pass
    except BaseException:
        said = _FAILED
    finally:
        os.write(writing, said)
        os._exit(0)
