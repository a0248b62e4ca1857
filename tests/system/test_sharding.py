"""Two ranks that hold half of every weight each give what one process gives, and planted faults do not."""

import gc
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from onpath.config.whole import Config
from onpath.engines import make, sharding
from onpath.engines.head import decoder_of
from onpath.engines.models import load_model
from onpath.engines.weights import save_weights
from onpath.records import Edit, Trajectory
from onpath.run import assemble as assembly
from onpath.run import rounds, trained
from onpath.run.assemble import assemble
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model, make_tokenizer
from tests.forks import TIMEOUT, done_by_all, done_by_two, forked, free_ports
from tests.stepping import Silent, step_on

Tiny = Callable[..., Config]
SHARDED = {"parallel__timeout": TIMEOUT, "teacher__device": "auto"}
LARGEST = 2**26  # bytes of a tensor
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux says what a process holds"
)
UNCLIPPED = {"optim__max_grad_norm": 1e9}  # clipping hides a factor


def trajectories(count: int) -> list[Trajectory]:
    """Of unequal lengths, some tokens weighted."""
    found = []
    for i in range(count):
        context, response = (
            tuple(range(4, 7 + i % 4)),
            tuple(4 + (3 * i + j) % 12 for j in range(2 + 3 * i % 11)),
        )
        weights = tuple(0.5 + j % 3 for j in range(len(response)))
        found.append(
            Trajectory(
                student_context=context, teacher_context=context, response=response, weights=weights, place=i
            )
        )
    return found


DROPPED = Edit(kind="none", kept=False, reason="for a test")


def owners(case: str, world: int) -> list[int]:
    """Of 13 trajectories."""
    lot = random.Random(case)
    match case:
        case "one":
            return [min(i, world - 1) for i in range(13)]
        case "nothing":
            return [world - 1] * 13
        case "lot 1" | "lot 2":
            return [lot.randrange(world) for _ in range(13)]
    return [(world * i + 1) // 13 for i in range(13)]


def shares(case: str, rank: int | None, world: int = 2) -> list[Trajectory]:
    """A rank's trajectories (None: all that are to be trained on)."""
    dropped = {"all dropped": 13, "first's dropped": 6}.get(case, 0)
    everything = [] if case == "none" else trajectories(13)
    everything = [replace(t, edit=DROPPED) if i < dropped else t for i, t in enumerate(everything)]
    if rank is None:
        return [t for t in everything if t.edit.kept]
    mine = [t for t, owner in zip(everything, owners(case, world), strict=False) if owner == rank]
    return [replace(t, place=i) for i, t in enumerate(mine)]


def gradients(config: Config, share: list[Trajectory]) -> dict[str, torch.Tensor]:
    """Of one step, before clipping, of all weights, whole."""
    parts = assemble(config)
    named = {n: p for n, p in parts.models.student.named_parameters() if p.requires_grad}
    _, found = step_on(parts, share, micro_batch_tokens=40)
    assert not found or named.keys() == found.keys()
    return {n: sharding.full(g).clone() for n, g in found.items()}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students by family and by whether the head is the embeddings'."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for tied in (True, False):
        torch.manual_seed(0)
        llama = LlamaForCausalLM(
            LlamaConfig(
                **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2), num_key_value_heads=1,
                vocab_size=make_model(0).config.vocab_size, hidden_size=32, intermediate_size=64, head_dim=16,
                max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
        for family, model in (("qwen3", make_model(0, tied=tied)), ("llama", llama)):
            path = root / f"{family}-{'tied' if tied else 'untied'}"
            model.save_pretrained(path)
            make_tokenizer().save_pretrained(path)
            found[path.name] = path
    return found


FAMILIES = [f"{family}-{head}" for family, head in product(("qwen3", "llama"), ("tied", "untied"))]
PRODUCT = [
    (family, share, mode, {})
    for (family, mode), share in zip(
        product(FAMILIES, ("layer", "step")), cycle(("even", "one", "nothing")), strict=False
    )
]
GRADIENTS = [
    *PRODUCT,
    ("qwen3-tied", "nothing", "layer", {"student__lora_rank": 4}),
    ("qwen3-untied", "even", "step", {"student__lora_rank": 4}),
    (
        "qwen3-untied",
        "one",
        "layer",
        {"student__lora_rank": 4, "student__lora_targets": ["q_proj", "lm_head"]},
    ),
    *(("qwen3-tied", share, "layer", {}) for share in ("none", "all dropped", "first's dropped")),
    ("qwen3-tied", "one", "layer", {"student__gradient_checkpointing": True}),
    ("qwen3-untied", "even", "layer", {"parallel__hosts": 2}),
    ("qwen3-tied", "one", "layer", {"parallel__teacher": "copy"}),
]


def differences(
    tiny: Tiny,
    tmp_path: Path,
    families: Mapping[str, Path],
    cases: Sequence[Any],
    patch: Callable[[], None] = int,
    *,
    world: int = 2,
) -> list[float]:
    """Of each case the largest error of any gradient, by the largest entry of its tensor."""
    configs = [
        tiny(student__model=str(families[family]), **options, parallel__shard=mode, **SHARDED, **UNCLIPPED)
        for family, _, mode, options in cases
    ]
    whole = [
        gradients(
            tiny(student__model=str(families[f]), teacher__device="auto", **plain(o), **UNCLIPPED),
            shares(s, None),
        )
        for f, s, _, o in cases
    ]
    ports = free_ports(len(cases))

    def run(rank: int) -> None:
        patch()
        for i, ((_, share, _, _), config) in enumerate(zip(cases, configs, strict=True)):
            os.environ["MASTER_PORT"] = ports[i]  # each case has a process group of its own
            with distributed.one_fate():
                save_file(gradients(config, shares(share, rank, world)), tmp_path / f"{i}-{rank}.safetensors")

    done_by_all(run, tmp_path, world=world)
    errors = []
    for i, expected in enumerate(whole):
        ranks = [load_file(tmp_path / f"{i}-{rank}.safetensors") for rank in range(world)]
        assert patch is not int or all(found.keys() == expected.keys() for found in ranks)
        each = [
            (found[n] - g).abs().max() / g.abs().max().clamp(min=1e-12)
            for found in ranks
            for n, g in expected.items()
        ]
        errors.append(float(torch.stack(each).max()) if each else 0.0)  # Python's max passes over a NaN
    return errors


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if not k.startswith("parallel__")}


def test_gradients_are_those_of_one_process(tiny: Tiny, tmp_path: Path, families: dict[str, Path]) -> None:
    errors = differences(tiny, tmp_path, families, GRADIENTS)
    wrong = [(case, error) for case, error in zip(GRADIENTS, errors, strict=True) if not error < 2e-6]
    assert not wrong


class NoGloo:
    """torch.distributed, whose groups say that they are of another backend."""

    def __getattr__(self, name: str) -> Any:
        return (lambda group: "nccl") if name == "get_backend" else getattr(dist, name)


def as_on_gpus() -> None:
    """By torch's own exchanges and gathering: no CPU takes that way otherwise."""
    sharding.dist = NoGloo()  # type: ignore[assignment]


def test_gradients_are_the_same_by_the_exchanges_of_gpus(
    tiny: Tiny, tmp_path: Path, families: dict[str, Path]
) -> None:
    cases = [*PRODUCT[:4], ("qwen3-tied", "one", "layer", {"student__lora_rank": 4})]
    assert max(differences(tiny, tmp_path, families, cases, as_on_gpus)) < 2e-6


def in_double() -> None:
    """Students and teachers in float64."""

    def double(*args: Any, **options: Any) -> torch.nn.Module:
        return load_model(*args, **options).double()

    make.load_model = trained.load_model = double  # type: ignore[assignment]


EXACT = [*PRODUCT, *(("qwen3-tied", lot, "layer", {}) for lot in ("lot 1", "lot 2"))]


def test_in_float64_they_are_the_same_but_for_its_last_digits(
    tiny: Tiny, tmp_path: Path, families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (make, trained):  # put back when the test ends
        monkeypatch.setattr(module, "load_model", load_model)
    in_double()
    errors = differences(tiny, tmp_path, families, EXACT)
    wrong = [(case, error) for case, error in zip(EXACT, errors, strict=True) if not error < 1e-12]
    assert not wrong


def by_default() -> None:
    """Gradients divided by the number of processes."""
    torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor = lambda *_: None  # type: ignore[assignment]


def of_the_root_alone() -> None:
    real = torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor

    def of_root(unit: Any, factor: float) -> None:
        if hasattr(unit, "lm_head"):
            real(unit, factor)

    torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor = of_root  # type: ignore[method-assign]


def heavy_filler() -> None:
    context = (5,)  # the padding's own states are all zeros
    heavy = replace(rounds._filler(None), weights=(1.0,), student_context=context, teacher_context=context)
    rounds._filler = lambda _: heavy  # type: ignore[assignment]


def head_of_its_own() -> None:
    """The tree of the decoder ends without the head: nobody sums its gradient."""
    real = FSDPState._lazy_init

    def without(self: Any) -> None:
        real(self)
        states = self._state_ctx.all_states
        states[:] = [s for s in states if not isinstance(s._modules[0], torch.nn.Linear)]

    FSDPState._lazy_init = without  # type: ignore[method-assign]


def decoder_before_its_head() -> None:
    """A tied head is another weight from then on. Today's torch looks for it."""
    real = sharding.fully_shard

    def in_turn(module: Any, **options: Any) -> None:
        if hasattr(module, "lm_head"):
            real(decoder_of(module), **options)
        real(module, **options)

    FSDPState._validate_no_duplicate_params = lambda _: None  # type: ignore[method-assign]
    sharding.fully_shard = in_turn  # type: ignore[assignment]


FAULTS = [
    *((fault, "qwen3-untied") for fault in (by_default, of_the_root_alone, heavy_filler, head_of_its_own)),
    (decoder_before_its_head, "qwen3-tied"),
]


@pytest.mark.parametrize(("fault", "family"), FAULTS)
def test_planted_faults_are_found(
    fault: Callable[[], None], family: str, tiny: Tiny, tmp_path: Path, families: dict[str, Path]
) -> None:
    (error,) = differences(tiny, tmp_path, families, [(family, "one", "layer", {})], fault)
    assert error > 1e-3


MESHES = {
    "two hosts of two": (4, {"parallel__hosts": 2}),
    "one of three without rows": (3, {"student__lora_rank": 4}),
}


@pytest.mark.parametrize("name", MESHES)
def test_more_than_two_are_one(name: str, tiny: Tiny, tmp_path: Path, families: dict[str, Path]) -> None:
    world, options = MESHES[name]
    cases = [("qwen3-untied", "lot 1", "layer", options), ("llama-tied", "nothing", "step", options)]
    errors = differences(tiny, tmp_path, families, cases, world=world)
    assert all(error < 2e-6 for error in errors), errors


def samples_and_saves(rank: int, config: Config, out: Path) -> None:
    """Sampling exchanges nothing."""
    parts = assemble(config)
    student, engine = parts.models.student, parts.generators.student
    prompts = parts.prompts.pool[: 2 + 3 * rank]  # ranks stop at different lengths
    gathers = [0]
    real = _fsdp_param_group.foreach_all_gather

    def counted(*args: Any, **options: Any) -> Any:
        gathers[0] += 1
        return real(*args, **options)

    _fsdp_param_group.foreach_all_gather = counted
    with parts.whole():
        before = gathers[0]
        rollouts = engine.generate(prompts, parts.sampling, n=2, keys=[p.id for p in prompts])
        assert 0 < before == gathers[0], "all weights at once, then none"
    (out / f"rollouts-{rank}.json").write_text(json.dumps([[r.ids, r.logprobs] for r in rollouts]))
    with pytest.raises(AssertionError, match="samples inside"):
        engine.generate(prompts, parts.sampling)
    assert all(isinstance(p, DTensor) for p in student.parameters())
    save_weights(student, out / "handed")


@pytest.mark.parametrize("lora", [0, 4])
def test_sampling_waits_for_nobody_and_weights_are_handed_over(lora: int, tiny: Tiny, tmp_path: Path) -> None:
    options = {"student__lora_rank": lora, "data__eval": {}, "teacher__device": "auto"}
    one = assemble(tiny(**options))
    config = tiny(**{**options, **SHARDED}, parallel__shard="layer")
    done_by_two(lambda rank: samples_and_saves(rank, config, tmp_path), tmp_path)
    for rank in range(2):
        prompts = one.prompts.pool[: 2 + 3 * rank]
        keys = [p.id for p in prompts]
        expected = one.generators.student.generate(prompts, one.sampling, n=2, keys=keys)
        found = json.loads((tmp_path / f"rollouts-{rank}.json").read_text())
        assert [tuple(ids) for ids, _ in found] == [r.ids for r in expected]
        for (_, logps), rollout in zip(found, expected, strict=True):
            assert tuple(logps) == pytest.approx(rollout.logprobs, abs=2e-6)
    save_weights(one.models.student, tmp_path / "alone")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "handed")]
    assert "model.safetensors" in files[0]
    assert files[0] == files[1], "byte for byte"


def large() -> LlamaForCausalLM:
    """Two tables of `LARGEST` bytes, in shards."""
    distributed.start(torch.device("cpu"), timeout=TIMEOUT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LARGEST // 1024,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    sharding.shard(model, mesh, device=torch.device("cpu"))
    return model


def rise_of(what: Callable[[], Any]) -> int:
    """Bytes that it takes at its peak."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    what()
    return resident("VmHWM") - before


def hands_over_a_large_one(rank: int, out: Path) -> None:
    model = large()
    (out / f"rise-{rank}").write_text(str(rise_of(lambda: save_weights(model, out / "handed"))))
    distributed.stop()


def resident(of: str) -> int:
    """Bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of)]
    return 1024 * int(line.split()[1])


@linux
def test_handing_over_takes_the_memory_of_the_largest_tensor(tmp_path: Path) -> None:
    done_by_two(lambda rank: hands_over_a_large_one(rank, tmp_path), tmp_path)
    for rank in range(2):
        assert int((tmp_path / f"rise-{rank}").read_text()) < 1.25 * LARGEST


def gathers_and_sums_a_large_one(rank: int, out: Path) -> None:
    model = large()

    def whole() -> None:
        with sharding.whole(model):
            pass

    def step() -> None:
        model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
        model.zero_grad()

    step()  # what is made once
    rises = [rise_of(whole), rise_of(step)]
    (out / f"rises-{rank}").write_text(json.dumps(rises))
    distributed.stop()


@linux
def test_gloo_takes_no_memory_beside_the_gathered_weights(tmp_path: Path) -> None:
    """Of two large units both and one's buffer; by torch's own exchanges 3.5 and 4.5 of them."""
    done_by_two(lambda rank: gathers_and_sums_a_large_one(rank, tmp_path), tmp_path)
    for rank in range(2):
        whole, step = json.loads((tmp_path / f"rises-{rank}").read_text())
        assert whole < 3.2 * LARGEST
        assert step < 3.75 * LARGEST


def sums_of_a_step(rank: int, config: Config, out: Path) -> None:
    parts = assemble(config)
    sums = [0]
    real = _fsdp_param_group.foreach_reduce

    def counted(*args: Any, **options: Any) -> Any:
        sums[0] += 1
        return real(*args, **options)

    _fsdp_param_group.foreach_reduce = counted
    step_on(parts, shares("even", rank), micro_batch_tokens=40)
    (out / f"sums-{rank}.json").write_text(json.dumps(sums[0]))


def test_gradients_are_summed_as_seldom_as_memory_allows(
    tiny: Tiny, tmp_path: Path, families: dict[str, Path]
) -> None:
    """An adapter's once a step for each layer; all weights' in each micro-batch, since whole gradients of all
    would take what sharding saves."""
    for lora, units, times in ((4, 2, 1), (0, 4, 3)):  # two layers; the head, and the rest
        options = {"student__model": str(families["qwen3-untied"]), "student__lora_rank": lora, **UNCLIPPED}
        config = tiny(**options, **SHARDED, parallel__shard="step")

        def run(rank: int, config: Config = config) -> None:
            with distributed.one_fate():
                sums_of_a_step(rank, config, tmp_path)

        done_by_two(run, tmp_path)
        sums = [json.loads((tmp_path / f"sums-{rank}.json").read_text()) for rank in range(2)]
        assert sums == 2 * [units * times]


def test_half_precision_is_gathered_and_summed_in_full(
    tiny: Tiny, tmp_path: Path, families: dict[str, Path]
) -> None:
    """bfloat16 weights in the passes; rows, gradients and sums in float32."""
    options = {"student__model": str(families["qwen3-untied"]), **UNCLIPPED, "teacher__device": "auto"}
    exact = gradients(tiny(**options), shares("even", None))

    def run(rank: int) -> None:
        config = tiny(**{**options, **SHARDED}, optim__bf16=True, parallel__shard="layer")
        with distributed.one_fate():
            save_file(gradients(config, shares("even", rank)), tmp_path / f"{rank}.safetensors")

    done_by_two(run, tmp_path)
    found = load_file(tmp_path / "0.safetensors")
    assert {g.dtype for g in found.values()} == {torch.float32}
    one, two = (torch.cat([g.flatten() for _, g in sorted(x.items())]) for x in (exact, found))
    assert torch.cosine_similarity(one, two, dim=0) > 0.999
    assert not torch.equal(one, two)


@pytest.mark.parametrize("world", [2, 8])
def test_rollouts_are_dealt_by_length(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is dealt to whom, all of it is, and no rank has much more than another."""
    generator = torch.Generator().manual_seed(0)
    lengths = [
        int(x) for x in torch.randn(16 * world, generator=generator).mul(0.9).exp().mul(500).clamp(1, 4096)
    ]
    items = list(enumerate(lengths))
    monkeypatch.setattr(distributed, "world", lambda: world)
    monkeypatch.setattr(distributed, "gather", lambda _: items)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.dealt([], lambda item: item[1]))
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares), "each in the order of all"
    loads = [sum(length for _, length in share) for share in shares]
    assert max(loads) <= 1.05 * sum(loads) / world
    turns = [sum(length for _, length in items[rank::world]) for rank in range(world)]
    assert max(turns) > max(loads)


def test_the_guide_s_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scale.md: what the slowest of 64 processes has at 8 rollouts each, of the mean."""
    processes, turns, dealt = 64, [], []
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(distributed, "world", lambda: processes)
    for _ in range(5):
        drawn = torch.randn(8 * processes, generator=generator).mul(0.5).sub(0.125).exp() * 1500
        items = [min(int(x), 4096) for x in drawn]
        monkeypatch.setattr(distributed, "gather", lambda _, items=items: items)
        shares = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(sum(distributed.dealt([], lambda length: length)))
        turns.append(max(sum(items[rank::processes]) for rank in range(processes)) / sum(items) * processes)
        dealt.append(max(shares) / sum(items) * processes)
    assert sum(turns) / 5 == pytest.approx(1.48, abs=0.04)
    assert sum(dealt) / 5 == pytest.approx(1.02, abs=0.01)


def test_what_cannot_be_sharded_is_said(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, says in (
        ({"teacher__device": "cuda:1"}, "teacher.device is cuda:1: with parallel.shard"),
        ({"student__device": "cuda:1"}, "student.device is cuda:1: with parallel.shard"),
        ({"parallel__hosts": 0}, "parallel.hosts"),
    ):
        with pytest.raises(UserError, match=says):
            tiny(**{"teacher__device": "auto", **options}, parallel__shard="layer")
    alone = tiny(parallel__shard="layer", teacher__device="auto", data__eval={}, optim__steps=1)
    assert not sharding.asked(alone), "one process has nobody to share with"
    three = tiny(parallel__shard="layer", parallel__hosts=3, **SHARDED)
    monkeypatch.setattr(distributed, "_HEARD", 2.0)
    for code, _, err in forked(lambda _: train(three, quiet=True), tmp_path):
        assert code == 2, err
        assert "parallel.hosts is 3, which does not divide 2 processes" in err


CHECKED: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"student__lora_rank": 4}, True),
    ({"method__reweight": "divergence"}, False),
    ({"method__writer": "teacher"}, False),
    ({"parallel__shard": "step"}, False),
]


def test_a_student_that_no_step_makes_whole_is_checked_in_its_shards(tiny: Tiny, tmp_path: Path) -> None:
    """Another engine generates: gathering all of it at the start would take what sharding saves."""
    cases = [tiny(**{"parallel__shard": "layer", **SHARDED, **options}) for options, _ in CHECKED]
    whole = [assemble(tiny(**plain(o), teacher__device="auto"), engine=Silent()) for o, _ in CHECKED]
    alone = [asdict(parts.agreements["student.model"]) for parts in whole]
    ports = free_ports(len(cases))

    def run(rank: int) -> None:
        seen = []
        for port, config in zip(ports, cases, strict=True):
            os.environ["MASTER_PORT"] = port
            students, checks, real = [], [], assembly.check_model

            def noted(
                model: Any, *args: Any, key: str, checks: list[bool] = checks, students: list[Any] = students,
                real: Any = real, **options: Any,
            ) -> Any:  # fmt: skip
                if key == "student.model":
                    students.append(model)
                    checks.append(sharding.is_whole(model))
                return real(model, *args, key=key, **options)

            with distributed.one_fate(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(assembly, "check_model", noted)
                parts = assemble(config, engine=Silent())
                (student,) = students
                named = [(n, sharding.full(p.detach())) for n, p in student.named_parameters()]
                zeros = [not p.any() for n, p in named if "lora_B" in n]
                assert zeros == [True] * (14 if config.student.lora_rank else 0), "put back"
                seen.append({"whole": checks, "told": asdict(parts.agreements["student.model"])})
        (tmp_path / f"checks-{rank}.json").write_text(json.dumps(seen))

    done_by_two(run, tmp_path)
    for rank in range(2):
        seen = json.loads((tmp_path / f"checks-{rank}.json").read_text())
        for (options, in_shards), found, expected in zip(CHECKED, seen, alone, strict=True):
            assert found["whole"] == [not in_shards], options
            assert found["told"] == pytest.approx(expected, abs=1e-6), options
