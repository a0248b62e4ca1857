"""Trained weights over vLLM's own transfer (`rollout.push: nccl`): from the trainer's GPU to those of the
servers, without a file.

The first process opens one NCCL group with each server's workers (`vllm.distributed.weight_transfer`, vLLM
0.29 and later), and sends what it has copied to its own memory when the step ended: a server that comes back
later is given the same, whatever has been trained since. A server says by a version's name what it took last,
so that one that was started anew is known, and met anew.
"""

import contextlib
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import torch
from torch import Tensor, nn

from onpath.engines.adapters import merged_weights
from onpath.engines.remote.host import Busy, Host
from onpath.engines.remote.wire import understood
from onpath.engines.weights import checkpoint_weights, take_part
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.text import one_line

_GRACE = 5.0  # seconds that our side has after a server has refused its own


class Sender(Protocol):
    """An open group with the workers of one server."""

    def send_weights(self) -> None:
        """Gives them what the source has."""


@dataclass(frozen=True)
class _Meta:
    """Of one tensor on the way, as vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source:
    """The weights of the last push, in this process's memory; vLLM's `WeightSource`.

    Args:
        device: where they are sent from.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.held = device, list[tuple[str, Tensor]]()

    def metadata(self) -> list[_Meta]:
        """Names, types and shapes, in order."""
        return [_Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.held]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(self.device)) for name, tensor in self.held)


class Client:
    """What a server is asked for around a transfer; vLLM's `VLLMWeightSyncClient`."""

    def __init__(self, host: Host) -> None:
        self.host, self.version = host, ""
        self.failed: Exception | None = None
        self.over = threading.Event()

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """The workers join the group."""
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """They get ready."""
        self._post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """They receive."""
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """They have all of it, which is called `version` from now on."""
        self._post("/finish_weight_update", {"weight_version": weight_version or self.version})

    def _post(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        try:
            self.host.exchange("POST", path, body, wanted=False)
        except Exception as error:
            self.failed = error
            self.over.set()
            raise


def open_line(client: Client, source: Source, *, address: str, port: int, world: int) -> Sender:
    """A group of this process and `world` − 1 workers, which are asked to join it.

    Raises:
        ImportError: there is no vLLM here, or an older one.
        UserError: this process has no GPU to send from.
    """
    if source.device.type != "cuda":
        raise UserError(
            f"rollout.push: nccl sends from a GPU, and the student is on {source.device.type}; leave it at "
            "weights"
        )
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=world)
    line: Sender = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    return line


@dataclass(kw_only=True)
class _Met:
    """A server that has been met."""

    client: Client
    line: Sender
    version: str = ""


class OverNCCL:
    """All weights, adapters merged (`onpath.engines.remote.handover.Handover`).

    Args:
        student: the model that trains.
        dtype: in which they are sent; None: their own.
    """

    where = "sent over NCCL"

    def __init__(self, student: nn.Module, *, dtype: torch.dtype | None) -> None:
        self.student, self.dtype = student, dtype
        self.source = Source(next(student.parameters()).device)
        self.version, self._pushes = "", 0
        self._run: str = distributed.first_decides(lambda: uuid.uuid4().hex[:8])
        self._met: dict[Host, _Met] = {}
        self._one_at_a_time = threading.Lock()  # one device sends

    def write(self) -> None:
        """See `Handover.write`: a copy in memory, of the first process."""
        self._pushes += 1
        self.version = f"onpath-{self._run}-{self._pushes}"
        if distributed.rank() > 0:
            take_part(self.student)
            return
        self.source.held = []
        with torch.no_grad():
            for name, tensor in checkpoint_weights(self.student):
                dtype = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
                self.source.held.append((name, tensor.detach().to("cpu", dtype, copy=True)))

    def give(self, host: Host) -> None:
        """See `Handover.give`. Prefixes that it has cached are those of other weights.

        Raises:
            Busy: it lacks them, and this is not the process that has them.
        """
        if distributed.rank() > 0:
            if self.lacks(host):
                raise Busy("it waits for the first process to give it the weights")
            return
        with self._one_at_a_time:
            met = self._met.pop(host, None)  # of one that fails nothing is used again
            if met is None or _version(host) != met.version:
                met = self._meet(host)
            met.client.version = self.version
            self._with(met.client, met.line.send_weights, sends=True)
            met.version = self.version
            self._met[host] = met
        host.exchange("POST", "/reset_prefix_cache")

    def lacks(self, host: Host) -> bool:
        """See `Handover.lacks`."""
        return _version(host) != self.version

    def tensors(self) -> Iterator[Tensor]:
        """See `Handover.tensors`."""
        return (tensor for _, tensor in merged_weights(self.student))

    def _meet(self, host: Host) -> _Met:
        _check_backend(host)
        workers = understood(
            lambda answer: int(answer["world_size"]), host.exchange("GET", "/get_world_size")
        )
        client, found = Client(host), list[Sender]()
        address, port = _address_towards(host), _free_port()

        def meet() -> None:
            found.append(open_line(client, self.source, address=address, port=port, world=1 + workers))

        self._with(client, meet)
        return _Met(client=client, line=found[0])

    def _with(self, client: Client, action: Callable[[], None], *, sends: bool = False) -> None:
        """An action of both sides. What the server refuses is heard at once: our side may be waiting for it,
        and is left there.

        Raises:
            UserError: our side fails, or still `sends` to nobody.
            httpx.TransportError, Busy, Nonsense: the server does.
        """
        wrong: list[Exception] = []
        client.failed = None
        client.over.clear()

        def act() -> None:
            try:
                if self.source.device.type == "cuda":
                    torch.cuda.set_device(self.source.device)  # it is the thread's own
                action()
            except Exception as error:
                wrong.append(error)
            ended.set()
            client.over.set()

        ended = threading.Event()
        threading.Thread(target=act, daemon=True, name="onpath-transfer").start()
        client.over.wait()
        ended.wait(_GRACE)
        if client.failed is not None and sends and not ended.is_set():
            raise UserError(
                f"rollout.push: nccl: {client.host.url} broke off while it was given the weights "
                f"({client.host.said(client.failed)}), and this process's GPU may wait for it for ever; "
                "start the same command again"
            )
        if client.failed is not None:
            raise client.failed
        if wrong and isinstance(wrong[0], UserError):
            raise wrong[0]
        if wrong:
            raise UserError(f"rollout.push: nccl: {client.host.url}: {_said(wrong[0])}") from None


def _said(error: Exception) -> str:
    if isinstance(error, ImportError):
        return (
            f"it needs vLLM from 0.29 on beside onpath too ({one_line(str(error), 100)}); install it, or "
            "leave rollout.push at weights"
        )
    return f"{one_line(str(error), 200) or type(error).__name__}; start the same command again"


def _version(host: Host) -> str:
    return understood(lambda answer: str(answer["weight_version"]), host.exchange("GET", "/weight_info"))


def _check_backend(host: Host) -> None:
    """Whether the server was started for transfers: nothing else says so before both sides wait.

    Raises:
        UserError: it was not.
    """
    answer = host.exchange("GET", "/server_info?config_format=json")
    transfer = understood(lambda told: told["vllm_config"]["weight_transfer_config"], answer)
    if not transfer:
        raise UserError(
            f"rollout.push: nccl: {host.url} takes no weights that way; start vllm serve with "
            '--weight-transfer-config \'{"backend": "nccl"}\', or leave rollout.push at weights'
        )


def _address_towards(host: Host) -> str:
    """This machine's, as the server can reach it."""
    url = httpx.URL(host.address)
    family, kind, _, _, theirs = socket.getaddrinfo(url.host, url.port or 80, type=socket.SOCK_DGRAM)[0]
    with contextlib.closing(socket.socket(family, kind)) as probe:
        probe.connect(theirs)  # a datagram socket sends nothing for that
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])
