"""A mesh as the planner sees it: named axes and their sizes, no processes.

Ranks are numbered in row-major order over the axes (the last axis varies fastest), as in torch's DeviceMesh.
"""

from __future__ import annotations

import itertools
import keyword
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autoshard import runtime
from autoshard.errors import MeshError

PIPELINE_AXIS = "pp"
_RESERVED = {"self", "aten", "torch", "float"}


@dataclass(frozen=True)
class MeshSpec:
    """Axis names and sizes, outermost first: `MeshSpec(("dp", "tp"), (2, 4))`."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    inside: MeshSpec | None = field(default=None, compare=False, repr=False)  # the mesh that these are axes of, whose links they ride on

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or not self.axes:
            raise MeshError(f"a mesh needs one size per axis name, got names {self.axes} and sizes {self.shape}")
        if len(set(self.axes)) != len(self.axes):
            raise MeshError(f"mesh axis names must differ, got {self.axes}")
        for name, size in zip(self.axes, self.shape, strict=True):
            if not name.isidentifier():
                raise MeshError(f"mesh axis {name!r} is not a name; use letters, digits and underscores, e.g. 'dp'")
            if keyword.iskeyword(name) or name in _RESERVED or callable(getattr(runtime, name, None)):
                raise MeshError(f"mesh axis {name!r} is a word that emitted programs use otherwise; choose another, e.g. 'dp'")
            if size < 1:
                raise MeshError(f"mesh axis {name!r} has size {size}; sizes start at 1")

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def of_stage(self) -> MeshSpec:
        """The mesh of one pipeline stage: all axes but `pp`, or an axis `one` of a single rank where no other is."""
        kept = [(name, size) for name, size in zip(self.axes, self.shape, strict=True) if name != PIPELINE_AXIS]
        axes, shape = zip(*(kept or [("one", 1)]), strict=True)
        return self if PIPELINE_AXIS not in self.axes else MeshSpec(axes, shape, self)

    @property
    def whole(self) -> MeshSpec:
        """The mesh as the user gave it: with axis `pp`, where this is the mesh of a stage."""
        return self.inside or self

    @property
    def is_alone(self) -> bool:
        """Whether this is the mesh of stages that one rank runs each: its axis `one` is not the user's."""
        return self.inside is not None and self.inside.axes == (PIPELINE_AXIS,)

    @property
    def stages(self) -> int:
        """Ranks of axis `pp`: 1 where the mesh has none."""
        return self.shape[self.index(PIPELINE_AXIS)] if PIPELINE_AXIS in self.axes else 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def coordinates(self) -> list[tuple[int, ...]]:
        """Coordinate of every rank, in rank order."""
        return list(itertools.product(*map(range, self.shape)))

    def index(self, axis: str) -> int:
        """Position of the axis named `axis`; raises MeshError when there is none."""
        if axis not in self.axes:
            raise MeshError(f"no axis {axis!r} in mesh {self}; it has {', '.join(self.axes)}")
        return self.axes.index(axis)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self.axes, self.shape, strict=True))

    @classmethod
    def of(cls, mesh: MeshSpec | DeviceMesh | Mapping[str, int] | str) -> MeshSpec:
        """Read a mesh given as a MeshSpec, a DeviceMesh with names, a dict `{"dp": 2}` or a text `"dp=2,tp=4"`."""
        if isinstance(mesh, MeshSpec):
            return mesh
        if isinstance(mesh, DeviceMesh):
            if not mesh.mesh_dim_names:
                raise MeshError(
                    "the mesh has no axis names; build it with "
                    f"init_device_mesh({mesh.device_type!r}, {tuple(mesh.mesh.shape)}, mesh_dim_names=('dp', ...))"
                )
            return cls(tuple(mesh.mesh_dim_names), tuple(mesh.mesh.shape))
        if isinstance(mesh, str):
            parts = [part.split("=") for part in mesh.replace(" ", "").split(",")]
            if not all(len(part) == 2 and part[1].isdigit() for part in parts):
                raise MeshError(f"cannot read mesh {mesh!r}; write it like 'dp=2,tp=4'")
            return cls(tuple(name for name, _ in parts), tuple(int(size) for _, size in parts))
        if isinstance(mesh, Mapping):
            return cls(tuple(mesh), tuple(mesh.values()))
        raise MeshError(f"a mesh is a DeviceMesh, a MeshSpec, a dict or a text like 'dp=2,tp=4', not {type(mesh).__name__}")


def check_mesh(mesh: DeviceMesh, spec: MeshSpec) -> None:
    """Raise MeshError unless this process can take its part on the mesh."""
    if not dist.is_initialized():
        raise MeshError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group first, or use autoshard.plan to only plan"
        )
    if mesh.get_coordinate() is None:
        raise MeshError(f"this process (rank {dist.get_rank()}) is not on the mesh {spec}, whose ranks are {mesh.mesh.flatten().tolist()}")
    if spec.size > dist.get_world_size():
        raise MeshError(f"mesh {spec} has {spec.size} ranks, the world has {dist.get_world_size()} processes")


def mesh_of_stage(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of this process' pipeline stages: `mesh` without axis `pp`, or this rank alone (axis `one`) where no other axis is."""
    names = mesh.mesh_dim_names or ()
    if PIPELINE_AXIS not in names:
        return mesh
    kept = tuple(name for name in names if name != PIPELINE_AXIS)
    if kept:
        return mesh[kept]
    return DeviceMesh(mesh.device_type, mesh.mesh.reshape(-1, 1), mesh_dim_names=(PIPELINE_AXIS, "one"))["one"]


def group_of_all(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh; every one of them calls this."""
    ranks = mesh.mesh.flatten().tolist()
    if sorted(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD  # type: ignore[return-value]
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.new_group(ranks, use_local_synchronization=True)
