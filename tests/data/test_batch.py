"""Alignment token by token, and what must not depend on how a step was cut into batches."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from onpath.config.whole import Config
from onpath.data import batch as batch_module
from onpath.data.batch import collate, micro_batches
from onpath.records import Guidance, Trajectory
from onpath.run.assemble import assemble
from onpath.run.meter import Meter
from onpath.run.parts import Parts
from onpath.training import sample
from tests.stepping import flat, step_on

EOS = 2

# A: two contexts of different lengths, response 5 6 7 EOS. B: one-token response. C: no shift would find it.
A = Trajectory(student_context=(1, 9), teacher_context=(1, 8, 8, 9), response=(5, 6, 7, EOS))
B = Trajectory(student_context=(1, 10, 11, 12, 13), teacher_context=(1,), response=(EOS,))
C = Trajectory(
    student_context=(1, 20, 21),
    teacher_context=(1, 22, 23, 24),
    response=(20, 21, 20),
    weights=(1.0, 0.0, 0.5),
)


def test_every_id_and_index_by_hand() -> None:
    b = collate([A, B, C])
    assert b.student_ids_BS.tolist() == [
        [1, 9, 5, 6, 7, 2],
        [1, 10, 11, 12, 13, 2],
        [1, 20, 21, 20, 21, 20],
    ]
    assert b.teacher_ids_BT.tolist() == [
        [1, 8, 8, 9, 5, 6, 7, 2],
        [1, 2, 0, 0, 0, 0, 0, 0],
        [1, 22, 23, 24, 20, 21, 20, 0],
    ]
    # The position before each response token, in the flattened rows: 6 columns and 8 columns.
    assert b.student_at_N.tolist() == [1, 2, 3, 4, 6 + 4, 12 + 2, 12 + 3, 12 + 4]
    assert b.teacher_at_N.tolist() == [3, 4, 5, 6, 8 + 0, 16 + 3, 16 + 4, 16 + 5]
    assert b.token_N.tolist() == [5, 6, 7, EOS, EOS, 20, 21, 20]
    assert b.weight_N.tolist() == [1, 1, 1, 1, 1, 1, 0, 0.5]
    assert b.row_N.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert b.trajectories == (A, B, C)


def test_indices_point_at_the_token_before() -> None:
    """The id one place after each index is the supervised token; the id at the index is not."""
    b = collate([A, B])
    for ids, at_N in ((b.student_ids_BS, b.student_at_N), (b.teacher_ids_BT, b.teacher_at_N)):
        assert torch.equal(ids.flatten()[at_N + 1], b.token_N)
        assert not (ids.flatten()[at_N] == b.token_N).any(), "this fixture could not tell a shift"


def test_padding_is_on_the_right_and_unread() -> None:
    b = collate([A, B, C])
    for ids, at_N, lengths in (
        (b.student_ids_BS, b.student_at_N, [6, 6, 6]),
        (b.teacher_ids_BT, b.teacher_at_N, [8, 2, 7]),
    ):
        real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        assert (ids[real] > 0).all()
        assert (ids[~real] == 0).all()
        assert real.flatten()[at_N].all()


def test_one_trajectory_alone_has_the_same_tokens() -> None:
    together = collate([A, B, C])
    for row, trajectory in enumerate((A, B, C)):
        alone, mine = collate([trajectory]), together.row_N == row
        assert torch.equal(alone.token_N, together.token_N[mine])
        assert torch.equal(alone.weight_N, together.weight_N[mine])
        width = together.teacher_ids_BT.shape[1]
        assert torch.equal(alone.teacher_at_N, together.teacher_at_N[mine] - row * width)


def test_values_go_back_to_their_trajectories() -> None:
    b = collate([A, B, C])
    assert b.by_row(torch.arange(8.0)) == [[0, 1, 2, 3], [4], [5, 6, 7]]


def test_dtypes_and_moving() -> None:
    b = collate([A, B], device=torch.device("cpu"))
    assert b.student_ids_BS.dtype == b.token_N.dtype == b.student_at_N.dtype == torch.long
    assert b.weight_N.dtype == torch.float32
    assert b.to(torch.device("cpu")).trajectories == b.trajectories


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("max_tokens", [1, 30, 200, 3000, 10**9])
def test_micro_batches_keep_every_trajectory_once_within_the_budget(max_tokens: int, device: str) -> None:
    draw = random.Random(0)
    made = [
        Trajectory(
            student_context=(1,) * draw.randint(1, 9),
            teacher_context=(1,) * draw.randint(1, 30),
            response=tuple(range(draw.randint(0, 40))),
        )
        for _ in range(200)
    ]
    parts = list(micro_batches(made, max_tokens=max_tokens, device=torch.device(device)))
    found = [id(t) for part in parts for t in part]
    assert sorted(found) == sorted(id(t) for t in made if t.response), "empty responses alone are left out"
    for part in parts:
        b = collate(part)
        assert len(part) == 1 or max(b.student_ids_BS.numel(), b.teacher_ids_BT.numel()) <= max_tokens
    assert len(parts) == len(found) if max_tokens == 1 else len(parts) < len(found)


def padded(device: str, lengths: Sequence[int], *, max_tokens: int = 16_384) -> tuple[int, float]:
    """Micro-batches, and the share of their tokens that is padding."""
    made = [Trajectory(student_context=(1,), teacher_context=(1,), response=(5,) * (n - 1)) for n in lengths]
    parts = list(micro_batches(made, max_tokens=max_tokens, device=torch.device(device)))
    shape = [len(part) * max(len(t.response) + 1 for t in part) for part in parts]
    return len(parts), 1 - sum(lengths) / sum(shape)


def test_a_gpu_is_given_full_micro_batches() -> None:
    """64 responses of 500 to 2,048 tokens: on a GPU, where a pass takes the time of its launches, few of 16k
    tokens; on a CPU those that pad least. Neither pads more than an eighth."""
    lengths = [random.Random(seed).randint(500, 2048) for seed in range(64)]
    (few, wide), (many, narrow) = padded("cuda", lengths), padded("cpu", lengths)
    assert few <= 1.25 * sum(lengths) / 16_384 + 1 < many / 2
    assert narrow < wide < 1 / 8


def test_short_rows_are_not_padded_to_a_long_one_on_a_gpu() -> None:
    count, share = padded("cuda", [2048, *[128] * 60])
    assert count == 2
    assert share < 0.2


def test_records_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="1 weights for 4"):
        Trajectory(student_context=(1,), teacher_context=(1,), response=(5, 6, 7, 2), weights=(1.0,))
    with pytest.raises(ValueError, match="at least one context token"):
        Trajectory(student_context=(), teacher_context=(1,), response=(5,))
    with pytest.raises(ValueError, match="leaves the response"):
        Trajectory(
            student_context=(1,),
            teacher_context=(1,),
            response=(5,),
            guidance=(Guidance(start=0, targets=({5: 1.0}, {6: 1.0})),),
        )


# Invariance of the whole step.


def eight(parts: Parts, *, weighted: bool = False) -> list[Trajectory]:
    """Rollouts of unequal length, two of them cut to one token, each with a teacher context of its own
    length."""
    made = []
    for i, r in enumerate(sample(parts, 0)):
        response = r.ids if i > 1 else r.ids[:1]
        made.append(
            Trajectory(
                student_context=r.context,
                teacher_context=(1, *range(4, 4 + i), *r.context[1:]),
                response=response,
                weights=tuple(0.25 * ((i + j) % 5) for j in range(len(response))) if weighted else None,
                origin=r,
            )
        )
    assert len({len(t.student_context) + len(t.response) for t in made}) > 3
    return made


SETTINGS = {
    "reverse_kl": {},
    "jensen_shannon, top-k": {
        "method__divergence": "jensen_shannon",
        "method__support": "teacher_topk",
        "method__support_k": 5,
        "method__tail": "bucket",
    },
    "sampled, discounted": {"method__divergence": "sampled", "method__discount": 0.9},
    "reweighted": {"method__reweight": "teacher_entropy"},
    "truncated": {"method__first_tokens": 4},
    "LoRA": {"student__lora_rank": 4},
}


@pytest.fixture(params=SETTINGS)
def parts(request: pytest.FixtureRequest, tiny: Callable[..., Config]) -> Parts:
    return assemble(tiny(optim__max_grad_norm=1e9, data__eval={}, **SETTINGS[request.param]))


def numbers(meter: Meter, parts: Parts) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, without its times."""
    return {k: v for k, v in meter.row(parts.models.device).items() if isinstance(v, int | float)}


def wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three more columns of padding, filled with an id that means something."""
    real = batch_module._pad_right

    def pad(rows: Sequence[tuple[int, ...]]) -> Tensor:
        width = max(map(len, rows)) + 3
        return real([(*row, *[7] * (width - len(row))) for row in rows])

    monkeypatch.setattr(batch_module, "_pad_right", pad)


def test_loss_and_gradients_do_not_depend_on_the_split(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """1×8 = 8×1 = in between = permuted = padded differently."""
    made = eight(parts, weighted=True)
    whole, gradients = step_on(parts, made)
    expected, row = flat(gradients), numbers(whole, parts)
    assert expected.norm() > 1e-3

    def variants() -> Iterator[tuple[str, list[Trajectory], int]]:
        yield "8 × 1", made, 1
        yield "some", made, 60
        yield "permuted", [made[i] for i in (3, 0, 7, 5, 1, 6, 2, 4)], 60
        wider(monkeypatch)
        yield "padded wider", made, 10**6
        yield "padded wider, 8 × 1", made, 1

    for name, trajectories, tokens in variants():
        meter, other = step_on(parts, trajectories, micro_batch_tokens=tokens)
        assert numbers(meter, parts) == pytest.approx(row, rel=2e-5, abs=1e-6), name
        difference = (flat(other) - expected).norm() / expected.norm()
        assert difference < 2e-5, f"{name}: gradients differ by {difference:.2e}"


def test_the_denominator_is_that_of_the_whole_step(tiny: Callable[..., Config]) -> None:
    """Tokens count once each, whatever sequence they are in: the loss is the token mean, not the mean of
    means."""
    parts = assemble(tiny(optim__max_grad_norm=1e9, data__eval={}))
    made = eight(parts)
    tokens = [len(t.response) for t in made]
    alone = [step_on(parts, [t])[0].row(parts.models.device) for t in made]
    assert [r["tokens"] for r in alone] == tokens
    together = step_on(parts, made)[0].row(parts.models.device)
    mean_of_tokens = sum(n * r["loss"] for n, r in zip(tokens, alone, strict=True)) / sum(tokens)
    mean_of_means = sum(r["loss"] for r in alone) / len(alone)
    assert together["loss"] == pytest.approx(mean_of_tokens, rel=1e-5)
    assert abs(mean_of_tokens - mean_of_means) > 1e-2, "this fixture could not tell the two"
    assert together["tokens"] == sum(tokens)


def test_weight_zero_is_not_counted_and_half_is_half(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(optim__max_grad_norm=1e9, data__eval={}))
    (t,) = [t for t in eight(parts) if len(t.response) == 12][:1]

    first = replace(t, response=t.response[:5])
    masked = replace(t, weights=(1.0,) * 5 + (0.0,) * 7)
    (a, ga), (b, gb) = step_on(parts, [first]), step_on(parts, [masked])
    assert a.step.denominator == b.step.denominator == 5
    assert a.row(parts.models.device)["loss"] == pytest.approx(b.row(parts.models.device)["loss"], rel=1e-5)
    torch.testing.assert_close(flat(ga), flat(gb), rtol=1e-4, atol=1e-6)
    half = step_on(parts, [replace(first, weights=(0.5,) * 5)])[0]
    assert half.step.denominator == 5, "a weight scales the loss, it does not drop the token from the count"
    assert half.row(parts.models.device)["loss"] == pytest.approx(
        0.5 * a.row(parts.models.device)["loss"], rel=1e-5
    )


def test_a_weight_that_becomes_zero_stays_in_the_count(tiny: Callable[..., Config]) -> None:
    """Almost nothing and nothing give the same loss and gradient; what was dropped before stays dropped."""
    parts = assemble(tiny(optim__max_grad_norm=1e9, data__eval={}))
    t = next(t for t in eight(parts) if len(t.response) >= 4)
    t = replace(t, response=t.response[:4], weights=(1.0, 1.0, 1.0, 0.0), behaviour_logprobs=None)
    steps = [step_on(parts, [t.reweighted((1.0, small, 1.0, 1.0))]) for small in (0.0, 1e-9)]
    (a, ga), (b, gb) = steps
    assert a.step.denominator == b.step.denominator == 3
    rows = [meter.row(parts.models.device) for meter, _ in steps]
    assert rows[0]["tokens"] == rows[1]["tokens"] == 3
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    torch.testing.assert_close(flat(ga), flat(gb), rtol=1e-5, atol=1e-7)
    apart = replace(parts, config=tiny(method__reweight="divergence", data__eval={}))
    (dropped, _) = step_on(apart, [t])
    assert dropped.step.denominator == 3


def test_a_step_without_tokens_changes_nothing(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(data__eval={}))
    (t,) = eight(parts)[:1]

    for trajectories in ([], [replace(t, response=())], [replace(t, weights=(0.0,) * len(t.response))]):
        meter, gradients = step_on(parts, trajectories)
        row = meter.row(parts.models.device)
        assert row["loss"] == row["tokens"] == row["grad_norm"] == 0
        assert not gradients, "the optimiser must not move on nothing: its moments would"


def test_eos_is_supervised(tiny: Callable[..., Config]) -> None:
    """The gradient at the last response token, EOS, is part of the step."""
    parts = assemble(tiny(optim__max_grad_norm=1e9, data__eval={}))
    t = Trajectory(student_context=(1, 9, 10), teacher_context=(1, 9, 10), response=(5, 6, EOS))

    with_eos, without = step_on(parts, [t]), step_on(parts, [replace(t, weights=(1.0, 1.0, 0.0))])
    assert with_eos[0].step.denominator == 3
    assert (flat(with_eos[1]) * 3 - flat(without[1]) * 2).norm() > 1e-3
