"""What emitted programs call: conversions between placements, lowered ops and seeded random ops. Imports torch alone.

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

Segments are sizes along a dim that are cut each by itself; () cuts the dim as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Segments = tuple[int, ...]


class Collective(NamedTuple):
    """What one direction of a conversion runs: a name, the dim (and for all_to_all the dim to cut) and their segments."""

    name: str
    dim: int = 0
    segments: Segments = ()
    cut_dim: int = 0
    cut_segments: Segments = ()


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

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the axis; no gradient."""
        return x.detach() if self.size == 1 else _wait(torch.ops._c10d_functional.all_reduce(x.detach().contiguous(), "max", self.group))


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis, ctx.forward_collective, ctx.backward_collective = axis, forward, backward
        result = run(forward, x, axis)
        return result.view_as(result) if result is x else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.convert(grad, ctx.backward_collective, ctx.forward_collective), None, None, None


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


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def run(collective: Collective, x: Tensor, axis: Axis) -> Tensor:
    """Run one collective on this rank's tensor."""
    name, dim, segments, cut_dim, cut_segments = collective
    ops = torch.ops._c10d_functional
    if name == "identity":
        return x
    if name == "all_gather":
        whole = _wait(ops.all_gather_into_tensor(x.contiguous(), axis.size, axis.group))
        return whole if dim == 0 and not segments and x.dim() else join(whole.chunk(axis.size), dim, segments)
    if name == "reduce_scatter":
        pieces = x.contiguous() if dim == 0 and not segments else torch.cat(cut(x, dim, segments, axis.size))
        return _wait(ops.reduce_scatter_tensor(pieces, "sum", axis.size, axis.group))
    if name == "all_reduce":
        return _wait(ops.all_reduce(x.contiguous(), "sum", axis.group))
    if name == "all_to_all":
        sent = torch.cat([piece.flatten() for piece in cut(x, cut_dim, cut_segments, axis.size)])
        splits = [sent.numel() // axis.size] * axis.size
        got = _wait(ops.all_to_all_single(sent, splits, splits, axis.group)).chunk(axis.size)
        shape = [size // axis.size if k == cut_dim else size for k, size in enumerate(x.shape)]
        return join([piece.view(shape) for piece in got], dim, segments)
    if name == "slice":
        return cut(x, dim, segments, axis.size)[axis.rank].clone(memory_format=torch.contiguous_format)  # a view would keep all of x
    if name == "place":
        return join([x if rank == axis.rank else torch.zeros_like(x) for rank in range(axis.size)], dim, segments)
    if name == "keep_first":
        return x if axis.rank == 0 else torch.zeros_like(x)
    raise ValueError(f"unknown collective {name!r}")


# --------------------------------------------------------------------------------------------------------- conversions


def all_gather(x: Tensor, axis: Axis, dim: int, segments: Segments = ()) -> Tensor:
    """S(dim) -> R."""
    return axis.convert(x, Collective("all_gather", dim, segments), Collective("reduce_scatter", dim, segments))


def all_gather_invariant(x: Tensor, axis: Axis, dim: int, segments: Segments = ()) -> Tensor:
    """S(dim) -> I."""
    return axis.convert(x, Collective("all_gather", dim, segments), Collective("slice", dim, segments))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """P -> R."""
    return axis.convert(x, Collective("all_reduce"), Collective("all_reduce"))


def all_reduce_invariant(x: Tensor, axis: Axis) -> Tensor:
    """P -> I (Megatron's g)."""
    return axis.convert(x, Collective("all_reduce"), Collective("identity"))


def reduce_scatter(x: Tensor, axis: Axis, dim: int, segments: Segments = ()) -> Tensor:
    """P -> S(dim)."""
    return axis.convert(x, Collective("reduce_scatter", dim, segments), Collective("all_gather", dim, segments))


def vary(x: Tensor, axis: Axis) -> Tensor:
    """I -> R (Megatron's f)."""
    return axis.convert(x, Collective("identity"), Collective("all_reduce"))


def slice_invariant(x: Tensor, axis: Axis, dim: int, segments: Segments = ()) -> Tensor:
    """I -> S(dim)."""
    return axis.convert(x, Collective("slice", dim, segments), Collective("all_gather", dim, segments))


def keep_first_invariant(x: Tensor, axis: Axis) -> Tensor:
    """I -> P."""
    return axis.convert(x, Collective("keep_first"), Collective("identity"))


def unvary(x: Tensor, axis: Axis) -> Tensor:
    """R -> I."""
    return axis.convert(x, Collective("identity"), Collective("keep_first"))


def slice_varying(x: Tensor, axis: Axis, dim: int, segments: Segments = ()) -> Tensor:
    """R -> S(dim)."""
    return axis.convert(x, Collective("slice", dim, segments), Collective("place", dim, segments))


def place(x: Tensor, axis: Axis, dim: int, segments: Segments = ()) -> Tensor:
    """S(dim) -> P."""
    return axis.convert(x, Collective("place", dim, segments), Collective("slice", dim, segments))


def keep_first(x: Tensor, axis: Axis) -> Tensor:
    """R -> P."""
    return axis.convert(x, Collective("keep_first"), Collective("keep_first"))


def all_to_all(x: Tensor, axis: Axis, dim: int, segments: Segments, cut_dim: int, cut_segments: Segments) -> Tensor:
    """S(dim) -> S(cut_dim)."""
    return axis.convert(
        x, Collective("all_to_all", dim, segments, cut_dim, cut_segments), Collective("all_to_all", cut_dim, cut_segments, dim, segments)
    )


# ----------------------------------------------------------------------------------------------------------- lowerings


def position(axes: Sequence[Axis]) -> int:
    """Number of this rank among those that split a dim on `axes`, outermost first."""
    index = 0
    for axis in axes:
        index = index * axis.size + axis.rank
    return index


def _count(axes: Sequence[Axis]) -> int:
    total = 1
    for axis in axes:
        total *= axis.size
    return total


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    row_axes: Sequence[Axis],
) -> Tensor:
    """Lookup in a table whose rows are split on `row_axes`: rows of other ranks read as zero, the result is P."""
    if scale_grad_by_freq or sparse:
        raise NotImplementedError("an embedding with scale_grad_by_freq or sparse=True cannot split its rows; pin its weight to I")
    rows = weight.shape[0]
    local = indices - position(row_axes) * rows
    torch._assert_async(((indices >= 0) & (indices < rows * _count(row_axes))).all(), "index out of range of the embedding")
    here = (local >= 0) & (local < rows)
    index = torch.where(here, local, 0)
    found = F.embedding(index, weight)
    if padding_idx >= 0:  # a padding row is read like any other but gets no gradient
        found = torch.where((indices == padding_idx).unsqueeze(-1), F.embedding(index, weight.detach()), found)
    return torch.where(here.unsqueeze(-1), found, 0.0)


def mean(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, reduced_axes: Sequence[Axis]
) -> Tensor:
    """Mean over dims that are split on `reduced_axes`: the local mean, weighted; the result is P."""
    local = x.mean(dtype=dtype) if dim is None else x.mean(list(dim), keepdim, dtype=dtype)
    return local / _count(reduced_axes)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
    *,
    batch_axes: Sequence[Axis],
) -> Tensor:
    """Batch norm over samples that are split on `batch_axes`, with the statistics of the whole batch."""
    if not training:
        return torch.batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    count = x.numel() // x.shape[1] * _count(batch_axes)
    average = _sum_over(x.sum(dims), batch_axes) / count
    centered = x - average.view(shape)
    variance = _sum_over((centered * centered).sum(dims), batch_axes) / count
    if running_mean is not None and running_var is not None:
        running_mean.copy_(torch.lerp(running_mean, average.detach().to(running_mean.dtype), momentum))
        running_var.copy_(torch.lerp(running_var, (variance.detach() * (count / (count - 1))).to(running_var.dtype), momentum))
    y = centered * torch.rsqrt(variance + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _sum_over(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    for axis in axes:
        x = all_reduce(x, axis)
    return x


def _total(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    for axis in axes:
        x = all_reduce_invariant(x, axis)
    return x


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    class_axes: Sequence[Axis] = (),
    batch_axes: Sequence[Axis] = (),
) -> Tensor:
    """Cross entropy with classes split on `class_axes` and samples split on `batch_axes`, without gathering either.

    logits: (N, C, ...) or (C), target: (N, ...) or () of class numbers, weight: (C). The loss of each sample is whole on
    every rank of class_axes (I); the sum or mean over samples is a term on batch_axes (P).
    """
    dim, dtype = 1 if logits.dim() > 1 else 0, logits.dtype
    classes = logits.shape[dim]
    logits = logits.float() if dtype in (torch.float16, torch.bfloat16) else logits  # sums over classes, as the fused op makes them
    top = logits.detach().amax(dim, keepdim=True)
    for axis in class_axes:
        top = axis.maximum(top)
    shifted = logits - top
    log_z = torch.log(_total(shifted.exp().sum(dim), class_axes))
    valid = target != ignore_index
    known = (target >= 0) & (target < classes * _count(class_axes))
    torch._assert_async((known | ~valid).all(), "cross entropy target out of range")
    wanted = torch.where(valid, target, 0) - position(class_axes) * classes
    here = (wanted >= 0) & (wanted < classes)
    index = torch.where(here, wanted, 0)
    share = torch.ones_like(log_z) if weight is None else _total(torch.where(here, torch.take(weight, index), 0.0), class_axes)
    picked = _total(torch.where(here, shifted.gather(dim, index.unsqueeze(dim)).squeeze(dim), 0.0), class_axes)
    loss = (log_z - picked) * share
    if label_smoothing:
        count = classes * _count(class_axes)
        each = shifted if weight is None else shifted * weight.view([-1 if d == dim else 1 for d in range(logits.dim())])
        shares = count if weight is None else _total(weight.sum(), class_axes)
        everywhere = log_z * shares - _total(each.sum(dim), class_axes)  # log_z is I: it must not be used per class
        loss = (1 - label_smoothing) * loss + label_smoothing / count * everywhere
    loss = torch.where(valid, loss, 0.0)
    if reduction == 1:
        loss = loss.sum() / _total(torch.where(valid, share, 0.0).sum().detach(), batch_axes)
    elif reduction == 2:
        loss = loss.sum()
    is_autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
    return loss if is_autocast else loss.to(dtype)


# ------------------------------------------------------------------------------------------------------ programs at work


def mix(*numbers: int) -> int:
    """A 63-bit seed that differs whenever any of `numbers` does."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run random ops on `device` from `seed`, and leave the default generator as it was."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if on_cpu:
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(device).manual_seed(seed)
        yield


class Program:
    """Base of emitted programs: the tensors that a rank holds, its axes, and the seed of this step.

    tensor: a local parameter or buffer by the model's name. Random ops draw from a seed made of the step, the place in the
    program and the rank's position on the axes that split the value: ranks that hold the same value draw the same
    numbers, ranks that hold different pieces draw different ones.
    """

    def __init__(
        self, axes: Sequence[Axis], tensor: Callable[[str], Tensor], device: torch.device, seed: Callable[[], int] = lambda: 0
    ) -> None:
        self.axes = tuple(axes)
        self.tensor = tensor
        self.device = device
        self.seed = seed
        self._constants: dict[str, Tensor] | None = None

    def constants(self) -> dict[str, Tensor]:
        """What depends on no input and no parameter; overridden by programs that have any."""
        return {}

    def constant(self, name: str) -> Tensor:
        if self._constants is None:
            with torch.inference_mode(False), torch.no_grad():
                self._constants = self.constants()
        return self._constants[name]

    def forget_constants(self) -> None:
        """Compute constants anew at the next step, after buffers or the device changed."""
        self._constants = None

    @torch.compiler.disable  # seeds differ at every step: compiled in, each would be a new graph
    def random(self, site: int, axes: Sequence[Axis], op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the random op `op` at place `site` of the program on a value that `axes` split."""
        with seeded(mix(self.seed(), site, *(number for axis in axes for number in (axis.size, axis.rank))), self.device):
            return op(*args, **kwargs)
