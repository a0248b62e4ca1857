"""vLLM's weight transfer with gloo in NCCL's place, for servers on a CPU: the same handshake and routes,
other wires. A server finds it as a plugin (`install`); the trainer's side is `open_line`."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

NAME = "gloo"


def group(address: str, port: int, rank: int, world: int) -> ProcessGroupGloo:
    patience = timedelta(seconds=60)
    store = TCPStore(address, port, world, rank == 0, timeout=patience)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world, patience)


def send(wires: ProcessGroupGloo, tensor: torch.Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    wires.broadcast([tensor], options).wait()


@dataclass
class Meeting(base.WeightTransferInitInfo):
    address: str
    port: int
    world: int


@dataclass
class Described(base.WeightTransferUpdateInfo):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class Worker(base.WeightTransferEngine[Meeting, Described]):
    """The server's side."""

    init_info_cls, update_info_cls = Meeting, Described

    def init_transfer_engine(self, init_info: Meeting) -> None:
        rank = 1 + self.parallel_config.rank
        self.wires = group(init_info.address, init_info.port, rank, init_info.world)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Described) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            send(self.wires, tensor)
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        pass


@dataclass
class TrainerMeeting(base.TrainerInitInfo):
    backend: ClassVar[str] = NAME

    address: str
    port: int
    world: int


class Trainer(base.TrainerWeightTransferEngine[TrainerMeeting]):
    """Ours."""

    init_info_cls = TrainerMeeting

    @classmethod
    def trainer_init(cls, init_info: TrainerMeeting, *, client: Any, source: Any = None) -> "Trainer":
        engine, info = cls(client=client, source=source), init_info
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                client.init_weight_transfer_engine, asdict(Meeting(info.address, info.port, info.world))
            )
            engine.wires = group(info.address, info.port, 0, info.world)
            asked.result()
        return engine

    def send_weights(self) -> None:
        meta = self.source.metadata()
        described = Described(
            names=[m.name for m in meta],
            dtypes=[str(m.dtype).removeprefix("torch.") for m in meta],
            shapes=[[*m.shape] for m in meta],
        )
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.client.update_weights, asdict(described))
            for _, tensor in self.source:
                send(self.wires, tensor)
            asked.result()
        self.client.finish_weight_update()


def open_line(client: Any, source: Any, *, address: str, port: int, world: int) -> Any:
    """`onpath.engines.remote.transfer.open_line`, over gloo."""
    info = TrainerMeeting(address, port, world, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def register() -> None:
    """What vLLM calls in a server's processes."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, Worker)
        WeightTransferTrainerFactory.register_engine(NAME, Trainer)


def install(directory: Path) -> dict[str, str]:
    """The environment of a server that finds this file as a plugin, in a directory of its own."""
    about = directory / "gloo_transfer-0.dist-info"
    about.mkdir(parents=True)
    (directory / "gloo_transfer.py").write_text(Path(__file__).read_text())
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gloo-transfer\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\ngloo = gloo_transfer:register\n")
    return {"PYTHONPATH": str(directory)}
