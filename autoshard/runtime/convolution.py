"""Convolution and pooling over split groups and split space: neighbours lend the rows that a window needs beyond the own piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .axes import Axis, ways
from .halo import with_halo

__all__ = ["adaptive_avg_pool", "avg_pool", "conv", "conv_transpose", "max_pool", "upsample_bilinear2d", "upsample_nearest"]

Axes = Sequence[Axis]
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _dims_of_space(x: Tensor, space: int, *axes: Axes) -> Iterator[tuple[int, int, Axes]]:
    """For each of the last `space` dims: its number among them, its number in `x`, and what splits it. axes: of as many dims or more."""
    for k, split in enumerate(axes[len(axes) - space :]):
        yield k, x.dim() - space + k, split


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    *,
    group_axes: Axes = (),
    depth_axes: Axes = (),
    height_axes: Axes = (),
    width_axes: Axes = (),
) -> Tensor:
    """Convolution of groups split on `group_axes`, and of space whose rows are split on the other axes."""
    space = weight.dim() - 2
    stride, dilation = _each(stride, space), _each(dilation, space)
    before, after = _paddings(padding, weight.shape[2:], dilation)
    pads = [0] * space
    for k, dim, axes in _dims_of_space(x, space, depth_axes, height_axes, width_axes):
        if axes:
            x = with_halo(x, dim, before[k], dilation[k] * (weight.shape[2 + k] - 1) + 1 - stride[k] - before[k], axes)
        elif before[k] == after[k]:
            pads[k] = before[k]
        else:
            x = F.pad(x, [0, 0] * (space - 1 - k) + [before[k], after[k]])
    return _CONV[space](x, weight, bias, stride, pads, dilation, groups // ways(group_axes))


def _each(value: Sequence[int] | int, space: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * space if len(values) == 1 else values


def _paddings(padding: Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows of zeros before and after each dim."""
    if padding == "valid":
        return [0] * len(kernel), [0] * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    numbers = _each(padding, len(kernel))  # type: ignore[arg-type]
    return numbers, numbers


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
    *,
    group_axes: Axes = (),
    depth_axes: Axes = (),
    height_axes: Axes = (),
    width_axes: Axes = (),
) -> Tensor:
    """Transposed convolution; along a split dim the result is `stride` times as long as the input."""
    space = weight.dim() - 2
    stride, padding, output_padding, dilation = (_each(v, space) for v in (stride, padding, output_padding, dilation))
    crops: list[tuple[int, int, int]] = []
    for k, dim, axes in _dims_of_space(x, space, depth_axes, height_axes, width_axes):
        if axes:
            reach, length = dilation[k] * (weight.shape[2 + k] - 1), x.shape[dim] * stride[k]
            left, right = (reach - padding[k]) // stride[k], -(-padding[k] // stride[k])
            x = with_halo(x, dim, left, right, axes)
            crops.append((dim, padding[k] + left * stride[k], length))
            padding[k] = output_padding[k] = 0
    y = _CONV_TRANSPOSE[space](x, weight, None, stride, padding, output_padding, groups // ways(group_axes), dilation)
    for dim, start, length in crops:
        missing = start + length - y.shape[dim]
        y = F.pad(y, [0, 0] * (y.dim() - 1 - dim) + [0, missing]) if missing > 0 else y
        y = y.narrow(dim, start, length)
    return y if bias is None else y + bias.view([-1] + [1] * space)


def max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
    *,
    depth_axes: Axes = (),
    height_axes: Axes = (),
    width_axes: Axes = (),
) -> Tensor:
    """Maximum over windows; beyond the edges of the whole value stands -inf, as the op pads."""
    axes = (depth_axes, height_axes, width_axes)
    x, kernel, steps, pads = _pool_input(x, kernel_size, stride, padding, dilation, axes, -torch.inf)
    return _MAX_POOL[len(kernel)](x, kernel, steps, pads, _each(dilation, len(kernel)), ceil_mode)


def avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    depth_axes: Axes = (),
    height_axes: Axes = (),
    width_axes: Axes = (),
) -> Tensor:
    """Mean over windows, which count the zeros beyond the edges of the whole value."""
    x, kernel, steps, pads = _pool_input(x, kernel_size, stride, padding, (1,), (depth_axes, height_axes, width_axes), 0.0)
    override = {"divisor_override": divisor_override} if divisor_override is not None else {}
    return _AVG_POOL[len(kernel)](x, kernel, steps, pads, ceil_mode, count_include_pad, **override)


def _pool_input(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    axes: Sequence[Axes],
    edge: float,
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """`x` with all that its windows read along split dims; kernel, stride, and the padding that is left to the op."""
    kernel = list(kernel_size)
    space = len(kernel)
    steps, pads, spread = _each(stride, space) if stride else kernel, _each(padding, space), _each(dilation, space)
    for k, dim, split in _dims_of_space(x, space, *axes):
        if split:
            x = with_halo(x, dim, pads[k], spread[k] * (kernel[k] - 1) + 1 - steps[k] - pads[k], split, edge)
            pads[k] = 0
    return x, kernel, steps, pads


def adaptive_avg_pool(
    x: Tensor, output_size: Sequence[int], *, depth_axes: Axes = (), height_axes: Axes = (), width_axes: Axes = ()
) -> Tensor:
    """Mean over windows that divide each dim; a dim that ends as one row is a term of the whole mean (P)."""
    sizes = _each(output_size, 1)
    local, scale = list(sizes), 1
    for k, _, axes in _dims_of_space(x, len(sizes), depth_axes, height_axes, width_axes):
        if axes and sizes[k] == 1:
            scale *= ways(axes)
        elif axes:
            local[k] = sizes[k] // ways(axes)
    y = _ADAPTIVE_AVG_POOL[len(sizes)](x, local)
    return y / scale if scale > 1 else y


def upsample_nearest(
    x: Tensor,
    output_size: Sequence[int] | None,
    scale_factors: Sequence[float] | None,
    *,
    depth_axes: Axes = (),
    height_axes: Axes = (),
    width_axes: Axes = (),
) -> Tensor:
    """Each row repeated; a split dim grows by a whole factor."""
    local = _grown(x, output_size, scale_factors, (depth_axes, height_axes, width_axes)[3 - (x.dim() - 2) :])
    return F.interpolate(x, size=local, mode="nearest")


def upsample_bilinear2d(
    x: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
    *,
    height_axes: Axes = (),
    width_axes: Axes = (),
) -> Tensor:
    """Rows between rows: each piece reads one row of its neighbours, at the edges of the whole value its own again."""
    local = _grown(x, output_size, scale_factors, (height_axes, width_axes))
    crops = []
    for k, dim, axes in _dims_of_space(x, 2, height_axes, width_axes):
        if axes:
            factor = local[k] // x.shape[dim]
            x = with_halo(x, dim, 1, 1, axes, "outermost")
            crops.append((dim, factor, local[k]))
            local[k] += 2 * factor
    y = F.interpolate(x, size=local, mode="bilinear", align_corners=align_corners)
    for dim, start, length in crops:
        y = y.narrow(dim, start, length)
    return y


def _grown(x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None, axes: Sequence[Axes]) -> list[int]:
    """Local lengths of the result."""
    if output_size is not None:
        return [size // ways(a) for size, a in zip(output_size, axes, strict=True)]
    return [int(size * factor) for size, factor in zip(x.shape[2:], scale_factors or (), strict=True)]
