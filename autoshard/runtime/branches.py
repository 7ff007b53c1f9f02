"""Results of torch.cond: the value of the branch that ran, with a gradient for everything that either branch reads.

The emitted program has an `if` in the place of `either`; gradients of what the other branch alone reads are zero, as
torch.cond makes them, so an optimizer step changes the same parameters whichever branch ran.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["either", "zero_gradients"]


def either(predicate: Tensor, first: Tensor, second: Tensor, number: int) -> Tensor:
    """`first` where `predicate`, a single bool, holds, else `second`; `number` tells the conds of a program apart."""
    return torch.where(predicate, first, second)


def zero_gradients(value: Tensor, *others: Tensor) -> Tensor:
    """`value`, by way of which each of `others` gets a gradient of zero."""
    return _ZeroGradients.apply(value, *others)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(other.shape, other.dtype, other.device) for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
