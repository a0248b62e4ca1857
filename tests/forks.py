"""Processes without a launcher: forks of the test's own, which has imported everything (a new one takes five
seconds or more for that)."""

import faulthandler
import os
import random
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from onpath.system import distributed
from onpath.system.errors import guarded

TIMEOUT = 30.0  # seconds of an exchange: a rank that hangs is a failure, not a long test


def forked(what: Callable[[int], Any], tmp_path: Path, *, world: int = 2) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank after `what(rank)`, which joins the group itself.

    Args:
        tmp_path: their output goes there.
    """
    port = free_port()
    started = []
    for rank in range(world):
        process = os.fork()
        if process == 0:
            for name, stream in (("out", 1), ("err", 2)):
                os.dup2(os.open(tmp_path / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            faulthandler.enable(sys.stderr)  # what a signal ended says where
            os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            code = guarded(lambda rank=rank: what(rank) and None)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        started.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    said = [[(tmp_path / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(world)]
    return [(code, *texts) for code, texts in zip(codes, said, strict=True)]


def begun(what: Callable[[], int]) -> BaseProcess:
    """A process that says nothing and ends with what `what` returns; it may be killed meanwhile."""

    def run() -> None:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.exit(what())

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def ended(process: BaseProcess, *, within: float = 240.0) -> int:
    """Its exit code, once it has ended: −9 if it was killed."""
    process.join(within)
    assert process.exitcode is not None, "it is still running"
    return process.exitcode


def ranks(what: Callable[[int], Any], tmp_path: Path, *, world: int = 2) -> list[tuple[int, str, str]]:
    """`forked`, of ranks that have met before `what` and meet again after it."""

    def run(rank: int) -> None:
        with distributed.one_fate():
            distributed.start(torch.device("cpu"), timeout=TIMEOUT)
            what(rank)
            distributed.barrier()
            distributed.barrier()

    return forked(run, tmp_path, world=world)


def done_by_all(what: Callable[[int], Any], tmp_path: Path, *, world: int) -> None:
    """`forked`, of ranks that must succeed."""
    ended = forked(what, tmp_path, world=world)
    codes = [code for code, _, _ in ended]
    assert codes == [0] * world, f"exit codes {codes}\n{''.join(err for _, _, err in ended)}"


def done_by_two(what: Callable[[int], Any], tmp_path: Path) -> None:
    done_by_all(what, tmp_path, world=2)


def free_port() -> str:
    return free_ports(1)[0]


def free_ports(count: int) -> list[str]:
    """Below those that the system gives to whoever asks for any, and to each outgoing connection: a port must
    still be free when a long test comes to it."""
    found: list[socket.socket] = []
    with ExitStack() as held:
        while len(found) < count:
            tried = held.enter_context(socket.socket())
            with suppress(OSError):
                tried.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
                found.append(tried)
        return [str(one.getsockname()[1]) for one in found]
