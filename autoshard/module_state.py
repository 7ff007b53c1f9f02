"""What a compiled model keeps that is no tensor of the model: its mesh, what was asked, its plans and loaded programs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoshard import runtime
from autoshard.dynamic_dims import Marks
from autoshard.errors import AutoshardError
from autoshard.loaded_program import LoadedProgram
from autoshard.mesh import MeshSpec
from autoshard.pipelined_program import PipelinedProgram
from autoshard.placements import Layout
from autoshard.plan import Plan
from autoshard.planner import Settings
from autoshard.torch_internals import is_in_backward


@dataclass
class State:
    """What a ShardedModule keeps that is not a tensor of the model (and not part of its modules)."""

    source: nn.Module
    mesh: DeviceMesh
    spec: MeshSpec
    settings: Settings
    whole_mesh: DeviceMesh  # with the axis `pp`, where there is one
    whole_spec: MeshSpec
    ready: dict[Any, LoadedProgram | PipelinedProgram] = field(default_factory=dict)
    marks: dict[Any, Marks] = field(default_factory=dict)
    adopted: list[Plan] = field(default_factory=list)
    plan: Plan | None = None
    layouts: dict[str, Layout] | None = None
    stages: dict[str, tuple[int, ...]] | None = None  # by parameter, where there are pipeline stages
    stage_ranks: tuple[int, ...] = ()
    microbatches: int | None = None  # of the first plan for training
    trained: dict[str, bool] = field(default_factory=dict)  # which parameters were, when the stages were cut
    absent: dict[str, Any] = field(default_factory=dict)  # emptied parameters and buffers of other stages
    aliases: dict[str, str] = field(default_factory=dict)
    members: tuple[nn.Module, ...] = ()
    slots: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)  # name -> the dict that holds the tensor, its key
    compiled: dict[str, Any] | None = None  # options of torch.compile, where the stages are compiled
    base_seed: int | None = None
    step: int = 0

    def __post_init__(self) -> None:
        self.source = _without_memory(self.source)
        kind = self.mesh.device_type
        self.device = torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
        self.coordinate = tuple(self.mesh.get_coordinate() or ())

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copied model keeps its layouts and runs on its own tensors."""
        source, absent = copy.deepcopy(self.source, memo), copy.deepcopy(self.absent, memo)
        return replace(self, source=source, absent=absent, ready={}, marks={}, adopted=[], members=(), slots={})

    @torch.compiler.disable
    def advance(self) -> None:
        """Random ops draw anew at the next step; out of torch.compile's sight, which would compile every step anew.

        Each model draws its seed from the default generator, once, so that two models draw different numbers; the first
        rank's serves all.
        """
        if is_in_backward():
            raise AutoshardError(
                "a compiled model with dropout cannot be recomputed by torch.utils.checkpoint from outside: the masks would differ. "
                "Checkpoint around models without random ops, or set their dropout to 0."
            )
        if self.base_seed is None:
            self.base_seed = self.exchange({"seed": int(torch.randint(2**62, ()))})[0]["seed"]
        self.step += 1

    def next_seed(self) -> int:
        return runtime.mix(self.base_seed or 0, self.step)

    def forget_constants(self) -> None:
        for ready in self.ready.values():
            ready.forget_constants()

    def exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's `mine`, in rank order of the mesh."""
        everyone: list[Any] = [mine]
        for axis in reversed(self.whole_spec.axes):
            gathered: list[Any] = [None] * self.whole_spec.shape[self.whole_spec.index(axis)]
            dist.all_gather_object(gathered, everyone, group=self.whole_mesh.get_group(axis))
            everyone = [item for part in gathered for item in part]
        return everyone


def _without_memory(model: nn.Module) -> nn.Module:
    """A deep copy on the meta device, for tracing; the original is left alone."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def slots_of(root: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where every parameter and buffer is held, by name: looked up at every step, so not through nn.Module."""
    return {
        f"{path}.{name}" if path else name: (held, name)
        for path, module in root.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }
