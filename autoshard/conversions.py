"""Conversions: the only nodes of a program that communicate between its ops.

Each row changes the placement of a value on one axis. Its backward is its dual: the row that carries the dual placement
of `dst` to the dual placement of `src` (dual: S -> S, P -> R, R -> P, I -> I). Source: docs/01-placements.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from autoshard.errors import PlacementError
from autoshard.placements import I, Layout, Placement, R, local_segments, local_shape, padded_axes

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "slice", "place", "keep_first", "identity"]

# Bytes a rank puts on the wire, as a factor of the bytes of the value that the axis of n ranks holds together.
WIRE = {
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n / n,
    "rotate": lambda n: min(n - 1, 1) / n,
    "slice": lambda n: 0.0,
    "place": lambda n: 0.0,
    "keep_first": lambda n: 0.0,
    "identity": lambda n: 0.0,
}
COMMUNICATES = frozenset(name for name, factor in WIRE.items() if factor(2))


@dataclass(frozen=True)
class Conversion:
    """One row: `name` is the function that emitted programs call; `forward` and `backward` are what runs each way.

    is_repeated: `forward` runs once more in backward, for what autograd would otherwise keep of the result.
    """

    name: str
    src: str
    dst: str
    forward: Collective
    backward: Collective
    is_repeated: bool = False


CONVERSIONS = (
    Conversion("all_gather", "S", "R", "all_gather", "reduce_scatter"),
    Conversion("all_gather_invariant", "S", "I", "all_gather", "slice"),
    Conversion("all_reduce", "P", "R", "all_reduce", "all_reduce"),
    Conversion("all_reduce_invariant", "P", "I", "all_reduce", "identity"),
    Conversion("reduce_scatter", "P", "S", "reduce_scatter", "all_gather"),
    Conversion("vary", "I", "R", "identity", "all_reduce"),
    Conversion("slice_invariant", "I", "S", "slice", "all_gather"),
    Conversion("keep_first_invariant", "I", "P", "keep_first", "identity"),
    Conversion("unvary", "R", "I", "identity", "keep_first"),
    Conversion("slice_varying", "R", "S", "slice", "place"),
    Conversion("place", "S", "P", "place", "slice"),
    Conversion("keep_first", "R", "P", "keep_first", "keep_first"),
    Conversion("all_to_all", "S", "S", "all_to_all", "all_to_all"),
)
AGAIN = {  # row -> the row in its place where backward gathers again (autoshard.runtime.regather)
    row.name: Conversion(f"{row.name}_again", row.src, row.dst, row.forward, row.backward, is_repeated=True)
    for row in CONVERSIONS
    if row.forward == "all_gather"
}
PADDING = ("mask_padding", "pad_shard")  # what else emitted programs call where a dim does not divide; each rank by itself
BY_NAME = {row.name: row for row in (*CONVERSIONS, *AGAIN.values())}
STARTS = {f"start_{row.name}": row for row in CONVERSIONS if {row.forward, row.backward} & COMMUNICATES}  # of rows in two parts
WAIT = "wait"  # the second part
BY_KINDS = {(row.src, row.dst): row for row in CONVERSIONS}


@dataclass(frozen=True)
class Step:
    """One conversion on one axis (by number): `src` becomes `dst`, the other axes stay."""

    axis: int
    src: Placement
    dst: Placement

    @property
    def row(self) -> Conversion:
        return BY_KINDS[self.src.kind, self.dst.kind]


def is_step_sound(layout: Layout, step: Step) -> bool:
    """Whether no axis inside `step.axis` splits a dim that the step gathers or cuts (its pieces would interleave).

    Between two ways to split one dim there is no equal exchange either.
    """
    if step.src.is_split and step.dst.is_split and step.src.dim == step.dst.dim:
        return False
    dims = {placement.dim for placement in (step.src, step.dst) if placement.is_split}
    return not any(inner.is_split and inner.dim in dims for inner in layout[step.axis + 1 :])


def replace_axis(layout: Layout, axis: int, placement: Placement) -> Layout:
    """`layout` with `placement` on axis number `axis`."""
    return (*layout[:axis], placement, *layout[axis + 1 :])


def without_gradient(layout: Layout) -> Layout:
    """The layout of a value that needs no gradient: I and R are the same thing then, written R."""
    return tuple(R if placement == I else placement for placement in layout)


def step_arguments(layout: Layout, step: Step, shape: Sequence[int], sizes: Sequence[int]) -> tuple:
    """Dims and local segments that the runtime function of `step` takes after the axis; `layout` is the one before it."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for placement, where in ((step.src, layout), (step.dst, replace_axis(layout, step.axis, step.dst))):
        if placement.is_split:
            segments = local_segments(where, step.axis, shape, sizes)
            if segments is None:
                raise PlacementError(f"{placement} on axis {step.axis} does not nest in {where} for shape {tuple(shape)}")
            found.append((placement.dim, segments if len(segments) > 1 else ()))
    if len(found) == 2:
        return (*found[0], *found[1])
    return () if not found else found[0] if found[0][1] else found[0][:1]


def step_sizes(layout: Layout, step: Step, shape: Sequence[int], sizes: Sequence[int]) -> dict[str, int]:
    """Keywords of `step`'s runtime function: global lengths of the dims that it gathers or cuts and that do not divide."""
    names = ("size", "cut_size") if step.src.is_split and step.dst.is_split else ("size",)
    split = [replace_axis(layout, step.axis, placement) for placement in (step.src, step.dst) if placement.is_split]
    padded = [dict(padded_axes(shape, where, sizes)).get(step.axis) for where in split]
    return {name: shape[dim] for name, dim in zip(names, padded, strict=False) if dim is not None}


@cache
def routes(src: Layout, dst: Layout, shape: tuple[int, ...], sizes: tuple[int, ...], needs_grad: bool) -> tuple[tuple[Step, ...], ...]:
    """Sequences of steps from `src` to `dst`, each legal at every point; () inside means nothing to do.

    Every order of the axes that differ is tried. Where none is legal (an inner axis splits the same dim, or a dim is
    split anew), split axes are gathered first and cut again afterwards.
    """
    if not needs_grad:
        src, dst = without_gradient(src), without_gradient(dst)
    differing = [axis for axis in range(len(src)) if src[axis] != dst[axis]]
    found = [route for order in itertools.permutations(differing) if (route := _walk(src, [(a, dst[a]) for a in order], shape, sizes))]
    if found or not differing:
        return tuple(found) or ((),)
    blocking = [axis for axis in range(len(src)) if src[axis].is_split]
    rest = [axis for axis in range(len(src)) if axis in differing or axis in blocking]
    orders = itertools.product(itertools.permutations(blocking), itertools.permutations(rest))
    detours = ([*((axis, R) for axis in gathered), *((axis, dst[axis]) for axis in cut)] for gathered, cut in orders)
    return tuple(dict.fromkeys(route for moves in detours if (route := _walk(src, moves, shape, sizes))))


def _walk(
    layout: Layout, moves: Sequence[tuple[int, Placement]], shape: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[Step, ...] | None:
    steps = []
    for axis, placement in moves:
        if layout[axis] == placement:
            continue
        step = Step(axis, layout[axis], placement)
        after = replace_axis(layout, axis, placement)
        if not is_step_sound(layout, step) or not _fits(shape, after, placement, sizes):
            return None
        steps.append(step)
        layout = after
    return tuple(steps)


def _fits(shape: tuple[int, ...], layout: Layout, new: Placement, sizes: tuple[int, ...]) -> bool:
    """Whether the intermediate layout divides; both ends do, so only a dim that several axes split can fail."""
    shares_dim = new.is_split and sum(placement.is_split and placement.dim == new.dim for placement in layout) > 1
    return not shares_dim or local_shape(shape, layout, sizes) is not None
