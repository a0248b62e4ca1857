"""A model's linear layers with the products of `onpath.system.products`.

Shape suffixes: K features in, M features out.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from onpath.system import products

Model = TypeVar("Model", bound=nn.Module)


def with_fast_products(model: Model) -> Model:
    """The model itself, whose plain linear layers from now on use the faster product of this processor. Names
    and weights stay; results differ in their last digits."""
    if products.ahead():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
    return model


class Linear(nn.Linear):
    """`nn.Linear` with the same weights and gradients."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own name
        """[..., K] → [..., M]."""
        if not products.suits(input, self.weight):
            return nn.functional.linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return products.product(input, self.weight, self.bias)
        found: Tensor = _Product.apply(input, self.weight, self.bias)
        return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if of_weight else None, weight_MK if of_input else None)
        return products.product(a, weight_MK, bias_M)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        a, weight_MK = ctx.saved_tensors
        above_NM = above.flatten(end_dim=-2)
        of_input = None if weight_MK is None else products.times(above_NM, weight_MK)
        return (
            None if of_input is None else of_input.view(*above.shape[:-1], -1),
            None if a is None else products.outer(above_NM, a.flatten(end_dim=-2)),
            above_NM.sum(0) if ctx.needs_input_grad[2] else None,
        )
