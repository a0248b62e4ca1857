"""Products by oneDNN are those of PyTorch, where it takes them and where it does not."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from onpath.engines import linear
from onpath.losses import Head, Objective, TeacherHidden, fused_objective
from onpath.system import products

pytestmark = pytest.mark.skipif(not products._answers(), reason="a PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """On any processor, for products of any size; the shapes that it was given."""
    asked: list[tuple[int, ...]] = []
    plain = products.product

    def product(a: Tensor, b_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
        asked.append((*a.shape, b_MK.shape[0]))
        return plain(a, b_MK, bias_M)

    monkeypatch.setattr(products, "ahead", lambda: True)
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "product", product)
    return asked


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Tensor, wanted: Tensor) -> bool:
    """To float32's precision of a sum; `wanted` in float64."""
    return bool(((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-12)) < 1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (5, 300, 2), (33, 17, 130), (2, 64, 700)])
def test_the_five_products(shape: tuple[int, int, int], by_onednn: list[tuple[int, ...]]) -> None:
    rows, summed, columns = shape
    a, b, c = numbers(rows, summed), numbers(columns, summed), numbers(rows, columns)
    assert close(products.product(a, b), a.double() @ b.double().t())
    assert close(products.linear(a, b, c[0]), a.double() @ b.double().t() + c[0])
    assert close(products.times(a, b.t().contiguous()), a.double() @ b.double().t())
    assert close(products.outer(a, c), a.double().t() @ c.double())
    out = numbers(rows, columns + 2)
    kept = out[:, columns:].clone()
    products.write_(out[:, :columns], a, b)
    assert close(out[:, :columns], a.double() @ b.double().t())
    assert torch.equal(out[:, columns:], kept)
    total = numbers(summed, columns)
    wanted = total.double() + a.double().t() @ c.double()
    products.add_outer_(total, a, c)
    assert close(total, wanted)
    assert len(by_onednn) == 6


def test_blocks_of_what_is_written(monkeypatch: pytest.MonkeyPatch, by_onednn: list[tuple[int, ...]]) -> None:
    monkeypatch.setattr(products, "_BLOCK_BYTES", 4 * 6 * 4)  # four columns of six rows
    a, b = numbers(6, 5), numbers(10, 5)
    out = torch.empty(6, 10)
    products.write_(out, a, b)
    assert by_onednn == [(6, 5, 4), (6, 5, 4), (6, 5, 2)]
    assert close(out, a.double() @ b.double().t())
    total = torch.ones(6, 10)
    products.add_outer_(total, a.t().contiguous(), b.t().contiguous())
    assert close(total, 1 + a.double() @ b.double().t())


def test_what_it_is_not_asked_for() -> None:
    a, b = numbers(4, 3), numbers(2, 3)
    assert products.suits(a, b)
    assert not products.suits(a.double(), b.double())
    assert not products.suits(a.bfloat16(), b.bfloat16())
    assert not products.suits(a.to("meta"), b.to("meta"))
    assert not products.suits(a[0], b)
    assert not products.suits(a[:0], b)
    assert not products.suits(a, b.as_subclass(type("Quantised", (Tensor,), {})))
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.suits(a, b)


@pytest.mark.parametrize("inside", [True, False], ids=["constants", "with a graph"])
def test_gradients_reach_what_asks_for_them(inside: bool) -> None:
    """The functions without a gradient of their own leave such tensors to PyTorch."""
    a, b = numbers(4, 3), numbers(3, 2)
    if not inside:
        a.requires_grad_()
    found = (
        products.times(a, b).sum() + products.linear(a, b.t()).sum() + products.outer(a, numbers(4, 5)).sum()
    )
    assert found.requires_grad is not inside
    if not inside:
        found.backward()
        assert a.grad is not None


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """A plain layer, and the same with the faster products."""
    torch.manual_seed(3)
    plain: nn.Module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False))
    if kind == "frozen":
        plain.requires_grad_(False)
        plain[0].bias.requires_grad_(True)  # type: ignore[index,union-attr]
    if kind == "lora":
        plain = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))  # type: ignore[arg-type]
    return plain, linear.with_fast_products(copy.deepcopy(plain))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 2, 2, 6)])
@pytest.mark.parametrize("kind", ["whole", "frozen", "lora"])
def test_a_layer_is_the_same_layer(
    kind: str, shape: tuple[int, ...], by_onednn: list[tuple[int, ...]]
) -> None:
    plain, fast = twins(kind)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    inputs = [numbers(*shape).requires_grad_(kind != "frozen") for _ in range(2)]
    above = numbers(*shape[:-1], 4)
    outputs = [model(x) for model, x in zip((plain, fast), inputs, strict=True)]
    assert by_onednn
    assert outputs[1].shape == outputs[0].shape
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.backward(above)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs[0]), plain(inputs[0]))


def test_a_layer_can_be_differentiated_twice() -> None:
    found = []
    for model in twins("whole"):
        x = numbers(5, 6).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum(), [x, *model.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


def test_a_frozen_layer_keeps_no_inputs() -> None:
    """As PyTorch's: with an adapter on it, it is most of what a step would hold."""
    layer = linear.with_fast_products(nn.Sequential(nn.Linear(6, 4)).requires_grad_(False))
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer(numbers(5, 6).requires_grad_())
    assert [tuple(t.shape) for t in packed] == [(4, 6)]


def test_copies_have_weights_of_their_own() -> None:
    _, fast = twins("whole")
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert float(other(numbers(2, 6)).abs().sum()) == 0.0
        assert float(fast(numbers(2, 6)).abs().sum()) > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products, with a head of each kind, by oneDNN and without it."""
    found = []
    for ahead in (True, False):
        monkeypatch.setattr(products, "ahead", lambda ahead=ahead: ahead)
        hidden = numbers(40, 12).requires_grad_()
        weight = numbers(301, 12).to(dtype).requires_grad_()
        teacher = TeacherHidden(
            hidden=numbers(40, 9), head=Head(weight=numbers(301, 9).to(dtype), tokens=300)
        )
        result = fused_objective(
            student_hidden=hidden,
            student_head=Head(weight=weight, tokens=300),
            teacher=teacher,
            objective=Objective(kind="reverse_kl"),
            weights=torch.ones(40),
            denominator=40.0,
        )
        result.loss.backward()
        found.append((result.loss.detach(), hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "is_amd"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, False)],
)
def test_processors(tmp_path: Path, told: str | None, is_amd: bool) -> None:
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    assert products._amd(tmp_path / "cpuinfo") is is_amd


def test_a_pytorch_that_has_no_such_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (AttributeError("gone"), RuntimeError("other arguments"), TypeError("other arguments")):

        def product(*_: object, error: Exception = error) -> Tensor:
            raise error

        monkeypatch.setattr(products, "product", product)
        assert not products._answers()
    monkeypatch.setattr(products, "product", lambda a, b, bias=None: a @ b.t())  # forgets the bias
    assert not products._answers()
