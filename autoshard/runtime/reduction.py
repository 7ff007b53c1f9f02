"""Reductions over split dims."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axis, ways

__all__ = ["mean"]


def mean(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, reduced_axes: Sequence[Axis]
) -> Tensor:
    """Mean over dims that are split on `reduced_axes`: the local mean, weighted; the result is P."""
    local = x.mean(dtype=dtype) if dim is None else x.mean(list(dim), keepdim, dtype=dtype)
    return local / ways(reduced_axes)
