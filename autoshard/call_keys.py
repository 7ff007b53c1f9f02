"""What of a call decides which program serves it: structure, kinds and shapes of its arguments, up to sizes that may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoshard.dynamic_dims import Mark, Marks
from autoshard.ops.row import TensorInfo
from autoshard.symbolic import Size


def leaf_key(leaf: Any) -> Any:
    """What of one argument a program is made for."""
    if isinstance(leaf, DTensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.requires_grad, str(leaf.placements))
    return (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else ("value", repr(leaf))


def family_of(keys: tuple, marks: Marks) -> tuple:
    """The keys of all leaves, the same for all sizes that may change."""
    return keys if not marks else tuple([_without_sizes(key, dims) for key, dims in zip(keys, marks, strict=True)])


def _without_sizes(key: Any, dims: Mapping[int, Mark]) -> Any:
    return (tuple([dims[d].name if d in dims else size for d, size in enumerate(key[0])]), *key[1:]) if dims else key


def may_be(value: TensorInfo, given: TensorInfo) -> bool:
    """Whether an argument is what a plan takes, up to sizes that may change."""
    same_kind = (value.dtype, value.needs_grad, len(value.shape)) == (given.dtype, given.needs_grad, len(given.shape))
    sizes = zip(value.shape, given.shape, strict=True)
    return same_kind and all(size == has or (isinstance(size, Size) and has > 1) for size, has in sizes)


def described(tensor: torch.Tensor) -> TensorInfo:
    """A tensor as programs know their inputs."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
