"""Jobs as processes forked from one server that has imported everything: a small run takes about as long as
the imports.

The server only imports. Threads, GPUs and files are each job's own, set after the fork; nothing has touched
an accelerator before it.
"""

import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from onpath.system import code


class _Descriptor:
    """A descriptor that stays open in the process that this is sent to."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _kept, (DupFd(self.number),)


def _kept(sent: Any) -> int:
    return int(sent.detach())


def start(work: str, config: Path, *, log: Path, lock: int, environment: Mapping[str, str]) -> BaseProcess:
    """Starts one function of `study.worker` in a process of its own; what it returns is the exit code.

    Args:
        work: the function's name.
        config: its argument.
        log: where everything that the process prints is appended.
        lock: a descriptor that the process holds as long as it lives.
        environment: all variables of the process. Own code may run there if it may here.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["onpath.commands.study.worker"])
    arguments = (work, config, log, _Descriptor(lock), dict(environment), code.is_allowed())
    process = context.Process(target=_begin, args=arguments)
    process.start()
    return process


def _begin(
    work: str, config: Path, log: Path, lock: int, environment: dict[str, str], own_code: bool
) -> None:
    del lock  # open until the process ends
    if own_code:
        code.allow()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as output, open(os.devnull, "rb") as nothing:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import torch

    from onpath.commands.study import worker

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the server had its own
    sys.exit(getattr(worker, work)(config))
