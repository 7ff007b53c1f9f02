"""Rows that neighbours lend beyond the edges of a piece; and ops that only move rows: rolling, and padding that drops as many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .axes import Axis, is_at, ways
from .conversions import rotate

__all__ = ["roll", "shift"]

Edge = float | Literal["outermost", "other end"]


def with_halo(x: Tensor, dim: int, left: int, right: int, axes: Sequence[Axis], edge: Edge = 0.0) -> Tensor:
    """`x` with `left` more rows before and `right` after it along `dim`, which `axes` split; negative counts drop rows.

    Beyond the edges of the whole value stands the number `edge`, the outermost row again, or what lies at the other end.
    """
    parts = [x]
    length = x.shape[dim]
    if left > 0:
        parts.insert(0, _beyond(x, x.narrow(dim, length - left, left), dim, 1, axes, edge))
    if right > 0:
        parts.append(_beyond(x, x.narrow(dim, 0, right), dim, -1, axes, edge))
    whole = torch.cat(parts, dim) if len(parts) > 1 else x
    start, stop = max(-left, 0), whole.shape[dim] - max(-right, 0)
    return whole.narrow(dim, start, stop - start) if stop - start < whole.shape[dim] else whole


def _beyond(x: Tensor, lent: Tensor, dim: int, by: int, axes: Sequence[Axis], edge: Edge) -> Tensor:
    """What the neighbour before (by 1) or after (-1) this piece lent, as this piece lent `lent` to the one on its other side."""
    found = _round(lent, axes, by)
    if edge == "other end":
        return found
    outermost = x.narrow(dim, 0 if by > 0 else x.shape[dim] - 1, 1)
    own = outermost if edge == "outermost" else torch.full_like(outermost, edge)
    return torch.where(is_at(axes, 0 if by > 0 else ways(axes) - 1, x), own, found)


def _round(x: Tensor, axes: Sequence[Axis], by: int) -> Tensor:
    """What the piece `by` (1 or -1) places before holds among those that `axes` split, round the axes: A | B | C => C | A | B by 1."""
    *outer, inner = axes
    moved = rotate(x, inner, by)
    if not outer:
        return moved
    return torch.where(is_at((inner,), 0 if by > 0 else inner.size - 1, x), _round(moved, outer, by), moved)


def roll(
    x: Tensor,
    shifts: Sequence[int],
    dims: Sequence[int] = (),
    *,
    first_axes: Sequence[Axis] = (),
    second_axes: Sequence[Axis] = (),
    third_axes: Sequence[Axis] = (),
) -> Tensor:
    """`x` moved round along `dims`, of which the first three may be split: AB | CD by 1 => DA | BC."""
    split = dict(zip(dims, (first_axes, second_axes, third_axes), strict=False))
    for dim, by in zip(dims, shifts, strict=True):
        axes = split.get(dim, ())
        size = x.shape[dim] * ways(axes)
        by = by % size if 2 * (by % size) <= size else by % size - size  # the shorter way
        x = with_halo(x, dim % x.dim(), by, -by, axes, "other end") if axes else x.roll(by, dim)
    return x


def shift(
    x: Tensor,
    pad: Sequence[int],
    *rest: Any,
    mode: str = "constant",
    value: float | None = None,
    first_axes: Sequence[Axis] = (),
    second_axes: Sequence[Axis] = (),
    third_axes: Sequence[Axis] = (),
) -> Tensor:
    """Padding whose split dims keep their length: AB | CD by (1, -1) => 0A | BC.

    pad: numbers before and after each dim, the last dim first. rest: the op's own mode and value. The axes split the first
    three dims that are padded, in the order of dims.
    """
    value = next((given for given in (*rest, value) if isinstance(given, (int, float))), 0.0)
    local, pieces = list(pad), iter((first_axes, second_axes, third_axes))
    for dim in range(x.dim() - len(pad) // 2, x.dim()):
        at = 2 * (x.dim() - 1 - dim)
        before, after = pad[at : at + 2]
        axes = next(pieces, ()) if before or after else ()
        if axes:
            x = with_halo(x, dim, before, after, axes, value)
            local[at : at + 2] = 0, 0
    return torch.constant_pad_nd(x, local, value) if any(local) else x
