"""Lookups in tables whose rows are split: what lies on other ranks reads as zero, so that results are terms (P)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .axes import Axis, position, ways
from .conversions import total

__all__ = ["embedding", "embedding_bag"]

aten = torch.ops.aten


def _found_here(indices: Tensor, rows: int, row_axes: Sequence[Axis], row_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row numbers in the local piece of a table, 0 for rows of other ranks, and which rows lie here."""
    local = indices - position(row_axes) * rows
    known = sum(row_sizes) or rows * ways(row_axes)
    torch._assert_async(((indices >= 0) & (indices < known)).all(), "index out of range of the embedding")
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    row_axes: Sequence[Axis],
    row_sizes: Sequence[int] = (),
) -> Tensor:
    """Lookup in a table whose rows are split on `row_axes`: rows of other ranks read as zero, the result is P.

    row_sizes: the number of rows where it does not divide; the last rank's table then ends in padding, which no index reads.
    """
    if scale_grad_by_freq or sparse:
        raise NotImplementedError("an embedding with scale_grad_by_freq or sparse=True cannot split its rows; pin its weight to I")
    index, here = _found_here(indices, weight.shape[0], row_axes, row_sizes)
    found = F.embedding(index, weight)
    if padding_idx >= 0:  # a padding row is read like any other but gets no gradient
        found = torch.where((indices == padding_idx).unsqueeze(-1), F.embedding(index, weight.detach()), found)
    return torch.where(here.unsqueeze(-1), found, 0.0)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    *,
    mode: str = "mean",
    padding_idx: int = -1,
    include_last_offset: bool = False,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    row_axes: Sequence[Axis] = (),
    index_axes: Sequence[Axis] = (),
    row_sizes: Sequence[int] = (),
) -> Tensor:
    """Rows of a table, summed, averaged or maximised bag by bag, without making the rows.

    weight: (rows, width), rows split on `row_axes`. indices: (bags, length); or (indices), with offsets: (bags) where each bag
    starts and, with `include_last_offset`, where the last one ends. Along `index_axes` the indices of each bag, or the list of
    all, are split; offsets count from the start of the list of all. per_sample_weights: of each index, in a sum. padding_idx: a
    row that is left out, -1 for none. scale_grad_by_freq, sparse: as of the op, where nothing but the width is split. With rows
    or indices split the result, (bags, width), is P; a maximum (`mode` "max") can have neither.
    row_sizes: as for embedding.
    """
    listed = indices.flatten()
    length = listed.shape[0]
    if offsets is None:
        starts = torch.arange(0, length, indices.shape[1], device=indices.device)
    else:  # a bag that starts before or after this rank's piece of the list does so at its edge
        starts = (offsets - position(index_axes) * length).clamp(0, length) if index_axes else offsets
    weights = None if per_sample_weights is None else per_sample_weights.flatten()
    if not row_axes and not (index_axes and mode == "mean"):
        left_out = padding_idx if padding_idx >= 0 else None
        number = ("sum", "mean", "max").index(mode)
        return aten.embedding_bag.padding_idx(
            weight, listed, starts, scale_grad_by_freq, number, sparse, weights, include_last_offset, left_out
        )[0]
    index, here = _found_here(listed, weight.shape[0], row_axes, row_sizes)
    kept = listed != padding_idx
    shares = (here & kept).to(weight.dtype)
    shares = shares if weights is None else torch.where(here & kept, weights, shares)
    sums = F.embedding_bag(index, weight, starts, mode="sum", per_sample_weights=shares, include_last_offset=include_last_offset)
    if mode == "sum":
        return sums
    counts = total(_counted(kept, starts, include_last_offset), index_axes)
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _counted(kept: Tensor, starts: Tensor, include_last_offset: bool) -> Tensor:
    """How many of the list are `kept` in each bag."""
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])[starts]
    whole = before if include_last_offset else torch.cat([before, kept.sum().unsqueeze(0)])
    return whole.diff()
