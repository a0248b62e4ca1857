"""Data parallelism with torch's own collectives: every rank takes its share of the prompts, sums go over all
ranks.

Losses are sums over a count that is known beforehand, so gradients are *summed*, never averaged: the result
is that of one process whatever the number of ranks.
"""

import heapq
import os
import pickle
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor

from onpath.system.errors import UserError, sentence_of
from onpath.system.launcher import several
from onpath.system.signals import Interrupted, Stopped
from onpath.system.text import one_line

T = TypeVar("T")
_MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SAID, _LEFT = "said", "left"
_runs: list[str] = []
"""Prefixes of this process's runs in the store where ranks meet."""
_GONE = (
    "another process of this run has ended before its time; what it printed says why; start the same command "
    "again to go on"
)
_SILENT = (
    "another process of this run was not heard of for parallel.timeout seconds; start the same command again "
    "to go on, with a higher one if a process may be at work for so long"
)
_HEARD = 60.0  # seconds that a rank which gives up waits for the others to hear of it
_ANSWERED = 5.0  # seconds in which whoever holds the store answers
_before_stop: list[Callable[[], None]] = []
_before_exchange: list[Callable[[], None]] = []
_lines: dict[int, int] = {}
"""Sockets to the other ranks: descriptor → inode, for descriptors are given out again."""
_held: list[Store] = []
"""Where the ranks have met: it ends with the group otherwise, and with it what this rank has to say."""
_boards: list[Store | None] = []
_MESSAGE = 2**24
"""Numbers that are copied to be summed at once: 64 MiB in float32."""
_PART = 2**24
"""Bytes of a parcel that travel at once."""
_words: list[str] = []
"""The board and what it said, once this rank has looked: whoever holds it may leave."""


def start(device: torch.device, *, timeout: float = 600.0) -> None:
    """Joins the process group of torchrun, if there is one (gloo on CPU, nccl on GPUs).

    Args:
        timeout: seconds that an exchange waits for a process before the run ends.

    Raises:
        UserError: the processes do not meet.
    """
    if several() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(local_device(device))
        patience = timedelta(seconds=timeout)
        try:
            store, here, many = next(rendezvous("env://", timeout=patience))
        except (dist.DistError, RuntimeError, ValueError) as error:
            mine, all_of_them, *where = (os.environ.get(n, "?") for n in _MEETING)
            raise UserError(
                f"process {mine} of {all_of_them} does not meet the others at {':'.join(where)} "
                f"(MASTER_ADDR, MASTER_PORT) within {timeout:g} s: {one_line(str(error), 200)}; start all "
                "with the first one's address, of a port that they can reach"
            ) from None
        # A launcher's store outlives a run, and the next run of the same processes must not find its words.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart
        _runs.append(f"onpath/{attempt}/{len(_runs)}")
        _held[:] = [store]
        with connecting():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(_runs[-1], store),
                rank=here,
                world_size=many,
                timeout=patience,
            )


@contextmanager
def one_fate() -> Iterator[None]:
    """In this block what ends one rank ends all of them, with the same sentence: it is left where the others
    find it when their next exchange fails. Leaves the process group at the end, and not before the others
    have ended their last exchange: gloo tells one that still waits for its wake-up that its peer is gone.
    Of ranks that have met before this block the group, and what ends it, is the caller's.

    Raises:
        UserError: this rank's own, or what another one said.
    """
    if several() and dist.is_initialized():
        yield
        return
    waits_in, patience = None, 0.0
    _boards.clear()
    _words.clear()
    try:
        try:
            yield
        except (Stopped, Interrupted):  # all of them
            _part()
            raise
        _part()
    except Exception as error:
        waits_in = _board()
        if sentence_of(error) or not lost_a_peer(error):
            patience = _HEARD if sentence_of(error) else 0.0
            _give_up(error, waits_in)
            raise
        _hang_up()
        raise UserError(_word(waits_in) or (_SILENT if "imed out" in str(error) else _GONE)) from None
    finally:
        stop()
        if waits_in is not None:
            _wait_for_all(waits_in, patience)
        _lines.clear()
        _held.clear()


def _part() -> None:
    """Waits until all ranks are here. What goes wrong in this exchange costs nothing any more."""
    if several() and dist.is_initialized() and dist.get_backend() == "gloo":
        with suppress(dist.DistError, RuntimeError):
            dist.barrier()


def all_know(error: Exception) -> bool:
    """Lets the others know what ends this rank, before the block of `one_fate` ends. Whether all end with one
    sentence, and so are still there; one that was killed left none."""
    board = _board()
    if sentence_of(error) or not lost_a_peer(error):
        _give_up(error, board)
    else:
        _hang_up()  # whoever waits for this one is told too
    return bool(_word(board))


def _give_up(error: Exception, board: Store | None) -> None:
    """Leaves its sentence for the others, if it has one, and lets their exchanges with this rank fail."""
    if board is not None and (sentence := sentence_of(error)):
        with suppress(dist.DistError, RuntimeError):  # the rank that holds it has left
            board.compare_set(_SAID, "", sentence)
    _hang_up()


def _word(board: Store | None) -> str:
    """What the first rank that gave up has left; empty: nothing. It is kept: whoever holds it may leave."""
    if board is not None and not _words:
        with suppress(dist.DistError, RuntimeError):
            _words.extend([board.get(_SAID).decode()] if board.check([_SAID]) else [])
    return _words[0] if _words else ""


@contextmanager
def connecting() -> Iterator[None]:
    """Around what makes a process group: the sockets that it opens are its own, for `_hang_up`."""
    before = _sockets()
    try:
        yield
    finally:
        _lines.update({line: inode for line, inode in _sockets().items() if before.get(line) != inode})


def _hang_up() -> None:
    """Lets the others' exchanges with this rank fail now. Leaving a group does not: whatever still holds it,
    as torch's shards do, keeps its sockets open to the end of the process, and the others wait as long."""
    here = _sockets()
    for line, inode in _lines.items():
        if here.get(line) == inode:
            with suppress(OSError), socket.socket(fileno=os.dup(line)) as held:
                if held.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                # Not one that listens, whose owner would not survive that, and not the store's, which the
                # others read this rank's word from; those of who joins late are accepted meanwhile.
                ends = held.getsockname()[1], held.getpeername()[1]
                if int(os.environ["MASTER_PORT"]) not in ends:
                    held.shutdown(socket.SHUT_RDWR)


def _sockets() -> dict[int, int]:
    """Of this process: descriptor → inode."""
    found = {}
    with suppress(OSError):  # where descriptors are no files there is nothing to see
        for line in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):  # the listing's own
                state = os.fstat(line)
                if stat.S_ISSOCK(state.st_mode):
                    found[line] = state.st_ino
    return found


def _board() -> Store | None:
    """Where ranks leave word for each other without an exchange; None: they have not met, or no longer meet.
    One may have left while another still joins the group."""
    if not several() or not (dist.is_initialized() or _held):
        return None
    if not _boards:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=_ANSWERED))
            _boards.append(PrefixStore(_runs[-1] if _runs else "onpath", store))
        except (dist.DistError, RuntimeError):  # the rank that holds it has left
            _boards.append(None)
    return _boards[0]


def lost_a_peer(error: Exception) -> bool:
    """Whether an exchange failed, because another rank has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _wait_for_all(board: Store, patience: float) -> None:
    """Until every rank has left, so that a launcher that ends the others at the first exit does not silence
    them; not for long: one that computes does not hear."""
    end = time.monotonic() + patience
    with suppress(dist.DistError, RuntimeError):
        left = board.add(_LEFT, 1)
        while left < int(os.environ["WORLD_SIZE"]) and time.monotonic() < end:
            time.sleep(0.05)
            left = board.add(_LEFT, 0)


def stop() -> None:
    """Leaves the process group of torchrun; one that a library made for itself is its own affair."""
    while _before_stop:
        _before_stop.pop()()
    if several() and dist.is_initialized():
        dist.destroy_process_group()


def before_stop(close: Callable[[], None]) -> Callable[[], None]:
    """Lets `close` run before this process leaves the group, which what it closes has groups of.

    Returns:
        Runs it now, if it has not run.
    """

    def now() -> None:
        if close in _before_stop:
            _before_stop.remove(close)
            close()

    _before_stop.append(close)
    return now


@contextmanager
def before_exchange(catch_up: Callable[[], None]) -> Iterator[None]:
    """In this block `catch_up` runs before each exchange of all ranks: one that has come to it may be needed
    by another on its way there."""
    _before_exchange.append(catch_up)
    try:
        yield
    finally:
        _before_exchange.remove(catch_up)


def _meet() -> None:
    for catch_up in _before_exchange:
        catch_up()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this rank on its host; other devices unchanged."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its host, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world() -> int:
    """Processes on this host, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def share(items: Sequence[T]) -> list[T]:
    """This rank's items: every world-th one."""
    return list(items[rank() :: world()])


def gather(items: Sequence[T]) -> list[T]:
    """All ranks' items, in the order that `share` took them from."""
    if world() == 1:
        return list(items)
    _meet()
    parts: list[list[T]] = [[] for _ in range(world())]
    dist.all_gather_object(parts, list(items))
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def first_decides(decide: Callable[[], T]) -> T:
    """What the first process finds, on every one; so is its refusal, for a process that went on alone would
    wait for the others.

    Raises:
        UserError: the first process raised it.
    """
    if world() == 1:
        return decide()
    _meet()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    found: T = answer[0]
    return found


def dealt(
    items: Sequence[T], length: Callable[[T], int], *, together: Callable[[T], object] | None = None
) -> list[T]:
    """All ranks' items dealt anew, the longest first, each to the rank that has least so far: an exchange
    waits for the slowest. A rank's own stay in the order of `gather`.

    Args:
        together: items of which this is equal go to one rank.
    """
    if world() == 1:
        return list(items)
    everyone = gather(items)
    groups: dict[object, list[int]] = {}
    for i, item in enumerate(everyone):
        groups.setdefault(i if together is None else together(item), []).append(i)
    sizes = [(sum(length(everyone[i]) for i in group), group) for group in groups.values()]
    loads, mine = [(0, r) for r in range(world())], []
    for size, group in sorted(sizes, key=lambda pair: (-pair[0], pair[1])):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, least))
        mine += group if least == rank() else []
    return [everyone[i] for i in sorted(mine)]


def exchanged(parcels: Sequence[T]) -> list[T]:
    """What every rank has for this one, in the order of ranks.

    Args:
        parcels: one for each rank, this one too.
    """
    if world() == 1:
        return list(parcels)
    _meet()
    packed = [torch.frombuffer(bytearray(pickle.dumps(p)), dtype=torch.uint8) for p in parcels]
    sizes = torch.tensor([len(p) for p in packed], device=_sending())
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    found = [torch.empty(size, dtype=torch.uint8) for size in coming.tolist()]
    # Parcels lie in host memory, and may be more than a device has left: a part of each at a time.
    for begin in range(0, most(max(map(len, packed))), _PART):
        out, into = ([one[begin : begin + _PART] for one in ones] for ones in (packed, found))
        theirs, ours = ([len(part) for part in parts] for parts in (into, out))
        arrived = torch.empty(sum(theirs), dtype=torch.uint8, device=_sending())
        dist.all_to_all_single(arrived, torch.cat(out).to(arrived.device), theirs, ours)
        for part, piece in zip(into, arrived.split(theirs), strict=True):
            part.copy_(piece)
    return [pickle.loads(one.numpy().tobytes()) for one in found]


def most(here: int) -> int:
    """The largest of all ranks' numbers."""
    if world() == 1:
        return here
    _meet()
    found = torch.tensor(here, device=_sending())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def anywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    return here if world() == 1 else total([float(here)], device)[0] > 0


def total(values: Iterable[float], device: torch.device | None = None) -> list[float]:
    """Each value summed over all ranks, in float64.

    Args:
        device: None: what the process group can send from.
    """
    sums = torch.tensor(list(values), dtype=torch.float64, device=device or _sending())
    if world() > 1:
        _meet()
        dist.all_reduce(sums)
    return [float(v) for v in sums]


def total_by_name(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Each value summed over all ranks, 0 where a rank has none of its name."""
    names = list(dict.fromkeys(gather(list(values))))
    return dict(zip(names, total([values.get(name, 0.0) for name in names], device), strict=True))


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all ranks; those of a sharded model are sums already. Where no rank has any
    there is none afterwards: AdamW leaves such a weight alone, and would decay it by a gradient of zeros."""
    if world() == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    ranks = total([float(p.grad is not None) for p in trained], trained[0].device)
    for p, any_rank in zip(trained, ranks, strict=True):
        if p.grad is None and any_rank:  # a rank whose share was empty
            p.grad = torch.zeros_like(p)
    sum_tensors([p.grad for p in trained if p.grad is not None])


def sum_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Each summed over all ranks, in place; rows of sharded ones are sums already. Small ones travel
    together: copies never take more than one message."""
    if world() == 1:
        return
    tensors = [t for t in tensors if not isinstance(t, DTensor)]
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        for together in _messages([t for t in tensors if t.dtype == dtype]):
            if len(together) == 1 and together[0].is_contiguous():
                dist.all_reduce(together[0])
                continue
            flat = torch.cat([t.flatten() for t in together])
            dist.all_reduce(flat)
            for tensor, part in zip(together, flat.split([t.numel() for t in together]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _messages(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of together at most `_MESSAGE` numbers; a larger one alone."""
    found: list[torch.Tensor] = []
    for tensor in tensors:
        if found and sum(t.numel() for t in found) + tensor.numel() > _MESSAGE:
            yield found
            found = []
        found.append(tensor)
    if found:
        yield found


def _sending() -> torch.device | None:
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else None


def barrier() -> None:
    if world() > 1:
        _meet()
        dist.barrier()
