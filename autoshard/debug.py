"""What a program really does: the collectives that this process issues, counted while it runs.

Predicted traffic is `plan.cost` and `plan.stats["wire_bytes_per_step"]`; what is counted here can be laid beside it, by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import ScriptObject
from torch.distributed.device_mesh import DeviceMesh

# The group of a name, as functional collectives are given it. If it moves: count_communication.
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard.conversions import WIRE
from autoshard.text import human_bytes
from autoshard.torch_internals import pytree

# Collectives of torch.ops._c10d_functional, which programs call, and of torch.ops.c10d, which everything else calls.
_KINDS = {
    "_c10d_functional": {
        "all_reduce": "all_reduce",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "all_to_all_single": "all_to_all",
        "broadcast": "broadcast",
    },
    "c10d": {
        "allreduce": "all_reduce",
        "_allgather_base": "all_gather",
        "allgather": "all_gather",
        "_reduce_scatter_base": "reduce_scatter",
        "alltoall_base": "all_to_all",
        "broadcast": "broadcast",
        "send": "send",
    },
}
_SENT = ("input", "inputs", "input_tensor", "input_tensors", "tensors")  # what their schemas call the tensors that are sent
_OF_A_RANK = ("all_gather", "all_to_all", "rotate")  # their operand is one rank's part of what the axis holds together


@dataclass(frozen=True)
class Counted:
    """How often one kind of collective was called on one axis, and the bytes that this rank sent by it."""

    calls: int = 0
    sent_bytes: float = 0.0


@dataclass
class Communication:
    """What this rank sent. by_axis: for every kind of collective and axis ("all_reduce", "tp"); prints as a table."""

    by_axis: dict[tuple[str, str], Counted] = field(default_factory=dict)

    @property
    def calls(self) -> dict[str, int]:
        """Calls by kind, all axes together."""
        return {kind: sum(c.calls for (k, _), c in self.by_axis.items() if k == kind) for kind in self._kinds()}

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Bytes by kind, all axes together, as in `plan.stats["wire_bytes_per_step"]`."""
        return {kind: sum(c.sent_bytes for (k, _), c in self.by_axis.items() if k == kind) for kind in self._kinds()}

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.by_axis))

    def note(self, kind: str, axis: str, nbytes: float) -> None:
        """Count one call that sends `nbytes`."""
        known = self.by_axis.get((kind, axis), Counted())
        self.by_axis[kind, axis] = Counted(known.calls + 1, known.sent_bytes + nbytes)

    def __rich__(self) -> Table:
        table = Table(title="Sent by this rank", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in ("collective", "axis", "calls", "bytes"):
            table.add_column(name, justify="right" if name in ("calls", "bytes") else "left")
        for (kind, axis), counted in sorted(self.by_axis.items()):
            table.add_row(kind, axis, str(counted.calls), human_bytes(counted.sent_bytes))
        return table


@contextmanager
def count_communication(mesh: DeviceMesh | None = None) -> Iterator[Communication]:
    """Count the collectives that this process issues inside, forward and backward, and the bytes that it sends by them.

        with count_communication(mesh) as sent:
            model(x).sum().backward()
        assert sent.sent_bytes == model.plan.stats["wire_bytes_per_step"]

    mesh: whose axes name the groups; groups of no axis, and all where there is no mesh, have the names torch.distributed gave them.
    Bytes are those of ring algorithms, as in plans. An all-to-all that sends all rows to one other rank is a "rotate". What pipeline
    stages send each other is counted as "send"; so are the small all-reduce and the broadcast of the loss that end each
    of their steps, and gradients of tied weights, which plans leave out. The first call of a model also compares plans among the
    ranks: run it before. Optimizer steps that communicate, and code other than autoshard's, are counted alike.
    """
    axes = {mesh.get_group(name).group_name: name for name in mesh.mesh_dim_names or ()} if mesh is not None else {}
    found = Communication()
    with _Counter(found, axes):
        yield found


class _Counter(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, found: Communication, axes: Mapping[Any, str]) -> None:
        super().__init__()
        self.found, self.axes = found, axes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kinds = _KINDS.get(getattr(func, "namespace", ""), {})
        name = func._opname.removesuffix("_out").removesuffix("_").removesuffix("_coalesced") if kinds else ""
        if name in kinds:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            self._note(kinds[name], given | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, given: Mapping[str, Any]) -> None:
        group = _group(given.get("group_name", given.get("process_group")))
        count, own = dist.get_world_size(group), dist.get_rank(group)
        tensors = pytree.tree_leaves([given[name] for name in _SENT if name in given])
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        rows = list(given.get("input_split_sizes", ()))
        if any(rows) and sum(rows) in [*rows[:own], *rows[own + 1 :]]:
            kind = "rotate"
        if kind == "all_to_all" and any(rows):
            sent = nbytes * (1 - rows[own] / sum(rows))
        elif kind in WIRE:
            sent = WIRE[kind](count) * nbytes * (count if kind in _OF_A_RANK else 1)
        else:
            sent = float(nbytes)
        self.found.note(kind, self.axes.get(group.group_name, group.group_name), sent)


def _group(given: Any) -> dist.ProcessGroup:
    """The process group that an op was given: by name, as it is, or as torch.ops wraps it."""
    if isinstance(given, dist.ProcessGroup):
        return given
    return dist.ProcessGroup.unbox(given) if isinstance(given, ScriptObject) else _resolve_process_group(given)
