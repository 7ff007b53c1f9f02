"""From a request to a plan: the passes in order, on one model, mesh and set of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from autoshard.mesh import MeshSpec
from autoshard.placements import Layout
from autoshard.plan import Plan
from autoshard.program import Program
from autoshard.runner import Pass, run_passes

if TYPE_CHECKING:
    from autoshard.module import Settings


@dataclass(frozen=True)
class Request:
    """What to plan. entry_layouts: how each tensor argument is given; fixed_parameters: where parameters already lie."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mesh: MeshSpec
    settings: Settings
    device: str = "cpu"
    entry_layouts: tuple[Layout, ...] = ()
    fixed_parameters: Mapping[str, Layout] = field(default_factory=dict)


def passes_for(request: Request) -> tuple[Pass, ...]:
    """autoshard.passes.PASSES, each with its part of the request."""
    from autoshard.passes import AnnotateShardings, EmitPrograms, FoldConstants, InsertCollectives, LocalizeShapes, NormalizeGraph, TraceModel

    asked = request.settings
    is_whole = asked.outputs == "whole"
    return (
        TraceModel(request.model, request.args, request.kwargs, request.device, request.entry_layouts),
        NormalizeGraph(),
        FoldConstants(),
        AnnotateShardings(
            asked.hardware, asked.template, asked.constraints, request.fixed_parameters, asked.memory_budget_bytes, is_whole, asked.seed
        ),
        InsertCollectives(asked.hardware, is_whole),
        LocalizeShapes(),
        EmitPrograms(type(request.model).__name__),
    )


def make_plan(request: Request) -> Plan:
    """Run the passes. Raises AutoshardError of the kind that fits."""
    asked = request.settings
    program = run_passes(passes_for(request), Program(fx.Graph(), request.mesh), asked.dump_dir)
    return Plan(program, asked.hardware, type(request.model).__name__, asked.inputs, asked.outputs, asked.template, dict(asked.constraints))
