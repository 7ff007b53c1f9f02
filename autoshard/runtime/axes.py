"""Axes of the mesh as a rank sees them, and what one direction of a conversion runs on its tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Segments = tuple[int, ...]


class Collective(NamedTuple):
    """What one direction of a conversion runs: a name, the dim (all_to_all: also the dim to cut; rotate: the distance) and segments.

    `size` and `cut_size` are the global lengths of dims that do not divide, 0 for others: what is cut is padded first, what is
    joined is trimmed to them. Padding of a value is a copy of its last slice, of a gradient zero.
    """

    name: str
    dim: int = 0
    segments: Segments = ()
    cut_dim: int = 0
    cut_segments: Segments = ()
    size: int = 0
    cut_size: int = 0
    is_gradient: bool = False


class Axis(NamedTuple):
    """One axis of the mesh as this rank sees it; `group` is the name of its process group."""

    name: str
    size: int
    rank: int
    group: str

    def convert(self, x: Tensor, forward: Collective, backward: Collective) -> Tensor:
        """Run `forward` now and `backward` on the gradient."""
        if self.size == 1:
            return x
        if not (torch.is_grad_enabled() and x.requires_grad):
            return run(forward, x, self)
        return _Convert.apply(x, self, forward, backward)

    def pieces_again(self, x: Tensor, result: Tensor, forward: Collective, source: Callable) -> list[tuple[Tensor, Callable[[], Tensor]]]:
        """`result`, which `forward` made of `x`, and what makes it again; `source(x)` is what has x again."""
        again = source(x)
        return [(result, lambda: run(forward, again(), self))]

    def apply(self, function: type[torch.autograd.Function], *args: Any) -> Any:
        """`function.apply(*args)`, for a function that communicates on its own; it has one result."""
        return function.apply(*args)

    def exchange(self, x: Tensor, sent: Tensor, received: Tensor) -> Tensor:
        """Rows of x to the ranks of the axis, sent[k] of them to the k-th, received[k] from it; gradients go back the same way."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            rows = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received.tolist(), sent.tolist(), self.group)
            return wait(rows)
        return _Exchange.apply(x, self, sent, received)

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the axis; no gradient."""
        return x.detach() if self.size == 1 else wait(torch.ops._c10d_functional.all_reduce(x.detach().contiguous(), "max", self.group))


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis, ctx.forward_collective, ctx.backward_collective = axis, forward, backward
        result = run(forward, x, axis)
        return result.view_as(result) if result is x else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.convert(grad, ctx.backward_collective, ctx.forward_collective), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sent: Tensor, received: Tensor) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return axis.exchange(x, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.exchange(grad, ctx.received, ctx.sent), None, None, None


def cut(x: Tensor, dim: int, segments: Sequence[int], parts: int) -> list[Tensor]:
    """The `parts` pieces of `x` along `dim`, each holding its share of every segment."""
    if len(segments) < 2:
        return list(x.chunk(parts, dim))
    columns = [segment.chunk(parts, dim) for segment in x.split(list(segments), dim)]
    return [torch.cat(piece, dim) for piece in zip(*columns, strict=True)]


def join(pieces: Sequence[Tensor], dim: int, segments: Sequence[int]) -> Tensor:
    """Inverse of cut."""
    if len(segments) < 2:
        return torch.cat(list(pieces), dim)
    lengths = [size // len(pieces) for size in segments]
    columns = [piece.split(lengths, dim) for piece in pieces]
    return torch.cat([part for segment in zip(*columns, strict=True) for part in segment], dim)


def lengthen(x: Tensor, dim: int, length: int, is_gradient: bool = False) -> Tensor:
    """`x` with padding at the end of `dim`: copies of the last slice, or zeros for a gradient."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    padding = (torch.zeros_like(last) if is_gradient else last).expand([missing if k == dim else n for k, n in enumerate(x.shape)])
    return torch.cat([x, padding], dim)


def pad_cut(collective: Collective, x: Tensor, parts: int) -> Tensor:
    """`x` with the dim that `collective` cuts made long enough for equal pieces."""
    is_exchange = collective.name == "all_to_all"
    dim, size = (collective.cut_dim, collective.cut_size) if is_exchange else (collective.dim, collective.size)
    if not size or not (is_exchange or collective.name in ("reduce_scatter", "slice")):
        return x
    return lengthen(x, dim, -(-size // parts) * parts, collective.is_gradient)


def trim_joined(collective: Collective, x: Tensor) -> Tensor:
    """`x` without the padding of the dim that `collective` joined."""
    if not collective.size or collective.name not in ("all_gather", "place", "all_to_all"):
        return x
    return x.narrow(collective.dim, 0, collective.size).contiguous()


def change_padding(collective: Collective, x: Tensor, rank: int, parts: int) -> Tensor:
    """`pad`, `unpad` or `mask` the piece of one rank; only the last piece has any padding."""
    name, dim, size = collective.name, collective.dim, collective.size
    piece = -(-size // parts)
    held = min(piece, size - rank * piece)
    if name == "pad":
        return lengthen(x, dim, piece, collective.is_gradient)
    if held == x.shape[dim]:
        return x
    kept = x.narrow(dim, 0, held)
    return kept.contiguous() if name == "unpad" else lengthen(kept, dim, piece, is_gradient=True)


def wait(x: Tensor) -> Tensor:
    """The result of a functional collective, when it is there."""
    return torch.ops._c10d_functional.wait_tensor(x)


def run(collective: Collective, x: Tensor, axis: Axis) -> Tensor:
    """Run one collective on this rank's tensor."""
    return trim_joined(collective, _run(collective, pad_cut(collective, x, axis.size), axis))


def _run(collective: Collective, x: Tensor, axis: Axis) -> Tensor:
    if x.is_complex():  # backends move real numbers
        return torch.view_as_complex(_run(collective, torch.view_as_real(x), axis))
    name, dim, segments, cut_dim, cut_segments = collective[:5]
    ops = torch.ops._c10d_functional
    if name == "identity":
        return x
    if name in ("pad", "unpad", "mask"):
        return change_padding(collective, x, axis.rank, axis.size)
    if name == "all_gather":
        whole = wait(ops.all_gather_into_tensor(x.contiguous(), axis.size, axis.group))
        return whole if dim == 0 and not segments and x.dim() else join(whole.chunk(axis.size), dim, segments)
    if name == "reduce_scatter":
        pieces = x.contiguous() if dim == 0 and not segments else torch.cat(cut(x, dim, segments, axis.size))
        return wait(ops.reduce_scatter_tensor(pieces, "sum", axis.size, axis.group))
    if name == "all_reduce":
        return wait(ops.all_reduce(x.contiguous(), "sum", axis.group))
    if name == "all_to_all":
        sent = torch.cat([piece.flatten() for piece in cut(x, cut_dim, cut_segments, axis.size)])
        splits = [sent.numel() // axis.size] * axis.size
        got = wait(ops.all_to_all_single(sent, splits, splits, axis.group)).chunk(axis.size)
        shape = [size // axis.size if k == cut_dim else size for k, size in enumerate(x.shape)]
        return join([piece.view(shape) for piece in got], dim, segments)
    if name == "rotate":  # to the rank `dim` places further, round the axis
        target, source = (axis.rank + dim) % axis.size, (axis.rank - dim) % axis.size
        to, source_of = ([x.numel() if rank == peer else 0 for rank in range(axis.size)] for peer in (target, source))
        return wait(ops.all_to_all_single(x.flatten(), source_of, to, axis.group)).view(x.shape)
    if name == "slice":
        return cut(x, dim, segments, axis.size)[axis.rank].clone(memory_format=torch.contiguous_format)  # a view would keep all of x
    if name == "place":
        return join([x if rank == axis.rank else torch.zeros_like(x) for rank in range(axis.size)], dim, segments)
    if name == "keep_first":
        return x if axis.rank == 0 else torch.zeros_like(x)
    raise ValueError(f"unknown collective {name!r}")


def position(axes: Sequence[Axis]) -> int:
    """Number of this rank among those that split a dim on `axes`, outermost first."""
    index = 0
    for axis in axes:
        index = index * axis.size + axis.rank
    return index


def ways(axes: Sequence[Axis]) -> int:
    """How many pieces a dim has that is split on `axes`."""
    total = 1
    for axis in axes:
        total *= axis.size
    return total


def is_at(axes: Sequence[Axis], number: int, like: Tensor) -> Tensor:
    """Whether this rank has piece `number` of those that `axes` split, as a tensor beside `like`."""
    return (like.new_zeros((), dtype=torch.int64) + position(axes)) == number
