"""The public functions: compile, plan, verify, simulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoshard.constraints import Template
from autoshard.dynamic_dims import Dynamic, marks_of, without_short
from autoshard.errors import InputError
from autoshard.hardware import Hardware, hardware_of
from autoshard.mesh import MeshSpec
from autoshard.module import ShardedModule
from autoshard.pipeline import Pipelining
from autoshard.plan import Plan
from autoshard.planner import Inputs, Outputs, Randomness, Request, Settings, entry_layout, make_plan
from autoshard.reuse import reuse_of
from autoshard.simulator import Simulation
from autoshard.torch_internals import pytree
from autoshard.verification import Verification, compare, simulate_plan


@dataclass(frozen=True)
class Options:
    """Rarely needed. seed: draw a random sound plan instead of the best. dump_dir: folder for the graph after every pass.

    randomness: "per_rank": random ops draw by a seed of their own, different numbers for different pieces of a value;
    "single_device": they draw what the model on one process draws from torch's default generator, whole on every rank,
    so that losses can be compared number by number. That is slow and takes memory: for debugging.

    overlap: start collectives early and wait for them late, where there is compute to hide them behind.

    record_modules: programs open a range of torch.profiler for every module of the model (see docs/reading-a-plan.md, Traces).
    """

    seed: int | None = None
    dump_dir: str | None = None
    randomness: Randomness = "per_rank"
    overlap: bool = False
    record_modules: bool = False


def check_call(model: Any, args: Any) -> None:
    """Raise InputError unless these are a model and a tuple of arguments."""
    if not isinstance(model, nn.Module):
        raise InputError(f"a model is an nn.Module, not {type(model).__name__}")
    if isinstance(args, torch.Tensor):
        raise InputError("the example inputs are a tuple of arguments; write (x,) for a single tensor")


def _settings(
    device_type: str,
    template: Template,
    constraints: Mapping[str, str] | None,
    hardware: str | Hardware | None,
    memory_budget_bytes: float | None,
    options: Options | None,
    inputs: Inputs,
    outputs: Outputs,
    dynamic: Dynamic,
    pipeline: Pipelining | None,
) -> Settings:
    choices = {"template": (template, get_args(Template)), "inputs": (inputs, get_args(Inputs)), "outputs": (outputs, get_args(Outputs))}
    for name, (given, known) in choices.items():
        if given not in known:
            raise InputError(f"{name}={given!r} is not known; there are {', '.join(map(repr, known))}")
    extra = options or Options()
    if extra.randomness not in get_args(Randomness):
        raise InputError(f"randomness={extra.randomness!r} is not known; there are {', '.join(map(repr, get_args(Randomness)))}")
    return Settings(
        hardware_of(hardware, device_type),
        template,
        dict(constraints or {}),
        memory_budget_bytes,
        inputs,
        outputs,
        extra.seed,
        extra.dump_dir,
        extra.randomness,
        dynamic,
        extra.overlap,
        pipeline or Pipelining(),
        extra.record_modules,
    )


def compile(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    template: Template = "auto",
    constraints: Mapping[str, str] | None = None,
    hardware: str | Hardware | None = None,
    memory_budget_bytes: float | None = None,
    options: Options | None = None,
    inputs: Inputs = "global",
    outputs: Outputs = "whole",
    dynamic: Dynamic = None,
    pipeline: Pipelining | None = None,
) -> ShardedModule:
    """Partition `model` over the processes of `mesh`.

    Every process of the mesh calls this with the same model. Planning happens at the first call, or at once when
    `example_inputs` or `example_kwargs` (like those of the calls to come; only shapes and dtypes are read) are given.

    mesh: a DeviceMesh with axis names. template: "auto" solves for the least predicted step time; "ddp", "fsdp",
    "megatron" and "megatron_sp" pin what their names say. constraints: layouts by name pattern, see
    autoshard.constraints. hardware: a preset's name ("h100", or "h100x4": nodes of 4), "measured" or "profile:/path.json" (see
    autoshard.profile), or an autoshard.Hardware. memory_budget_bytes: upper bound per rank.
    inputs: "global": plain tensors are the whole batch, the same on every rank; "local": each rank of axis `dp` (of the
    first axis, if there is no `dp`) passes its own part. outputs: "whole" results on every rank, or "dtensor".
    dynamic: dims of arguments whose sizes may change from call to call under one plan: `"batch"` for dim 0 of every tensor,
    `{"ids": {0: "batch", 1: "seq"}, "labels": "batch"}` by argument, a torch.export.Dim in place of a name for a range; the
    same name is the same size. Other shapes are traced and planned anew.
    pipeline: where the mesh has an axis `pp`, how the batch is cut into microbatches and the model into stages; see
    autoshard.Pipelining. What is left open is chosen.
    Returns a module with the model's parameter names, whose parameters are DTensors.
    Raises an AutoshardError that says what to change.
    """
    check_call(model, example_inputs)
    settings = _settings(
        getattr(mesh, "device_type", "cpu"),
        template,
        constraints,
        hardware,
        memory_budget_bytes,
        options,
        inputs,
        outputs,
        dynamic,
        pipeline,
    )
    if not isinstance(mesh, DeviceMesh):
        raise InputError(
            f"compile runs on a torch DeviceMesh (init_device_mesh), got {type(mesh).__name__}; autoshard.plan takes texts and dicts"
        )
    sharded = ShardedModule(model, mesh, settings)
    if example_inputs is not None or example_kwargs is not None:
        sharded.prepare(*(example_inputs or ()), **(example_kwargs or {}))
    return sharded


def plan(
    model: nn.Module,
    mesh: DeviceMesh | MeshSpec | Mapping[str, int] | str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    template: Template = "auto",
    constraints: Mapping[str, str] | None = None,
    hardware: str | Hardware | None = None,
    memory_budget_bytes: float | None = None,
    options: Options | None = None,
    inputs: Inputs = "global",
    outputs: Outputs = "whole",
    dynamic: Dynamic = None,
    pipeline: Pipelining | None = None,
    reuse: Plan | str | Path | None = None,
) -> Plan:
    """Plan `model(*args, **kwargs)` on a mesh without any process, GPU or weight; keywords as in compile.

    mesh: `"dp=2,tp=4"`, a dict, a MeshSpec or a DeviceMesh. args, kwargs: global inputs; only shapes and dtypes are read.
    reuse: an earlier plan, or the path of a saved one: parameters of the same name and shape keep its layouts, the rest is solved
    (after an edit of the model, say), and `Plan.notes` says which. The mesh has the earlier one's axis names.
    """
    check_call(model, args)
    spec = MeshSpec.of(mesh)
    device_type = mesh.device_type if isinstance(mesh, DeviceMesh) else "cpu"
    settings = _settings(device_type, template, constraints, hardware, memory_budget_bytes, options, inputs, outputs, dynamic, pipeline)
    marks = marks_of(model, dynamic, args, kwargs or {})
    if without_short(marks, pytree.tree_leaves((tuple(args), dict(kwargs or {})))) != marks:
        raise InputError("a dynamic size is 0 or 1 in the example, where torch computes differently; use an example of 2 or more")
    tensors = [leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(leaf, torch.Tensor)]
    layouts = tuple(entry_layout(tensor, spec.of_stage, inputs) for tensor in tensors)
    kept = reuse_of(reuse, model, spec.of_stage, settings.constraints) if reuse is not None else None
    fixed = kept.layouts if kept else {}
    planned = make_plan(Request(model, tuple(args), dict(kwargs or {}), spec, settings, device_type, layouts, fixed, marks))
    for note in kept.notes(planned.program) if kept else ():
        planned.program.note(note)
    return planned


def simulate(
    plan: Plan, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, seed: int = 0
) -> Simulation:
    """Run all ranks of `plan` in this process and keep every value of every rank.

    args, kwargs: global inputs. `.values[node].values[rank]` is a local tensor, `.whole(node)` the global value,
    `.backward()` and `.gradient(parameter)` the global gradients.
    """
    return simulate_plan(plan, model, tuple(args), dict(kwargs or {}), seed)


def verify(
    model: nn.Module, plan: Plan, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, tolerance: float | None = None
) -> Verification:
    """Compare all simulated ranks of `plan` with `model` on one device: results, every gradient, every buffer.

    Runs in the model's dtype (use model.double() for an exact comparison; tolerance is 1e-9 then, else 1e-4, and 5e-2
    for half precision). No two ways to draw random numbers can agree: for a program
    that draws any, the comparison is with the model's traced graph, random ops switched off on both sides, and the result says so.
    """
    plan.check_model(model)
    return compare(plan, model, tuple(args), dict(kwargs or {}), tolerance)
