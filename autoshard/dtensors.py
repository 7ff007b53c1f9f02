"""Layouts as DTensor placements, and back."""

from __future__ import annotations

from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement

from autoshard.errors import InputError
from autoshard.placements import I, Layout, R, S, local_shape
from autoshard.torch_internals import _StridedShard


def torch_placements(layout: Layout) -> list[TorchPlacement]:
    """The DTensor placements of a storable layout."""
    return [
        _StridedShard(p.dim, split_factor=len(p.segments)) if p.segments else Shard(p.dim) if p.is_split else Replicate() for p in layout
    ]


def stored_layout(tensor: DTensor) -> Layout:
    """Inverse of torch_placements, for a parameter or its optimizer state."""
    length = tensor.shape
    return tuple(
        S(p.dim, (length[p.dim] // p.split_factor,) * p.split_factor)
        if isinstance(p, _StridedShard)
        else S(p.dim)
        if isinstance(p, Shard)
        else I
        for p in tensor.placements
    )


def layout_of(tensor: DTensor, needs_grad: bool) -> Layout:
    """The layout of a DTensor that the caller passes. Raises InputError for placements that cannot enter a program."""
    found = []
    for placement in tensor.placements:
        if type(placement) is Shard:
            found.append(S(placement.dim))
        elif isinstance(placement, Replicate):
            found.append(I if needs_grad else R)
        else:
            raise InputError(
                f"a DTensor argument with placement {placement} cannot enter the program; redistribute it to Shard or Replicate"
            )
    sizes = tuple(tensor.device_mesh.shape)
    if local_shape(tuple(tensor.shape), tuple(found), sizes) is None:
        raise InputError(
            f"a DTensor argument of shape {tuple(tensor.shape)} is split unevenly on a mesh of {sizes}; every split dim must divide"
        )
    return tuple(found)
