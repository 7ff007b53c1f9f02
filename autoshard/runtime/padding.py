"""Padding of dims that do not divide: put on what is read, set to zero before sums, and known to lowerings.

A value that is split unevenly has pieces of one length, and the last rank's ends in copies of the last slice. ABC on two ranks
(`=>` forward, `<=` backward):

    pad_shard       AB | C   =>  AB | CC      AB | C   <=  AB | C0
    mask_padding    AB | CC  =>  AB | C0      AB | C0  <=  AB | C0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axis, Collective, position

__all__ = ["is_padding", "mask_padding", "pad_shard"]


def pad_shard(x: Tensor, axis: Axis, dim: int, size: int) -> Tensor:
    """A shard at rest, as torch.chunk cuts a dim of global length `size`, with its padding."""
    return axis.convert(x, Collective("pad", dim, size=size), Collective("unpad", dim, size=size, is_gradient=True))


def mask_padding(x: Tensor, axis: Axis, dim: int, size: int) -> Tensor:
    """Zero at padding, so that sums over `dim` are those of the real positions."""
    return axis.convert(x, Collective("mask", dim, size=size), Collective("mask", dim, size=size, is_gradient=True))


def is_padding(x: Tensor, axes: Sequence[Axis], dim: int, size: int) -> Tensor:
    """bool[x.shape[dim]]: which positions of this rank's piece of a dim, split on `axes`, lie beyond its global length `size`."""
    return torch.arange(x.shape[dim], device=x.device) + position(axes) * x.shape[dim] >= size
