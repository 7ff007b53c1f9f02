"""Normalisation over split dims."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axis, ways
from .conversions import sum_over

__all__ = ["batch_norm"]


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
    count = x.numel() // x.shape[1] * ways(batch_axes)
    average = sum_over(x.sum(dims), batch_axes) / count
    centered = x - average.view(shape)
    variance = sum_over((centered * centered).sum(dims), batch_axes) / count
    if running_mean is not None and running_var is not None:
        running_mean.copy_(torch.lerp(running_mean, average.detach().to(running_mean.dtype), momentum))
        running_var.copy_(torch.lerp(running_var, (variance.detach() * (count / (count - 1))).to(running_var.dtype), momentum))
    y = centered * torch.rsqrt(variance + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
