"""Segmented tensors in torch.distributed.checkpoint.

A checkpoint stores blocks of the global tensor. DTensor tells it of one block per rank, but a rank that holds its share of
every segment (the query, key and value parts of a fused weight) holds several. Tensors returned from here say so themselves,
by the protocol that checkpoint asks a local tensor for; they load into any other layout or mesh and back.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from autoshard.dtensors import stored_layout
from autoshard.mesh import MeshSpec
from autoshard.placements import I, S, shard
from autoshard.torch_internals import _StridedShard, pytree

Tree = TypeVar("Tree")


class Run(NamedTuple):
    """Consecutive indices of one dim that lie together on this rank."""

    global_start: int
    local_start: int
    size: int


def checkpointable(state: Tree) -> Tree:
    """The same state dict, of a model or an optimizer, ready for torch.distributed.checkpoint; memory is shared.

    A compiled model's state_dict() is ready already; for an optimizer: `dcp.save(autoshard.checkpointable(optimizer.state_dict()), ...)`.
    """
    return pytree.tree_map_only(DTensor, _checkpointable, state)


def _checkpointable(tensor: DTensor) -> DTensor:
    if not any(isinstance(placement, _StridedShard) for placement in tensor.placements):
        return tensor
    with torch.no_grad():
        result: Any = tensor.detach()
        local: Any = result.to_local()
    blocks = {tuple(run.global_start for run in block): block for block in _blocks(tensor)}

    def chunks() -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(start), torch.Size(run.size for run in block)) for start, block in blocks.items()]

    def write_items(name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, tensor.size())
            )
            for chunk in chunks()
        ]

    def block_of(index: MetadataIndex) -> torch.Tensor:
        return local[tuple(slice(run.local_start, run.local_start + run.size) for run in blocks[tuple(index.offset or ())])]

    local.__create_write_items__, local.__create_chunk_list__, local.__get_tensor_shard__ = write_items, chunks, block_of
    return result


def _blocks(tensor: DTensor) -> list[tuple[Run, ...]]:
    """What this rank holds: per block, one run on each dim."""
    mesh, shape = tensor.device_mesh, tensor.shape
    spec = MeshSpec(tuple(f"axis{k}" for k in range(mesh.ndim)), tuple(mesh.shape))
    coordinate = tuple(mesh.get_coordinate() or ())
    layout = stored_layout(tensor)
    runs = []
    for dim, length in enumerate(shape):
        along = tuple(S(0, p.segments) if p.is_split and p.dim == dim else I for p in layout)
        held = shard(torch.arange(length), along, spec, coordinate).tolist()
        starts = [k for k in range(len(held)) if k == 0 or held[k] != held[k - 1] + 1]
        runs.append([Run(held[a], a, b - a) for a, b in itertools.pairwise([*starts, len(held)])])
    return list(itertools.product(*runs))
