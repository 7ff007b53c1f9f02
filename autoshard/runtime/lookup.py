"""Lookups in split tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .axes import Axis, position, ways

__all__ = ["embedding"]


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
    torch._assert_async(((indices >= 0) & (indices < rows * ways(row_axes))).all(), "index out of range of the embedding")
    here = (local >= 0) & (local < rows)
    index = torch.where(here, local, 0)
    found = F.embedding(index, weight)
    if padding_idx >= 0:  # a padding row is read like any other but gets no gradient
        found = torch.where((indices == padding_idx).unsqueeze(-1), F.embedding(index, weight.detach()), found)
    return torch.where(here.unsqueeze(-1), found, 0.0)
