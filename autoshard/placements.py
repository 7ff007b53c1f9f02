"""Placements: how a global tensor lies on one mesh axis, and layouts: one placement per axis.

    placement  each rank holds                       its gradient is
    S(d)       its slice along dim d                 S(d)
    P          a term; the value is the sum          R
    R          the whole value, used differently     P
    I          the whole value, used identically     I

A segmented split `S(d, segments=(q, k, v))` cuts each of the consecutive segments of dim d by itself, so that a rank
holds its part of every segment. When one dim is split on several axes the pieces nest, outermost axis first: each
placement cuts the piece that the axes before it left.

A dim that does not divide may be split by one axis, plainly: all pieces but the last have the length ceil(size / ranks).
At rest (`shard`, a DTensor) the last piece is shorter; inside a program it is padded to the length of the others, a value
with copies of its last slice, a gradient with zeros. Proof: docs/decisions/008-uneven-sizes.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from autoshard.errors import PlacementError
from autoshard.mesh import MeshSpec
from autoshard.runtime import cut, join, lengthen
from autoshard.symbolic import Size

Kind = Literal["S", "P", "R", "I"]
LEAST_PER_PADDING = 8  # at most one in eight positions of a padded dim is padding


@dataclass(frozen=True, order=True)
class Placement:
    """One of S(dim), P, R, I. `segments` are global sizes along `dim` that sum to its length, or () for a plain split."""

    kind: Kind
    dim: int = -1
    segments: tuple[int, ...] = ()
    is_split: bool = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_split", self.kind == "S")  # both are read millions of times while planning
        object.__setattr__(self, "_hash", hash((self.kind, self.dim, self.segments)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds the whole value (R or I)."""
        return self.kind in "RI"

    def __str__(self) -> str:
        if not self.is_split:
            return self.kind
        if not self.segments:
            return f"S({self.dim})"
        if len(set(self.segments)) == 1:
            return f"S({self.dim}:{len(self.segments)}x{self.segments[0]})"
        return f"S({self.dim}:{'+'.join(map(str, self.segments))})"

    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Read `R`, `I`, `P`, `S(0)`, `S(1:3x64)` or `S(1:64+32+32)`."""
        if text in ("P", "R", "I"):
            return cls(text)  # type: ignore[arg-type]
        match = re.fullmatch(r"S\((\d+)(?::(?:(\d+)x(\d+)|(\d+(?:\+\d+)+)))?\)", text)
        if match is None:
            raise PlacementError(f"cannot read placement {text!r}; write R, I, P, S(0) or S(0:3x64)")
        dim, count, size, sizes = match.groups()
        segments = (int(size),) * int(count) if count else tuple(map(int, sizes.split("+"))) if sizes else ()
        return S(int(dim), segments)


P, R, I = Placement("P"), Placement("R"), Placement("I")  # noqa: E741 - the theory's own names
Layout = tuple[Placement, ...]


def S(dim: int, segments: Sequence[int] = ()) -> Placement:
    """Split along `dim`; a single segment is a plain split."""
    return Placement("S", dim, tuple(segments) if len(segments) > 1 else ())


def format_layout(layout: Layout, mesh: MeshSpec) -> str:
    """`S(0)@dp R@tp`."""
    return " ".join(f"{placement}@{axis}" for placement, axis in zip(layout, mesh.axes, strict=True))


def shown_layout(layout: Layout, mesh: MeshSpec) -> str:
    """A layout for a reader: as format_layout, or `whole` where stages are a rank each."""
    return "whole" if mesh.is_alone else format_layout(layout, mesh)


def parse_layout(text: str, mesh: MeshSpec) -> Layout:
    """Inverse of format_layout; every axis of the mesh must be named once, in order."""
    parts = [part.partition("@") for part in text.split()]
    if tuple(axis for _, _, axis in parts) != mesh.axes:
        raise PlacementError(f"layout {text!r} does not name the axes {', '.join(mesh.axes)} of the mesh, in order")
    return tuple(Placement.parse(placement) for placement, _, _ in parts)


def padded_piece(size: int, n: int) -> int | None:
    """Length of each of `n` pieces of a dim when the last is padded.

    None where a piece would be empty or too much padding, and for a size that may change: its pieces are alike at every size.
    """
    if isinstance(size, Size):
        return None
    piece = -(-size // n)
    padding = piece * n - size
    return piece if padding < piece and LEAST_PER_PADDING * padding <= piece * n else None


def padded_axes(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Axes (by number) that split a dim which does not divide, each with that dim; the layout fits the shape."""
    return [(axis, p.dim) for axis, (p, n) in enumerate(zip(layout, sizes, strict=True)) if p.is_split and shape[p.dim] % n]


def local_segments(layout: Layout, axis: int, shape: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Segments that axis number `axis` cuts, within the piece that the axes before it left; None when they cannot nest.

    A plain outer split keeps whole segments (it needs equal ones, and a count that divides); a segmented outer split
    shortens each.
    """
    placement = layout[axis]
    outer = [(p, n) for p, n in zip(layout[:axis], sizes, strict=False) if p.is_split and p.dim == placement.dim]
    plain = math.prod(n for p, n in outer if not p.segments)
    segmented = math.prod(n for p, n in outer if p.segments)
    segments = placement.segments or next((p.segments for p, _ in outer if p.segments), ())
    if any(p.segments not in ((), segments) for p, _ in outer) or any(size % segmented for size in segments):
        return None
    if segments and (plain > 1 or not placement.segments):
        own = plain * (1 if placement.segments else sizes[axis])
        if len(set(segments)) > 1 or len(segments) % own:
            return None
    if not placement.segments:
        return (shape[placement.dim] // (plain * segmented),)
    return tuple(size // segmented for size in segments[: len(segments) // plain])


def local_shape(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Shape that every rank holds inside a program, or None when dims neither divide nor can be padded, or segments do not fit."""
    local = list(shape)
    for axis, placement in enumerate(layout):
        if not placement.is_split:
            continue
        if placement.dim >= len(local) or not local[placement.dim]:
            return None
        if local[placement.dim] % sizes[axis]:
            piece = padded_piece(shape[placement.dim], sizes[axis])
            if piece is None or placement.segments or _ways(layout, placement.dim, sizes) != sizes[axis]:
                return None
            local[placement.dim] = piece
            continue
        if placement.segments and (sum(placement.segments) != shape[placement.dim] or isinstance(shape[placement.dim], Size)):
            return None  # segments are fixed lengths, which a size that may change does not consist of
        segments = local_segments(layout, axis, shape, sizes)
        if segments is None or any(size % sizes[axis] for size in segments):
            return None
        local[placement.dim] //= sizes[axis]
    return tuple(local)


def _ways(layout: Layout, dim: int, sizes: Sequence[int]) -> int:
    return math.prod(n for p, n in zip(layout, sizes, strict=True) if p.is_split and p.dim == dim)


def shard(tensor: torch.Tensor, layout: Layout, mesh: MeshSpec, coordinate: Sequence[int]) -> torch.Tensor:
    """The piece of a whole tensor that the rank at `coordinate` holds at rest; P keeps the value on the first rank of its axis."""
    for axis, placement in enumerate(layout):
        if placement.is_split:
            segments = local_segments(layout, axis, _grown(tensor, layout, mesh, axis), mesh.shape)
            assert segments is not None
            tensor = cut(tensor, placement.dim, segments, mesh.shape[axis])[coordinate[axis]]
        elif placement == P and coordinate[axis]:
            tensor = torch.zeros_like(tensor)
    return tensor


def pad(piece: torch.Tensor, layout: Layout, shape: Sequence[int], mesh: MeshSpec, is_gradient: bool = False) -> torch.Tensor:
    """The piece of a tensor of `shape` as it is inside a program: padded where its dims do not divide."""
    for axis, dim in padded_axes(shape, layout, mesh.shape):
        piece = lengthen(piece, dim, -(-shape[dim] // mesh.shape[axis]), is_gradient)
    return piece


def unshard(pieces: Sequence[torch.Tensor], layout: Layout, mesh: MeshSpec, shape: Sequence[int] = ()) -> torch.Tensor:
    """The global value of one local tensor per rank, in rank order. `shape` is needed where the tensors may be padded."""
    pieces = list(pieces)
    for axis in reversed(range(mesh.ndim)):
        placement, size = layout[axis], mesh.shape[axis]
        groups = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        if placement.is_split:
            whole = list(groups[0][0].shape)
            whole[placement.dim] *= size
            full = _grown(groups[0][0].new_empty(whole, device="meta"), layout, mesh, axis)
            segments = local_segments(layout, axis, full, mesh.shape)
            assert segments is not None
            pieces = [join(group, placement.dim, segments) for group in groups]
        else:
            pieces = [sum(group[1:], group[0]) if placement == P else group[0] for group in groups]
    return pieces[0][tuple(slice(size) for size in shape)] if shape else pieces[0]


def _grown(tensor: torch.Tensor, layout: Layout, mesh: MeshSpec, axis: int) -> list[int]:
    """Global shape of a tensor that only the axes before `axis` have cut so far."""
    shape = list(tensor.shape)
    for placement, size in zip(layout[:axis], mesh.shape, strict=False):
        if placement.is_split:
            shape[placement.dim] *= size
    return shape
