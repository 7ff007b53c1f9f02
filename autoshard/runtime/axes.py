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

    def start(self, x: Tensor, forward: Collective, backward: Collective) -> Started:
        """Launch `forward` now; `wait` gives its result, launches `backward` on the gradient, and this start waits for that."""
        if self.size == 1:
            return Started(self, x, x, forward, backward)
        source = _Start.apply(x, self, backward) if torch.is_grad_enabled() and x.requires_grad else x
        return Started(self, source, launch(forward, pad_cut(forward, x.detach(), self.size), self), forward, backward)

    def wait(self, started: Started) -> Tensor:
        """The result of what was started."""
        if self.size == 1:
            return started.source
        if torch.is_grad_enabled() and started.source.requires_grad:
            return _Wait.apply(started.source, started.pending, self, started.forward, started.backward)
        return finish(started.forward, started.pending, self, started.source.shape)

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
            return arrived(rows)
        return _Exchange.apply(x, self, sent, received)

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the axis; no gradient."""
        return x.detach() if self.size == 1 else arrived(torch.ops._c10d_functional.all_reduce(x.detach().contiguous(), "max", self.group))


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis, ctx.forward_collective, ctx.backward_collective = axis, forward, backward
        result = run(forward, x, axis)
        return result.view_as(result) if result is x else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.convert(grad, ctx.backward_collective, ctx.forward_collective), None, None, None


class Started(NamedTuple):
    """A conversion under way. `source` is its operand, which keeps the buffer that is read alive and carries the gradient;
    `pending` is written by the collective and may not be read before it is done."""

    axis: Any
    source: Tensor
    pending: Tensor
    forward: Collective
    backward: Collective


class _Start(torch.autograd.Function):
    """Nothing forward; backward waits for the collective that _Wait's backward launched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, backward: Collective) -> Tensor:
        ctx.axis, ctx.backward_collective = axis, backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if _is_backward_split():
            collective, count = ctx.backward_collective, ctx.axis.size
            grad = finish(collective, grad, ctx.axis, sent_shape(collective, grad.shape, count))
        return grad, None, None


class _Wait(torch.autograd.Function):
    """Forward waits; backward launches the dual and hands on what it will write, in the shape of the finished gradient."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, pending: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis, ctx.forward_collective, ctx.backward_collective, ctx.shape = axis, forward, backward, source.shape
        result = finish(forward, pending, axis, source.shape)
        return result.view_as(result) if result is pending else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if _is_backward_split():
            pending = launch(ctx.backward_collective, pad_cut(ctx.backward_collective, grad, ctx.axis.size), ctx.axis)
            pending = pending if pending.shape == ctx.shape else pending.view(ctx.shape)
            if pending is not grad and not torch.compiler.is_compiling():
                pending.sent = grad  # type: ignore[attr-defined]  # else autograd may add to it in place, for another branch, while it is read
            return pending, None, None, None, None
        return ctx.axis.convert(grad, ctx.backward_collective, ctx.forward_collective), None, None, None, None


def _is_backward_split() -> bool:
    """Not while gradients of gradients are recorded, nor when autograd looks for nan in tensors that are not there yet."""
    return not torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_anomaly_enabled())


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


def arrived(x: Tensor) -> Tensor:
    """The result of a functional collective, when it is there."""
    return torch.ops._c10d_functional.wait_tensor(x)


def run(collective: Collective, x: Tensor, axis: Axis) -> Tensor:
    """Run one collective on this rank's tensor."""
    if x.is_complex():  # backends move real numbers; the dims that are cut stay where they are
        return torch.view_as_complex(run(collective, torch.view_as_real(x), axis))
    x = pad_cut(collective, x, axis.size)
    return finish(collective, launch(collective, x, axis), axis, x.shape)


def launch(collective: Collective, x: Tensor, axis: Axis) -> Tensor:
    """Start one collective on a padded tensor; what it returns may be read after `finish` alone. What stays on the rank is done at once."""
    name, dim, segments, cut_dim, cut_segments = collective[:5]
    ops = torch.ops._c10d_functional
    if name == "all_gather":
        return ops.all_gather_into_tensor(x.contiguous(), axis.size, axis.group)
    if name == "reduce_scatter":
        pieces = x.contiguous() if dim == 0 and not segments else torch.cat(cut(x, dim, segments, axis.size))
        return ops.reduce_scatter_tensor(pieces, "sum", axis.size, axis.group)
    if name == "all_reduce":
        return ops.all_reduce(x.contiguous(), "sum", axis.group)
    if name == "all_to_all":
        sent = torch.cat([piece.flatten() for piece in cut(x, cut_dim, cut_segments, axis.size)])
        splits = [sent.numel() // axis.size] * axis.size
        return ops.all_to_all_single(sent, splits, splits, axis.group)
    if name == "rotate":  # to the rank `dim` places further, round the axis
        target, source = (axis.rank + dim) % axis.size, (axis.rank - dim) % axis.size
        to, source_of = ([x.numel() if rank == peer else 0 for rank in range(axis.size)] for peer in (target, source))
        return ops.all_to_all_single(x.flatten(), source_of, to, axis.group)
    return _rearranged(collective, x, axis)


def finish(collective: Collective, pending: Tensor, axis: Axis, shape: Sequence[int]) -> Tensor:
    """What `launch` started, when it is there. shape: of the tensor that was handed to it."""
    name, dim, segments = collective[:3]
    if name == "all_gather" and dim == 0 and not segments:
        return trim_joined(collective, arrived(pending))
    if name in ("all_gather", "all_to_all"):
        piece = [size // axis.size if name == "all_to_all" and k == collective.cut_dim else size for k, size in enumerate(shape)]
        return trim_joined(collective, join(arrived(pending).view(axis.size, *piece).unbind(), dim, segments))
    if name in ("reduce_scatter", "all_reduce"):
        return arrived(pending)
    return arrived(pending).view(shape) if name == "rotate" else pending


def sent_shape(collective: Collective, shape: Sequence[int], count: int) -> list[int]:
    """The shape that a gathering collective was handed, from that of its result, where all dims divide."""
    if collective.name not in ("all_gather", "all_to_all"):
        return list(shape)
    sizes = [size // count if k == collective.dim else size for k, size in enumerate(shape)]
    return [size * count if collective.name == "all_to_all" and k == collective.cut_dim else size for k, size in enumerate(sizes)]


def _rearranged(collective: Collective, x: Tensor, axis: Axis) -> Tensor:
    """What a rank does by itself."""
    name, dim, segments = collective[:3]
    if name == "identity":
        return x
    if name in ("pad", "unpad", "mask"):
        return change_padding(collective, x, axis.rank, axis.size)
    if name == "slice":
        return cut(x, dim, segments, axis.size)[axis.rank].clone(memory_format=torch.contiguous_format)  # a view would keep all of x
    if name == "place":
        whole = join([x if rank == axis.rank else torch.zeros_like(x) for rank in range(axis.size)], dim, segments)
        return trim_joined(collective, whole)
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
