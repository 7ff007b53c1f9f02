"""Normalisation over split dims."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axis, ways
from .conversions import sum_over, total, varied
from .precision import narrow, widen

__all__ = ["batch_norm", "fused_rms_norm", "group_norm", "instance_norm", "layer_norm", "native_layer_norm", "rms_norm"]


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
    by_channel = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    if not (training and batch_axes) and not _is_misread(x):
        return torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    if not training and running_mean is not None and running_var is not None:
        y = (widen(x) - widen(running_mean).view(by_channel)) * torch.rsqrt(widen(running_var) + eps).view(by_channel)
        return _scaled(y, weight, bias, by_channel).to(x.dtype)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = x.numel() // x.shape[1] * ways(batch_axes)
    y, average, variance = _standardized(x, dims, eps, batch_axes)
    if running_mean is not None and running_var is not None:
        running_mean.copy_(torch.lerp(running_mean, average.detach().flatten().to(running_mean.dtype), momentum))
        unbiased = variance.detach().flatten() * (count / (count - 1))
        running_var.copy_(torch.lerp(running_var, unbiased.to(running_var.dtype), momentum))
    return _scaled(y, weight, bias, by_channel).to(x.dtype)


def _is_misread(x: Tensor) -> bool:
    """Whether torch's batch norm may compute wrong gradients of `x`.

    Of one sample its CPU kernel takes a gradient whose channels lie innermost for one that lies as `x` does (torch 2.13: grad of
    strides (c, 1, w c, c)). Such gradients come from a transpose behind the norm, and a split batch leaves ranks with one sample.
    """
    return x.shape[0] == 1 and x.device.type == "cpu" and torch.is_grad_enabled()


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    dim_axes: Sequence[Axis],
) -> Tensor:
    """Layer norm over the last dims, of which some are split on `dim_axes`: two sums of each sample cross the axes."""
    y, _, _ = _standardized(x, _last(normalized_shape), eps, dim_axes)
    return narrow(_scaled(y, weight, bias), x.dtype)


def native_layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, *, dim_axes: Sequence[Axis]
) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm, and the mean and reciprocal deviation of each sample, through which no gradient flows."""
    y, average, variance = _standardized(x, _last(normalized_shape), eps, dim_axes)
    return _scaled(y, weight, bias), average.detach(), torch.rsqrt(variance.detach() + eps)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, *, dim_axes: Sequence[Axis]
) -> Tensor:
    """RMS norm over the last dims, of which some are split on `dim_axes`: one sum of each sample crosses the axes."""
    return narrow(fused_rms_norm(widen(x), normalized_shape, weight, eps, dim_axes=dim_axes)[0], x.dtype)


def fused_rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, *, dim_axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """rms_norm, and the reciprocal root mean square of each sample."""
    wide, dims = widen(x), _last(normalized_shape)
    count = math.prod([x.shape[dim] for dim in dims]) * ways(dim_axes)
    squares = total((wide * wide).sum(dims, keepdim=True), dim_axes)
    scale = torch.rsqrt(squares / count + (torch.finfo(wide.dtype).eps if eps is None else eps))
    return _scaled(wide * varied(scale, dim_axes), weight, None).to(x.dtype), scale


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    *,
    group_axes: Sequence[Axis] = (),
    dim_axes: Sequence[Axis] = (),
) -> Tensor:
    """Group norm of (N, C, ...): whole groups split on `group_axes`, channels of a group or space on `dim_axes`."""
    groups = num_groups // ways(group_axes)
    if not dim_axes:
        return torch.group_norm(x, groups, weight, bias, eps, cudnn_enabled)
    y, _, _ = _standardized(x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups), [2], eps, dim_axes)
    return narrow(_scaled(y.reshape(x.shape), weight, bias, [-1, *[1] * (x.dim() - 2)]), x.dtype)


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
    *,
    dim_axes: Sequence[Axis],
) -> Tensor:
    """Instance norm of (N, C, ...), without running statistics where space is split on `dim_axes`."""
    if running_mean is not None or not (dim_axes or _is_misread(x)):
        return torch.instance_norm(x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)
    y, _, _ = _standardized(x, list(range(2, x.dim())), eps, dim_axes)
    return _scaled(y, weight, bias, [-1, *[1] * (x.dim() - 2)]).to(x.dtype)


def _standardized(x: Tensor, dims: list[int], eps: float, axes: Sequence[Axis]) -> tuple[Tensor, Tensor, Tensor]:
    """`x` less its mean, over its deviation, and both statistics: over `dims`, which are split on `axes`, in float32 at least."""
    x = widen(x)
    count = math.prod([x.shape[dim] for dim in dims]) * ways(axes)
    average = sum_over(x.sum(dims, keepdim=True), axes) / count
    centered = x - average
    variance = sum_over((centered * centered).sum(dims, keepdim=True), axes) / count
    return centered * torch.rsqrt(variance + eps), average, variance


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] = ()) -> Tensor:
    """`y * weight + bias`, both viewed as `shape` when one is given."""
    y = y if weight is None else y * (widen(weight).view(shape) if shape else widen(weight))
    return y if bias is None else y + (widen(bias).view(shape) if shape else widen(bias))


def _last(normalized_shape: Sequence[int]) -> list[int]:
    return list(range(-len(normalized_shape), 0))
