"""Conversions between placements.

A conversion takes the local tensor, the mesh axis, and the dims that it gathers or cuts. Its backward is its dual. On two
ranks holding A and B (`=>` forward, `<=` backward):

    all_gather             A | B  =>  AB | AB        reduce_scatter  <=
    all_gather_invariant   A | B  =>  AB | AB        slice           <=
    all_reduce             A | B  =>  A+B | A+B      all_reduce      <=
    all_reduce_invariant   A | B  =>  A+B | A+B      identity        <=
    reduce_scatter         AC | BD  =>  A+B | C+D    all_gather      <=
    vary                   A | A  =>  A | A          all_reduce      <=
    slice_invariant        AB | AB  =>  A | B        all_gather      <=
    keep_first_invariant   A | A  =>  A | 0          identity        <=
    unvary                 A | A  =>  A | A          keep_first      <=
    slice_varying          AB | AB  =>  A | B        place           <=
    place                  A | B  =>  A0 | 0B        slice           <=
    keep_first             A | A  =>  A | 0          keep_first      <=
    all_to_all             AC | BD  =>  AB | CD      all_to_all      <=

Segments are sizes along a dim that are cut each by itself; () cuts the dim as one. `size` is the global length of a dim that
does not divide (`cut_size` of the one that all_to_all cuts): its pieces have the length ceil(size / ranks), the last is padded,
and what is gathered is trimmed. ABC on two ranks is AB | CC as a value and AB | C0 as a gradient.

What communicates can be taken apart: `s = start_all_gather(x, axis, dim)`, other work, `y = wait(s)`. Backward is the mirror image: that
of `wait` launches the dual collective, that of `start` waits for it, so what stands between them hides both. One `wait` per start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .axes import Axis, Collective, Segments, Started

__all__ = [
    "all_gather",
    "all_gather_invariant",
    "all_reduce",
    "all_reduce_invariant",
    "all_to_all",
    "keep_first",
    "keep_first_invariant",
    "place",
    "reduce_scatter",
    "slice_invariant",
    "slice_varying",
    "start_all_gather",
    "start_all_gather_invariant",
    "start_all_reduce",
    "start_all_reduce_invariant",
    "start_all_to_all",
    "start_reduce_scatter",
    "start_slice_invariant",
    "start_vary",
    "unvary",
    "vary",
    "wait",
]


def all_gather(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """S(dim) -> R."""
    return axis.convert(
        x, Collective("all_gather", dim, segments, size=size), Collective("reduce_scatter", dim, segments, size=size, is_gradient=True)
    )


def all_gather_invariant(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """S(dim) -> I."""
    return axis.convert(
        x, Collective("all_gather", dim, segments, size=size), Collective("slice", dim, segments, size=size, is_gradient=True)
    )


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """P -> R."""
    return axis.convert(x, Collective("all_reduce"), Collective("all_reduce"))


def all_reduce_invariant(x: Tensor, axis: Axis) -> Tensor:
    """P -> I (Megatron's g)."""
    return axis.convert(x, Collective("all_reduce"), Collective("identity"))


def reduce_scatter(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """P -> S(dim)."""
    return axis.convert(
        x, Collective("reduce_scatter", dim, segments, size=size), Collective("all_gather", dim, segments, size=size, is_gradient=True)
    )


def vary(x: Tensor, axis: Axis) -> Tensor:
    """I -> R (Megatron's f)."""
    return axis.convert(x, Collective("identity"), Collective("all_reduce"))


def slice_invariant(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """I -> S(dim)."""
    return axis.convert(
        x, Collective("slice", dim, segments, size=size), Collective("all_gather", dim, segments, size=size, is_gradient=True)
    )


def keep_first_invariant(x: Tensor, axis: Axis) -> Tensor:
    """I -> P."""
    return axis.convert(x, Collective("keep_first"), Collective("identity"))


def unvary(x: Tensor, axis: Axis) -> Tensor:
    """R -> I."""
    return axis.convert(x, Collective("identity"), Collective("keep_first"))


def slice_varying(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """R -> S(dim)."""
    return axis.convert(x, Collective("slice", dim, segments, size=size), Collective("place", dim, segments, size=size, is_gradient=True))


def place(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """S(dim) -> P."""
    return axis.convert(x, Collective("place", dim, segments, size=size), Collective("slice", dim, segments, size=size, is_gradient=True))


def keep_first(x: Tensor, axis: Axis) -> Tensor:
    """R -> P."""
    return axis.convert(x, Collective("keep_first"), Collective("keep_first"))


def all_to_all(
    x: Tensor, axis: Axis, dim: int, segments: Segments, cut_dim: int, cut_segments: Segments, size: int = 0, cut_size: int = 0
) -> Tensor:
    """S(dim) -> S(cut_dim)."""
    forward = Collective("all_to_all", dim, segments, cut_dim, cut_segments, size, cut_size)
    return axis.convert(x, forward, Collective("all_to_all", cut_dim, cut_segments, dim, segments, cut_size, size, is_gradient=True))


class _Starting(NamedTuple):
    """Stands for an axis in a conversion that is only started."""

    axis: Axis

    def convert(self, x: Tensor, forward: Collective, backward: Collective) -> Started:
        return self.axis.start(x, forward, backward)


def _start_of(conversion: Callable[..., Tensor]) -> Callable[..., Started]:
    def start(x: Tensor, axis: Axis, *dims: Any) -> Started:
        return conversion(x, _Starting(axis), *dims)  # type: ignore[return-value]

    functools.update_wrapper(start, conversion)
    start.__name__, start.__qualname__ = (f"start_{conversion.__name__}",) * 2
    start.__doc__ = f"{conversion.__doc__} Only started: `wait` gives the result. Dims must divide."
    return start


start_all_gather = _start_of(all_gather)
start_all_gather_invariant = _start_of(all_gather_invariant)
start_all_reduce = _start_of(all_reduce)
start_all_reduce_invariant = _start_of(all_reduce_invariant)
start_all_to_all = _start_of(all_to_all)
start_reduce_scatter = _start_of(reduce_scatter)
start_slice_invariant = _start_of(slice_invariant)
start_vary = _start_of(vary)


def wait(started: Started) -> Tensor:
    """The result of a conversion that was started."""
    return started.axis.wait(started)


def sum_over(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The sum over ranks of `axes`, to be used differently on each rank (R)."""
    for axis in axes:
        x = all_reduce(x, axis)
    return x


def total(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The sum over ranks of `axes`, to be used alike on each rank (I)."""
    for axis in axes:
        x = all_reduce_invariant(x, axis)
    return x


def rotate(x: Tensor, axis: Axis, by: int) -> Tensor:
    """What the rank `by` places before holds, round the axis: A | B | C => C | A | B by 1."""
    return axis.convert(x, Collective("rotate", by), Collective("rotate", -by))


def varied(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """A value that is I on `axes`, to be used differently on each rank (R)."""
    for axis in axes:
        x = vary(x, axis)
    return x


def maximum(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Elementwise maximum over ranks of `axes`; no gradient."""
    for axis in axes:
        x = axis.maximum(x)
    return x
