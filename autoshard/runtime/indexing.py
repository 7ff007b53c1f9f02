"""Reading and writing by index where the indexed dims are split.

Indices are global positions. What lies on other ranks is read as zero, so that reads are terms (P); writes to it are dropped:
they go to a slot behind the local piece, which is cut off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from .axes import Axis, position, ways

__all__ = [
    "gather",
    "index",
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "index_select",
    "one_hot",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "take_along_dim",
    "tril",
    "triu",
]

aten = torch.ops.aten


def _local(index: Tensor, size: int, axes: Sequence[Axis], wraps: bool) -> tuple[Tensor, Tensor]:
    """Positions in this rank's piece of `size`, zero where they lie elsewhere, and whether they lie here; wraps: may be negative."""
    whole = size * ways(axes)
    torch._assert_async(((index >= (-whole if wraps else 0)) & (index < whole)).all(), "index out of range")
    positive = torch.where(index < 0, index + whole, index) if wraps else index
    local = positive - position(axes) * size
    here = (local >= 0) & (local < size)
    return torch.where(here, local, 0), here


def index(
    x: Tensor,
    indices: Sequence[Tensor | None],
    *,
    first_axes: Sequence[Axis] = (),
    second_axes: Sequence[Axis] = (),
    third_axes: Sequence[Axis] = (),
) -> Tensor:
    """`x[indices]`; the axes split the first, second and third indexed dim."""
    places, local, here = _indices(x, indices, (first_axes, second_axes, third_axes))
    found = aten.index(x, local)
    is_adjacent = places[-1] - places[0] == len(places) - 1
    behind = found.dim() - here.dim() - (places[0] if is_adjacent else 0)
    return found.masked_fill(~here.reshape([*here.shape, *[1] * behind]), 0)


def _indices(x: Tensor, indices: Sequence[Tensor | None], axes: Sequence[Sequence[Axis]]) -> tuple[list[int], list, Tensor]:
    """Indexed dims, indices into the local piece, and where all of them lie here."""
    given = {k: index for k, index in enumerate(indices) if index is not None}
    local: list[Tensor | None] = list(indices)
    total: Tensor | None = None
    for k, group in zip(given, chain(axes, repeat(())), strict=False):
        here = torch.ones_like(given[k], dtype=torch.bool)
        if group:
            local[k], here = _local(given[k], x.shape[k], group, True)
        total = here if total is None else total & here
    assert total is not None
    return list(given), local, total


def index_put(
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    *,
    first_axes: Sequence[Axis] = (),
    second_axes: Sequence[Axis] = (),
    third_axes: Sequence[Axis] = (),
) -> Tensor:
    """`x[indices] = values`, or added to; what lies on other ranks is dropped."""
    axes = (first_axes, second_axes, third_axes)
    places, local, here = _indices(x, indices, axes)
    dim = next(k for k, group in zip(places, axes, strict=False) if group)
    local[dim] = torch.where(here, local[dim], x.shape[dim])
    return aten.index_put(_with_slot(x, dim), local, values, accumulate).narrow(dim, 0, x.shape[dim])


def _with_slot(x: Tensor, dim: int) -> Tensor:
    """One more slot along `dim`, for what is dropped."""
    return torch.cat([x, torch.ones_like(x.narrow(dim, 0, 1))], dim)


def _written(index: Tensor, x: Tensor, dim: int, axes: Sequence[Axis], wraps: bool = False) -> Tensor:
    """Positions in the local piece; the slot behind it for what lies on other ranks."""
    local, here = _local(index, x.shape[dim], axes, wraps)
    return torch.where(here, local, x.shape[dim])


def index_select(x: Tensor, dim: int, index: Tensor, *, index_axes: Sequence[Axis]) -> Tensor:
    """Slices of x along `dim`, which is split."""
    local, here = _local(index, x.shape[dim], index_axes, False)
    return x.index_select(dim, local).masked_fill(~here.view([-1 if k == dim % x.dim() else 1 for k in range(x.dim())]), 0)


def gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False, index_axes: Sequence[Axis]) -> Tensor:
    """Elements of x along `dim`, which is split; gradients are dense."""
    local, here = _local(index, x.shape[dim], index_axes, False)
    return x.gather(dim, local).masked_fill(~here, 0)


def take_along_dim(x: Tensor, index: Tensor, dim: int, *, index_axes: Sequence[Axis]) -> Tensor:
    """Elements of x along `dim`, which is split; other dims broadcast."""
    local, here = _local(index, x.shape[dim], index_axes, True)
    return torch.take_along_dim(x, local, dim).masked_fill(~here, 0)


def scatter(x: Tensor, dim: int, index: Tensor, source: Tensor | float, *, reduce: str = "", index_axes: Sequence[Axis]) -> Tensor:
    """Writes `source`, a tensor or one number, to x along `dim`, which is split."""
    local = _written(index, x, dim, index_axes)
    how = {"reduce": reduce} if reduce else {}
    return torch.scatter(_with_slot(x, dim), dim, local, source, **how).narrow(dim, 0, x.shape[dim])  # type: ignore[call-overload]


def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, index_axes: Sequence[Axis]) -> Tensor:
    """Adds `source` to x along `dim`, which is split."""
    return _with_slot(x, dim).scatter_add(dim, _written(index, x, dim, index_axes), source).narrow(dim, 0, x.shape[dim])


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True, index_axes: Sequence[Axis]
) -> Tensor:
    """Reduces `source` into x along `dim`, which is split."""
    local = _written(index, x, dim, index_axes)
    return _with_slot(x, dim).scatter_reduce(dim, local, source, reduce, include_self=include_self).narrow(dim, 0, x.shape[dim])


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1, index_axes: Sequence[Axis]) -> Tensor:
    """Adds slices to x along `dim`, which is split."""
    return _with_slot(x, dim).index_add(dim, _written(index, x, dim, index_axes), source, alpha=alpha).narrow(dim, 0, x.shape[dim])


def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor, *, index_axes: Sequence[Axis]) -> Tensor:
    """Replaces slices of x along `dim`, which is split."""
    return _with_slot(x, dim).index_copy(dim, _written(index, x, dim, index_axes), source).narrow(dim, 0, x.shape[dim])


def index_fill(x: Tensor, dim: int, index: Tensor, value: Tensor | float, *, index_axes: Sequence[Axis]) -> Tensor:
    """One value for slices of x along `dim`, which is split."""
    local = _written(index, x, dim, index_axes, True)
    return _with_slot(x, dim).index_fill(dim, local, value).narrow(dim, 0, x.shape[dim])


def one_hot(index: Tensor, num_classes: int = -1, *, class_axes: Sequence[Axis]) -> Tensor:
    """One-hot codes whose classes are split; num_classes counts all of them."""
    size = num_classes // ways(class_axes)
    local, here = _local(index, size, class_axes, False)
    return F.one_hot(local, size) * here.unsqueeze(-1)


def tril(x: Tensor, diagonal: int = 0, *, row_axes: Sequence[Axis] = (), column_axes: Sequence[Axis] = ()) -> Tensor:
    """The lower triangle of matrices whose rows and columns are split."""
    return x.masked_fill(_beside_diagonal(x) > _edge(x, diagonal, row_axes, column_axes), 0)


def triu(x: Tensor, diagonal: int = 0, *, row_axes: Sequence[Axis] = (), column_axes: Sequence[Axis] = ()) -> Tensor:
    """The upper triangle of matrices whose rows and columns are split."""
    return x.masked_fill(_beside_diagonal(x) < _edge(x, diagonal, row_axes, column_axes), 0)


def _beside_diagonal(x: Tensor) -> Tensor:
    """How far right of the local diagonal every element lies."""
    return torch.arange(x.shape[-1], device=x.device) - torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)


def _edge(x: Tensor, diagonal: int, row_axes: Sequence[Axis], column_axes: Sequence[Axis]) -> int:
    """`diagonal` counted from the local diagonal."""
    return diagonal + position(row_axes) * x.shape[-2] - position(column_axes) * x.shape[-1]
