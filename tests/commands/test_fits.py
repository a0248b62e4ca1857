"""What fits: the parts of the calculation against what is really there, and the plan that the docs show."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from onpath.commands.doctor.costs import disk, fits_unloaded
from onpath.commands.doctor.fits import (
    SHARDS,
    Decoder,
    Step,
    activations,
    beside_vllm,
    cache_bytes,
    copy_bytes,
    cures,
    decoder_of,
    decoder_of_config,
    fewest_processes,
    parts_of,
    spread,
    step_of,
    step_of_config,
    together,
)
from onpath.config.build import build
from onpath.config.sections import RolloutSection
from onpath.config.whole import Config
from onpath.engines.decoding.kv_cache import preallocated_cache
from onpath.engines.forward import Kept
from onpath.engines.head import unwrapped
from onpath.engines.student import recompute
from onpath.losses import Head, Objective, StatsRequest, TeacherHidden, one_pass
from onpath.losses.one_pass import workspace
from onpath.records import Trajectory
from onpath.run.assemble import assemble
from onpath.run.meter import Stopwatch
from onpath.system import distributed
from onpath.training import corrected

Tiny = Callable[..., Config]
ROOT = Path(__file__).parents[2]

SIZES = {
    "wide": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32},
    "many heads": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32},
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def make(family: str, size: str) -> nn.Module:
    config, model = FAMILIES[family]
    shape = {"vocab_size": 128, "num_hidden_layers": 4, "num_key_value_heads": 2, **SIZES[size]}
    made: nn.Module = model(config(**shape))
    return made


def saved_bytes(model: nn.Module, *, half: bool) -> int:
    """What autograd really keeps of 4 rows of 60 tokens, each memory once, without the weights' copies."""
    seen: dict[int, int] = {}
    widths = {p.shape for p in model.parameters()}

    def pack(kept: Tensor) -> Tensor:
        if kept.shape not in widths and kept.mT.shape not in widths:
            seen[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    ids = torch.arange(240).reshape(4, 60) % 128
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept), autocast:
        kept = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    assert kept is not None
    return sum(seen.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family: str, size: str, half: bool) -> None:
    model = make(family, size)
    planned = activations(decoder_of(model), 240, half=half, recompute=False)
    assert planned == pytest.approx(saved_bytes(model, half=half), rel=0.15)


def test_recomputed_activations_are_the_residual_stream() -> None:
    model = make("qwen3", "wide")
    recompute(model)
    model.eval()
    counted = decoder_of(model)
    whole, kept = (activations(counted, 240, half=False, recompute=on) for on in (False, True))
    last_norm = 240 * 8 * counted.width
    one_layer = (whole - last_norm) / counted.layers  # whole in the backward pass, while it is recomputed
    assert saved_bytes(model, half=False) == pytest.approx(kept - one_layer, rel=0.15)


def test_the_losses_buffers_are_what_it_takes() -> None:
    """At least the buffers of a pass; and one block more, which some objectives take."""
    inputs = one_pass.Inputs(
        student_hidden=torch.randn(64, 8),
        student_head=Head(weight=torch.randn(4096, 8)),
        teacher=TeacherHidden(hidden=torch.randn(64, 8), head=Head(weight=torch.randn(4096, 8))),
        objective=Objective(kind="reverse_kl"),
        weights=None,
        request=StatsRequest(),
    )
    chunk, block = one_pass.chunk_sizes(inputs, 4096, torch.float32)
    buffers = one_pass._buffers(inputs, torch.empty(()), chunk, block)
    held = [buffers.student, buffers.teacher, *buffers.scratch]
    exact = sum(t.numel() * 4 for t in held if t is not None)
    assert workspace("cpu", 4096, 64, teachers=1) == pytest.approx(exact, rel=0.35)
    assert workspace("cpu", 4096, 64, teachers=1) >= exact


def published(size: str, *, trained: bool) -> Decoder:
    """Qwen3 by its config.json: layers, H, heads × 128, keys × 128, I, tied."""
    layers, width, queries, keys, inner, tied = {
        "1.7B": (28, 2048, 2048, 1024, 6144, True),
        "8B": (36, 4096, 4096, 1024, 12_288, False),
        "32B": (64, 5120, 8192, 1024, 25_600, False),
    }[size]
    each = 2 * width * (queries + keys) + 3 * width * inner
    adapter = 64 * layers * (2 * (width + queries) + 2 * (width + keys) + 3 * (width + inner))
    count = layers * each + 151_936 * width * (1 if tied else 2)
    return Decoder(
        parameters=count, layers=layers, width=width, queries=queries, keys=keys, inner=inner,
        vocabulary=151_936, tied=tied, normed_queries=True, weight_bytes=4 if trained else 2,
        trained=count if trained else adapter,
    )  # fmt: skip


PLAN = {
    ("1.7B", False, "8B"): (28, 15, 12),
    ("1.7B", True, "8B"): (53, 19, 16),
    ("8B", False, "8B"): (49, 35, 20),
    ("8B", True, "8B"): (164, 52, 36),
    ("8B", False, "32B"): (99, 43, 28),
    ("8B", True, "32B"): (213, 60, 44),
}
"""GB of a GPU as whole copies, by step and by layer over 8, as they were first calculated by hand."""


def step_of_size(student: str, trained: bool, teacher: str) -> Step:
    return Step(
        student=published(student, trained=trained),
        teacher=published(teacher, trained=False),
        micro_batch_tokens=16_384,
        batch_tokens=0,
        half=True,
        recompute=True,
    )


@pytest.mark.parametrize(("sizes", "by_hand"), PLAN.items())
def test_the_plan_is_that_of_the_paper(sizes: tuple[str, bool, str], by_hand: tuple[int, ...]) -> None:
    step = step_of_size(*sizes)
    found = [parts_of(step, shard=shard, world=8)["peak"] / 1e9 for shard in SHARDS]
    assert found == pytest.approx(by_hand, rel=0.15)
    assert found == sorted(found, reverse=True)


def test_the_docs_tables_are_what_is_calculated() -> None:
    """README.md, docs/scale.md and docs/hardware.md."""
    pages = {name: (ROOT / name).read_text() for name in ("README.md", "docs/scale.md", "docs/hardware.md")}
    whole, by_layer = (
        re.findall(r"\d+", line.partition("|")[2].partition("|")[2])
        for line in pages["README.md"].splitlines()
        if line.startswith(("| one GPU, or whole", "| `parallel.shard: layer` on eight"))
    )
    columns = re.findall(r"([\d.]+B(?: LoRA)?) / (\d+B)", pages["README.md"])
    assert len(columns) == len(whole) == len(by_layer) == len(PLAN)
    for size, trained, teacher in PLAN:
        step = step_of_size(size, trained, teacher)
        none, by_step, layer = (
            f"{parts_of(step, shard=shard, world=8)['peak'] / 1e9:.0f}" for shard in SHARDS
        )
        name = f"{size}{'' if trained else ' LoRA'}"
        assert f"| {name} / {teacher} | {none} | {by_step} | {layer} |" in pages["docs/scale.md"]
        place = columns.index((name, teacher))
        assert (whole[place], by_layer[place]) == (none, layer)
        (row,) = re.findall(
            rf"^\| {size}, {'all weights' if trained else 'LoRA'} \| {teacher} \| (.*) \|$",
            pages["docs/hardware.md"], flags=re.M,
        )  # fmt: skip
        assert row.split(" | ")[0] == none
        assert [layer] == re.findall(r"(\d+) on each of eight", row) or "each of eight" not in row


def test_shards_fit_where_whole_copies_do_not() -> None:
    step, room = step_of_size("8B", True, "8B"), 80e9
    assert fewest_processes(step, room, shard="none") is None
    assert fewest_processes(step, room, shard="layer") == 4
    assert any("lora_rank" in cure for cure in cures(step, room))
    assert cures(step, room)[-1] == "the models sharded over 4 processes"
    fitting = step_of_size("1.7B", True, "8B")
    assert fewest_processes(fitting, room, shard="none") == 1


def test_smaller_batches_and_a_server_cure_what_a_teacher_writes() -> None:
    """`rollout.batch_tokens` is that of a teacher that writes too; on a server it takes no cache here."""
    step = replace(step_of_size("1.7B", False, "8B"), written_tokens=1_000_000)
    peaks = (parts_of(replace(step, written_tokens=tokens))["peak"] for tokens in (1_000_000, 250_000))
    found = cures(step, sum(peaks) / 2)
    assert "rollout.batch_tokens: 250000" in found
    assert "a teacher on a server (teacher.engine: vllm)" in found


def test_a_server_cures_what_is_kept_of_its_states() -> None:
    """And what the student would write beside it."""
    step = replace(step_of_size("1.7B", True, "8B"), response_tokens=4_000_000, side_by_side=True)
    served = replace(step, teacher=None, response_tokens=0, side_by_side=False)
    room = parts_of(served)["peak"]
    assert parts_of(served)["kept"] == 0
    assert parts_of(replace(served, response_tokens=step.response_tokens))["peak"] > room
    assert "a teacher on a server (teacher.engine: vllm)" in cures(step, room)


def test_a_vllm_beside_the_student_has_its_part_of_the_gpu() -> None:
    """What it is told to take: for as long as it lives, or while it samples."""
    step, room = step_of_size("1.7B", True, "8B"), 80e9
    alone = parts_of(step)["peak"]

    def beside(**options: Any) -> Step:
        return beside_vllm(step, RolloutSection(engine="vllm", vllm=options), room)

    assert beside_vllm(step, RolloutSection(engine="vllm", url=["http://a"]), room) == step
    assert beside_vllm(step, RolloutSection(), room) == step
    assert beside().vllm == 0.92 * room
    awake = beside(gpu_memory_utilization=0.5)
    assert parts_of(awake)["peak"] == alone + 0.5 * room > room
    cured = cures(awake, room)
    assert "enable_sleep_mode: true in rollout.vllm, without rollout.overlap" in cured
    assert "a server that samples (rollout.url)" in cured
    asleep = beside(gpu_memory_utilization=0.5, enable_sleep_mode=True)
    resident = sum(parts_of(step)[name] for name in ("weights", "moments", "teacher", "copies", "kept"))
    assert parts_of(asleep)["peak"] == max(alone, resident + 0.5 * room), "no other model runs meanwhile"
    assert not any("sleep" in cure for cure in cures(asleep, room))


def test_a_checkpoint_that_is_being_written_is_a_copy_on_the_host() -> None:
    step = replace(step_of_size("1.7B", True, "8B"), device="cpu", saves=True)
    more = parts_of(step)["peak"] - parts_of(replace(step, saves=False))["peak"]
    assert more == 3 * step.student.trained * step.student.trained_bytes
    assert parts_of(step, shard="layer", world=2)["saving"] == more / 2
    assert parts_of(replace(step, device="cuda"))["saving"] == 0


def test_what_overlap_samples_is_there_beside_every_other_phase() -> None:
    """Its keys and values, and its products' copies in half precision; evaluations have their own."""
    alone = replace(step_of_size("1.7B", True, "8B"), batch_tokens=40_000)
    ahead = replace(alone, ahead=True)
    plain, both = parts_of(alone), parts_of(ahead)
    own = 1.25 * cache_bytes(alone.student, alone.batch_tokens, half=alone.half)
    half = 2 * alone.student.layer * alone.student.layers
    assert both["peak"] - both["copies"] == pytest.approx(plain["peak"] + own + half)
    assert both["phase_sampling"] == plain["phase_sampling"] > own


def test_a_vllm_on_a_cpu_has_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    step = replace(step_of_size("1.7B", True, "8B"), device="cpu", half=False)
    for processes in (1, 2):
        section = RolloutSection(engine="vllm", vllm={"tensor_parallel_size": processes})
        assert beside_vllm(step, section, 80e9).vllm == step.student.parameters * 4 / processes + 2 * 2**30


def test_each_of_several_processes_keeps_what_it_has_read() -> None:
    """TOPD's hidden states of the teacher: of a step's responses each process has its share."""
    step = replace(step_of_size("1.7B", True, "8B"), response_tokens=1_000_001)
    kept = [parts_of(spread(step, n), shard="layer", world=n)["kept"] for n in (1, 8)]
    assert kept == [1_000_001 * 4096 * 2, 125_001 * 4096 * 2]
    assert together(spread(step, 8), 8).response_tokens == 1_000_008
    room = parts_of(spread(step, 8), shard="layer", world=8)["peak"] + 1
    assert fewest_processes(step, room, shard="layer") == 8
    assert cures(spread(step, 2), room, processes=2)[-1] == "the models sharded over 8 processes"


def test_one_process_has_nothing_to_share() -> None:
    step = step_of_size("1.7B", True, "8B")
    assert parts_of(step, shard="layer", world=1) == parts_of(step)


def test_shards_are_whole_where_a_model_samples() -> None:
    """The student, where it samples in this process; every model, where the method runs them."""
    served = step_of_size("8B", True, "8B")
    student, other = served.student, served.teacher
    assert other is not None
    running = 2 * (2 * other.layer + other.table)  # bytes, in bfloat16
    for step, student_held, teacher_held in (
        (replace(served, batch_tokens=100), 2 * student.parameters, running),
        (replace(served, prepares=True), 2 * student.parameters, 2 * other.parameters),
        (served, 2 * (2 * student.layer + student.table), running),
    ):
        found = parts_of(step, shard="layer", world=8)
        cache = 1.25 * cache_bytes(student, step.batch_tokens, half=True, stream=2)
        assert found["gathered"] + found["phase_sampling"] == student_held + teacher_held + cache
        assert found["phase_correcting"] - found["loss"] == (
            found["phase_sampling"] if step.prepares else 0.0
        )
        whole = parts_of(replace(step, prepares=False), shard="step", world=8)
        assert whole["phase_sampling"] == cache, "it is whole in every phase"


def test_shards_of_several_teachers_are_whole_where_they_run() -> None:
    one = replace(step_of_size("8B", True, "8B"), prepares=True)
    two = replace(one, more_teachers=16e9)
    rise = [parts_of(step, shard="layer", world=8)["peak"] - parts_of(step)["peak"] for step in (one, two)]
    assert rise[1] - rise[0] == pytest.approx(16e9 / 8)


OPSD = {"method__name": "opsd", "method__template": "{problem} {solution}"}
COPIES: dict[str, dict[str, Any]] = {
    "start": {**OPSD, "method__weights": "base"},
    "average": {**OPSD, "method__weights": "ema"},
    "average of half": {**OPSD, "method__weights": "ema", "student__dtype": "bfloat16"},
    "ahead": {"rollout__overlap": True},
}


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_the_student_are_what_they_take(kind: str, lora: int, tiny: Tiny) -> None:
    parts = assemble(tiny(data__eval={}, student__lora_rank=lora, **COPIES[kind]))
    sampler: Any = parts.sampler
    copies = [sampler.model] if kind == "ahead" else [*parts.models.teacher.models]
    theirs = {id(p) for p in parts.models.student.parameters()}
    own = [p for model in copies for p in model.parameters() if id(p) not in theirs]
    taken = sum(p.numel() * p.element_size() for p in own)
    step = step_of(parts, response_tokens=0)
    assert parts_of(step)["copies"] == copy_bytes(step, shards=1) == taken
    assert copy_bytes(step, shards=2) >= taken / 2
    extra = {**parts.models.teacher.state(), **(parts.overlap.state() if parts.overlap else {})}
    stored = sum(t.numel() * t.element_size() for t in extra.values())
    trained = sum(p.numel() * p.element_size() for p in parts.models.student.parameters() if p.requires_grad)
    times = parts.config.run.keep + 1
    assert disk(parts).values["needed_gib"] * 2**30 == (3 * trained + stored) * times + trained


def test_a_sharded_average_has_a_base_of_its_own() -> None:
    adapted = replace(published("8B", trained=False), weight_bytes=2)
    step = replace(step_of_size("8B", False, "8B"), student=adapted, teacher=None, averaged=True)
    frozen = 2 * (adapted.parameters - adapted.trained)
    assert copy_bytes(step, shards=1) == 4 * adapted.trained
    assert copy_bytes(step, shards=8) == (4 * adapted.trained + frozen) / 8
    plain = replace(step, averaged=False)
    table = adapted.table + 2 * adapted.layer
    for shard, prepares, gathered, sampling in (
        ("step", False, table, 0),
        ("layer", True, table, adapted.parameters - table),
    ):
        one, two = (
            parts_of(replace(s, prepares=prepares), shard=shard, world=8)  # type: ignore[arg-type]
            for s in (plain, step)
        )
        assert two["gathered"] - one["gathered"] == 2 * gathered
        assert two["phase_sampling"] - one["phase_sampling"] == 2 * sampling
    ahead = replace(step, averaged=False, ahead=True)
    assert copy_bytes(ahead, shards=8) == adapted.bytes, "whole on each process"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [0, 4])
def test_what_trains_is_counted_in_its_own_dtype(dtype: str, lora: int, tiny: Tiny) -> None:
    """peft keeps an adapter in float32, whatever its base has."""
    parts = assemble(tiny(data__eval={}, student__lora_rank=lora, student__dtype=dtype))
    weights = [*parts.models.student.parameters()]
    found = parts_of(step_of(parts, response_tokens=0))
    own = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    assert (found["gradients"], found["moments"]) == (own, 2 * own)
    assert found["weights"] == sum(p.numel() * p.element_size() for p in weights)


def test_caches_and_counts() -> None:
    model = make("qwen3", "wide")
    counted = decoder_of(model)
    assert counted.parameters == counted.trained == sum(p.numel() for p in model.parameters())
    assert cache_bytes(counted, 10, half=False) == 10 * 4 * 2 * 2 * 32 * 4
    named = decoder_of_config(model.config, weight_bytes=2, parameters=7)
    assert (named.queries, named.keys, named.inner, named.normed_queries) == (128, 64, 384, True)
    model.config.num_experts_per_tok, model.config.moe_intermediate_size = 8, 48
    assert decoder_of_config(model.config, weight_bytes=2, parameters=7).inner == 384


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_is_what_a_model_keeps(family: str, half: bool, dtype: torch.dtype) -> None:
    """Keys are rotated in the hidden states' dtype: autocast does not halve those of a float32 model."""
    model = make(family, "wide").to(dtype)
    cache = preallocated_cache(unwrapped(model))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(input_ids=torch.ones(2, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    kept = sum(part.numel() * part.element_size() for part in held)
    assert cache_bytes(decoder_of(model), 10, half=half) == kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"student__lora_rank": 4, "student__dtype": "bfloat16", "teacher__dtype": "bfloat16"},
        {"method__name": "opsd", "method__weights": "ema"},
        {"method__name": "topd", "method__window": 4, "optim__bf16": True},
        {"rollout__overlap": True, "student__gradient_checkpointing": True},
    ],
    ids=["plain", "lora", "ema", "kept readings", "overlap"],
)
def test_what_is_not_loaded_is_counted_as_what_is(options: dict[str, Any], tiny: Tiny) -> None:
    config = tiny(**options)
    parts = assemble(config)
    tokens = config.rollout.prompts * config.rollout.n * config.rollout.max_new_tokens
    loaded = step_of(parts, response_tokens=tokens)
    parts.close()
    assert step_of_config(config, device=torch.device("cpu")) == loaded
    assert loaded.prepares == (config.method.name != "opd")


@pytest.mark.parametrize(
    ("options", "writes"),
    [
        ({}, False),
        ({"method__name": "trd", "method__template": "{problem} {attempt}"}, True),
        ({"method__writer": "teacher", "method__divergence": "cross_entropy"}, True),
        ({"method__name": "relay"}, True),
        (
            {"method__name": "bridge", "method__window": 4, "method__meet_window": 2, "method__every": 1},
            False,
        ),
        (
            {
                "method__name": "bridge",
                "method__window": 4,
                "method__meet_window": 2,
                "method__every": 1,
                "method__control": "random_place",
            },
            True,
        ),
        ({"method__name": "topd", "method__window": 4}, False),  # which goes on from its scoring pass
    ],
    ids=["opd", "trd", "teacher's text", "relay", "bridge", "bridge by lot", "topd"],
)
def test_what_a_teacher_writes_takes_a_cache(options: dict[str, Any], writes: bool, tiny: Tiny) -> None:
    """The teacher's, of one batch of generation, also where the student's rollouts are a server's."""
    server = {"rollout__engine": "vllm", "rollout__url": "http://localhost:1"}
    config = tiny(**options, **server, rollout__batch_tokens=50_000, optim__micro_batch_tokens=100)
    step = step_of_config(config, device=torch.device("cpu"))
    teacher = step.teacher
    assert teacher is not None
    assert step.batch_tokens == 0
    found = parts_of(step, shard="layer", world=2)
    cache = 1.25 * cache_bytes(teacher, 50_000, half=False) if writes else 0.0
    without = parts_of(replace(step, written_tokens=0), shard="layer", world=2)
    assert found["phase_writing"] - without["phase_writing"] == cache
    assert (found["peak"] > without["peak"]) is writes


@pytest.mark.parametrize(("hold", "both"), [(0, True), (3, False)])
def test_who_writes_side_by_side_keeps_two_caches(hold: int, both: bool, tiny: Tiny) -> None:
    """Relay's student and teacher; where they take turns the teacher goes on from its scoring pass."""
    config = tiny(method__name="relay", method__hold=hold, rollout__batch_tokens=50_000)
    step = step_of_config(config, device=torch.device("cpu"))
    caches = [cache_bytes(m, 50_000, half=False) for m in (step.student, step.teacher) if m is not None]
    found = parts_of(step)
    assert found["phase_writing"] == (1.25 * sum(caches) if both else 0.0)
    assert found["phase_sampling"] == 1.25 * caches[0]
    assert step.continues


KEEPING: dict[str, tuple[dict[str, Any], bool]] = {
    "opd": ({}, False),
    "teacher's text": ({"writer": "teacher", "divergence": "cross_entropy"}, False),
    "opsd": ({"name": "opsd", "template": "{problem} {solution}"}, True),
    "opsd, not diagnosed": ({"name": "opsd", "template": "{problem} {solution}", "diagnose_every": 0}, False),
    "trd": ({"name": "trd", "template": "{problem} {attempt}", "gate": False}, True),
    "trd, not diagnosed": (
        {"name": "trd", "template": "{problem} {attempt}", "gate": False, "diagnose_every": 0},
        True,
    ),
    "topd": ({"name": "topd", "window": 4}, True),
    "relay": ({"name": "relay"}, True),
    "branch": ({"name": "branch"}, True),
    "bridge": ({"name": "bridge", "window": 4, "meet_window": 2, "every": 1}, True),
    "truncate": ({"name": "truncate", "window": 4}, True),
    "truncate by share": ({"name": "truncate", "stop_when": "share"}, False),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_a_method_keeps_for_the_loss_is_planned(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it holds the teacher's states, some of them for its own time only, is what its options say."""
    options, keeps = KEEPING[name]
    held, only = list[bool](), Kept.only

    def noted(kept: Kept, trajectories: Iterable[Trajectory]) -> None:
        held.append(bool(kept.teacher))
        only(kept, trajectories)

    monkeypatch.setattr(Kept, "only", noted)
    parts = assemble(tiny(**{f"method__{key}": value for key, value in options.items()}))
    made = corrected(parts, 0, Stopwatch()).step.prepared
    step = step_of(parts, response_tokens=1000)
    assert any([*held, bool(made.kept.teacher)]) is keeps
    assert (step.response_tokens > 0) is keeps
    writer = step.teacher or step.student
    for states in made.kept.teacher.values():
        assert states.untyped_storage().nbytes() == len(states) * writer.width * writer.weight_bytes
    parts.close()


def test_a_server_leaves_no_states(tiny: Tiny) -> None:
    served = {
        "teacher__engine": "vllm",
        "teacher__url": "http://localhost:1",
        "method__support": "teacher_topk",
    }
    config = tiny(method__name="branch", **served)
    assert step_of_config(config, device=torch.device("cpu")).response_tokens == 0


def test_several_processes_that_hold_no_model_share_one_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of TOPD's readings each keeps its own, so that shards over two are told the same by one and by two."""
    config = tiny(method__name="topd", method__window=4, rollout__max_new_tokens=400)
    one = fits_unloaded(config).values
    monkeypatch.setattr(distributed, "world", lambda: 2)
    two = fits_unloaded(config).values
    assert [two[f"{shard}_2_gib"] for shard in SHARDS[1:]] == [one[f"{shard}_2_gib"] for shard in SHARDS[1:]]
    assert two["none_1_gib"] < one["none_1_gib"]


def test_a_large_pair_is_planned_without_a_weight(tmp_path: Path) -> None:
    """8B and 8B, by their config.json: docs/scale.md has the plan."""
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151_936}
    Qwen3Config(**shape, tie_word_embeddings=False).save_pretrained(tmp_path)
    model = {"model": str(tmp_path), "device": "cpu"}
    config = build(
        {
            "student": {**model, "gradient_checkpointing": True},
            "teacher": {**model, "dtype": "bfloat16"},
            "optim": {"bf16": True, "micro_batch_tokens": 16_384},
            "rollout": {"max_new_tokens": 4096},
        }
    )
    step = step_of_config(config, device=torch.device("cuda"))
    assert step.student.parameters == pytest.approx(8.19e9, rel=0.01)
    assert step.student.trained == step.student.parameters
    planned = [parts_of(step)["peak"] / 1e9, parts_of(step, shard="layer", world=8)["peak"] / 1e9]
    assert planned == pytest.approx([183, 39], rel=0.02)
