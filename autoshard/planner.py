"""From a request to a plan: the passes in order, on one model, mesh and set of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from autoshard.constraints import Template, tensor_axis_of
from autoshard.costs import CostModel
from autoshard.dynamic_dims import Dynamic, LeafMarks, Marks
from autoshard.errors import InputError, PlanError
from autoshard.hardware import Hardware
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.pipeline import Pipelining
from autoshard.pipeline_choice import choose
from autoshard.placements import I, Layout, R, S
from autoshard.plan import Plan
from autoshard.program import Program
from autoshard.resolving import Resolver, run_and_keep
from autoshard.runner import Pass, run_passes
from autoshard.torch_internals import pytree

Inputs = Literal["global", "local"]
Outputs = Literal["whole", "dtensor"]
Randomness = Literal["per_rank", "single_device"]


@dataclass(frozen=True)
class Settings:
    """What autoshard.compile was asked."""

    hardware: Hardware
    template: Template = "auto"
    constraints: Mapping[str, str] = field(default_factory=dict)
    memory_budget_bytes: float | None = None
    inputs: Inputs = "global"
    outputs: Outputs = "whole"
    seed: int | None = None
    dump_dir: str | None = None
    randomness: Randomness = "per_rank"
    dynamic: Dynamic | LeafMarks = None
    overlap: bool = False
    pipeline: Pipelining = field(default_factory=Pipelining)
    record_modules: bool = False


def batch_axes(mesh: MeshSpec) -> tuple[str, ...]:
    """Axes that hold different parts of the batch when inputs are local: `dp` if there is one, else the first."""
    return ("dp",) if "dp" in mesh.axes else mesh.axes[:1]


def entry_layout(tensor: torch.Tensor, mesh: MeshSpec, inputs: str) -> Layout:
    """How a plain tensor argument is given on each axis."""
    whole = I if tensor.requires_grad else R
    is_cut = inputs == "local" and tensor.dim() > 0
    return tuple(S(0) if is_cut and axis in batch_axes(mesh) else whole for axis in mesh.axes)


def check_batch(args: Any, mesh: MeshSpec, template: str, inputs: str) -> None:
    """Raise InputError where the batch (dim 0 of the arguments) must be split and does not divide. args: any pytree of global tensors."""
    tensor_axis = tensor_axis_of(template, mesh)
    asked = tuple(axis for axis in mesh.axes if axis != tensor_axis) if template != "auto" else ()
    axes = batch_axes(mesh) if inputs == "local" else asked
    parts = math.prod(mesh.shape[mesh.index(axis)] for axis in axes)
    lengths = [leaf.shape[0] for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    wrong = sorted({length for length in lengths if length % parts})
    if wrong and (inputs == "local" or len(wrong) == len(set(lengths))):
        ways = f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(axes)} together"
        why = "inputs='local'" if inputs == "local" else f"template {template!r}"
        nearest = max(parts, wrong[0] // parts * parts)
        raise InputError(
            f"{why} splits dim 0 of the arguments, of length {wrong[0]}, in {parts} on {ways}, which does not divide; "
            f"use a batch of {nearest} or {nearest + parts}, or template='auto', which may keep the batch whole"
        )


@dataclass(frozen=True)
class Request:
    """What to plan. entry_layouts: how each tensor argument is given; fixed_parameters: where parameters already lie.

    dynamic: dims of the arguments whose sizes may change from call to call. fixed_stages: by parameter the stages that already
    hold it; stage_ranks: where these lie.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mesh: MeshSpec
    settings: Settings
    device: str = "cpu"
    entry_layouts: tuple[Layout, ...] = ()
    fixed_parameters: Mapping[str, Layout] = field(default_factory=dict)
    dynamic: Marks = ()
    fixed_stages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stage_ranks: tuple[int, ...] = ()


def passes_for(request: Request, microbatches: int | None = None, template: Template | None = None) -> tuple[Pass, ...]:
    """autoshard.passes.PASSES, each with its part of the request. microbatches, template: in place of what is asked."""
    from autoshard.passes import (
        AnnotateShardings,
        CutStages,
        DrawWhole,
        EmitPrograms,
        FoldConstants,
        InsertCollectives,
        LocalizeShapes,
        NormalizeGraph,
        OverlapCollectives,
        SplitMicrobatches,
        TraceModel,
    )

    asked = request.settings
    is_whole = asked.outputs == "whole"
    count = microbatches or asked.pipeline.microbatches or 1
    has_stages = PIPELINE_AXIS in request.mesh.axes
    budget = None if has_stages else asked.memory_budget_bytes  # of one rank: that of a stage, where there are stages
    return (
        TraceModel(request.model, request.args, request.kwargs, request.device, request.entry_layouts, request.dynamic),
        NormalizeGraph(),
        DrawWhole(asked.randomness),
        FoldConstants(),
        SplitMicrobatches(request.mesh, count, asked.pipeline.batch),
        AnnotateShardings(
            asked.hardware, template or asked.template, asked.constraints, request.fixed_parameters, budget, is_whole, asked.seed
        ),
        InsertCollectives(asked.hardware, is_whole),
        LocalizeShapes(),
        CutStages(asked.hardware, asked.pipeline, request.fixed_stages, request.stage_ranks, asked.memory_budget_bytes),
        OverlapCollectives(asked.hardware, asked.overlap),
        EmitPrograms(type(request.model).__name__, asked.record_modules),
    )


def make_plan(request: Request) -> Plan:
    """Run the passes. Raises AutoshardError of the kind that fits."""
    from autoshard.profile_plan import extrapolations

    asked = request.settings
    check_batch((request.args, request.kwargs), request.mesh.of_stage, asked.template, asked.inputs)
    program, resolver = _run(request)
    for note in extrapolations(program, CostModel(request.mesh.of_stage, asked.hardware)) if asked.hardware.measured else ():
        program.note(note)
    name, constraints = type(request.model).__name__, dict(asked.constraints)
    return Plan(program, asked.hardware, name, asked.inputs, asked.outputs, asked.template, constraints, resolver)


def _run(request: Request) -> tuple[Program, Resolver]:
    from autoshard.passes import SplitMicrobatches

    asked, start = request.settings, Program(fx.Graph(), request.mesh.of_stage)
    if PIPELINE_AXIS not in request.mesh.axes:
        return run_and_keep(passes_for(request), start, asked.dump_dir)
    if asked.outputs != "whole" or asked.inputs != "global":
        raise PlanError("with pipeline stages plain tensors are the whole batch and results are whole; leave out inputs= and outputs=")
    passes = passes_for(request)
    first = next(k for k, a_pass in enumerate(passes) if isinstance(a_pass, SplitMicrobatches))
    return _stages(request, run_passes(passes[:first], start, asked.dump_dir), first)


def plan_stages(request: Request, program: Program) -> Program:
    """Plan a program that split_microbatches has not seen yet, on a mesh with pipeline stages; what is left open is chosen."""
    from autoshard.passes import PASSES, SplitMicrobatches

    return _stages(request, program, PASSES.index(SplitMicrobatches))[0]


def _stages(request: Request, program: Program, first: int) -> tuple[Program, Resolver]:
    asked = request.settings

    def rest(count: int, template: Template) -> tuple[Pass, ...]:
        return passes_for(request, count, template)[first:]

    return choose(program, rest, asked.pipeline.microbatches, asked.template, request.mesh.stages, asked.dump_dir, first)
