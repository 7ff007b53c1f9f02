"""Choosing along a split dim: each rank's own choice is gathered, and chosen from again.

Of several equal numbers torch does not say which it chooses; every rank chooses alike, but perhaps not what one device would.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .axes import Axis, position
from .conversions import all_gather_invariant

__all__ = ["kthvalue", "topk"]


def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, dim_axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """The k largest or smallest numbers along a split dim, in order, and their places; gradients go to where these are.

    k of each rank at most cross the axis. 5 1 | 3 4 with k = 2 (`=>` forward, `<=` backward of a and b):

        5 1 | 4 3   =>   5 4 | 5 4        a 0 | b 0   <=   a b | a b
    """
    count = min(k, x.shape[dim])
    found = x.topk(count, dim, largest)
    values, places = found[0], found[1] + position(dim_axes) * x.shape[dim]
    for axis in reversed(dim_axes):
        count = min(k, count * axis.size)
        found = all_gather_invariant(values, axis, dim).topk(count, dim, largest)
        values, places = found[0], all_gather_invariant(places, axis, dim).gather(dim, found[1])
    return values, places


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False, *, dim_axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """The k-th smallest number along a split dim and its place."""
    values, places = (chosen.narrow(dim, k - 1, 1) for chosen in topk(x, k, dim, False, dim_axes=dim_axes))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))
