"""What torchrun tells each process of a run by its environment: read, and said. The command line asks, so no
torch."""

import os
import socket

_ports: set[str] = set()
"""Given out by this process."""


def several() -> bool:
    """Whether a launcher has started several processes, met or not."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def speaks() -> bool:
    """Whether this process says what all of them have found."""
    return not several() or os.environ.get("RANK") == "0"


def environments(processes: int) -> list[dict[str, str]]:
    """What each of so many processes on this host is told; they meet at a port of their own."""
    many = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    return [{**many, **meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))]


def _free_port() -> str:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if port not in _ports:  # whom it was given to may not be there yet
            _ports.add(port)
            return port
