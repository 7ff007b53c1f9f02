"""Plans against the single device: all ranks simulated in this process, values and gradients compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autoshard import autocast
from autoshard.branches import is_either, predicates, runs, taken, tie_branches
from autoshard.errors import InputError
from autoshard.flex_attention import flex_attention_in_ops
from autoshard.instantiation import instantiate
from autoshard.mesh import MeshSpec
from autoshard.passes import FoldConstants, NormalizeGraph, TraceModel
from autoshard.placements import shard
from autoshard.plan import Plan
from autoshard.program import Program, call_of, draws_random, example_sizes, facts, op_name
from autoshard.quiet_random import without_draws
from autoshard.rules import rule_of
from autoshard.simulator import Ranks, Simulation, run_program
from autoshard.stage_simulator import run_stages
from autoshard.torch_internals import pytree, tag_checkpoints

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Verification:
    """Largest differences between a plan and the single device, relative to the largest value of each tensor (to 1, where that is smaller).

    Every rank is compared. inf: another shape or dtype, a NaN, or a gradient that is None on one side only.
    """

    outputs: float
    gradients: Mapping[str, float]
    buffers: Mapping[str, float]
    tolerance: float
    is_random_off: bool

    @property
    def is_equal(self) -> bool:
        return max([self.outputs, *self.gradients.values(), *self.buffers.values()]) <= self.tolerance

    def __str__(self) -> str:
        worst = max(self.gradients, key=self.gradients.__getitem__, default="")
        random = "; random ops switched off on both sides" if self.is_random_off else ""
        gradient = f"gradients {self.gradients[worst]:.1e} ({worst})" if worst else "no gradients"
        return (
            f"{'equal' if self.is_equal else 'DIFFERENT'}: outputs {self.outputs:.1e}, {gradient}, tolerance {self.tolerance:.0e}{random}"
        )


def simulate_plan(
    plan: Plan, model: nn.Module, args: tuple, kwargs: Mapping[str, Any], seed: int = 0, is_random: bool = True
) -> Simulation:
    """Run all ranks of `plan` on the tensors of `model` and global arguments."""
    plan.check_model(model)
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    names = plan.program.flat_inputs
    if len(leaves) != len(names):
        raise InputError(f"the plan was made for {len(names)} arguments, got {len(leaves)}")
    inputs = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name is not None}
    sizes = plan.sizes_of({name: tuple(leaf.shape) for name, leaf in inputs.items()})
    if plan.program.pipeline is not None:
        return run_stages(plan.program, _tensors(model, plan.program), inputs, seed, is_random)
    program = plan.program if sizes == example_sizes(plan.program) else instantiate(plan.program, sizes)
    return run_program(program, _tensors(model, plan.program), inputs, seed, is_random)


def _tensors(model: nn.Module, program: Program) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {**dict(named), **program.constants}


def compare(plan: Plan, model: nn.Module, args: tuple, kwargs: Mapping[str, Any], tolerance: float | None = None) -> Verification:
    """See autoshard.verify."""

    def apart(expected: torch.Tensor | None, pieces: Sequence[torch.Tensor | None], node: fx.Node | None) -> float:
        return difference(expected, pieces, node, plan.mesh, 1.0 if expected is None else max(largest(expected), 1.0))

    is_random_off = any(facts(node).random_axes is not None for node in plan.program.nodes("op"))
    reference, state = copy.deepcopy(model), torch.get_rng_state()
    reference.train(plan.program.is_training)
    with tag_checkpoints(), flex_attention_in_ops():  # without recomputing: torch writes running statistics a second time there
        expected = _without_random(reference, args, kwargs) if is_random_off else _tensor_leaves(reference(*args, **kwargs))
    torch.set_rng_state(state)  # what is drawn whole is drawn alike
    simulation = simulate_plan(plan, copy.deepcopy(model), args, kwargs, is_random=False)
    actual = [output for output in simulation.outputs if isinstance(output, Ranks)]
    nodes = [node for node in plan.program.output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    outputs = max((apart(e, y.values, n) for e, y, n in zip(expected, actual, nodes, strict=True)), default=0.0)
    cotangents = [torch.randn_like(e) if e.requires_grad else None for e in expected]
    gradients: dict[str, float] = {}
    if any(c is not None for c in cotangents):
        torch.autograd.backward([e for e in expected if e.requires_grad], [c for c in cotangents if c is not None])
        simulation.backward(cotangents)
    placed = {facts(node).name: node for node in plan.program.nodes("parameter", "buffer")}
    for name, parameter in reference.named_parameters():
        own = plan.program.aliases.get(name, name)
        found = [x.grad for x in simulation.leaves[own].values] if own in placed else [None]
        if parameter.grad is not None or any(grad is not None for grad in found):
            gradients[name] = apart(parameter.grad, found, placed.get(own))
    named = {name: b for name, b in reference.named_buffers() if name in placed and b.numel()}
    buffers = {name: apart(b, simulation.leaves[name].values, placed[name]) for name, b in named.items()}
    allowed = tolerance_of(plan.program, _TOLERANCE) if tolerance is None else tolerance
    return Verification(outputs, gradients, buffers, allowed, is_random_off)


def tolerance_of(program: Program, by_dtype: Mapping[torch.dtype, float]) -> float:
    """That of the least precise dtype that the program computes in."""
    dtypes = {value.dtype for node in program.nodes("op", "parameter") for value in facts(node).values if value.dtype.is_floating_point}
    return max((by_dtype.get(dtype, by_dtype[torch.float32]) for dtype in dtypes), default=by_dtype[torch.float64])


def largest(tensor: torch.Tensor) -> float:
    """Largest finite number, without its sign; 0 where there is none."""
    finite = tensor.detach()[tensor.detach().isfinite()] if tensor.is_floating_point() else tensor.new_empty(0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def difference(
    expected: torch.Tensor | None, pieces: Sequence[torch.Tensor | None], node: fx.Node | None, mesh: MeshSpec, scale: float
) -> float:
    """Largest difference on any rank, in units of `scale`: ranks that hold the same thing must hold it alike.

    inf: another shape or dtype, a NaN on one side, or a tensor (a gradient) on one side only. 0 where neither has one.
    """
    if expected is None or node is None or any(piece is None for piece in pieces):
        return 0.0 if expected is None and all(piece is None for piece in pieces) else float("inf")
    wanted = [shard(expected.detach(), facts(node).layout, mesh, at) for at in mesh.coordinates()]
    return max(_apart(want, piece) / scale for want, piece in zip(wanted, pieces, strict=True))  # type: ignore[arg-type]


def _apart(expected: torch.Tensor, actual: torch.Tensor) -> float:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    both = (expected == actual) | (expected.isnan() & actual.isnan())  # infinities and NaN count as equal to themselves
    error = float(torch.where(both, 0.0, expected.double() - actual.detach().double()).abs().max()) if both.numel() else 0.0
    return error if error == error else float("inf")


def _tensor_leaves(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _without_random(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The model's traced graph on one device with random ops switched off: not the model itself."""
    program = Program(fx.Graph(), MeshSpec(("one",), (1,)))
    for a_pass in (TraceModel(model, args, kwargs), NormalizeGraph(), FoldConstants()):
        program = a_pass(program)
    tie_branches(program)
    inputs = {n: x for n, x in zip(program.flat_inputs, pytree.tree_leaves((args, dict(kwargs))), strict=True) if n is not None}
    return [leaf for leaf in run_single(program, _tensors(model, program), inputs) if isinstance(leaf, torch.Tensor)]


def run_single(program: Program, tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> list[Any]:
    """Run a normalised, unsharded graph on one device with random ops switched off."""
    env: dict[fx.Node, Any] = {}
    conds = predicates(program)
    for node in program.graph.nodes:
        known = facts(node)
        if not runs(node, conds, lambda predicate: bool(env[predicate])):
            continue
        if node.op == "placeholder":
            env[node] = inputs[known.name] if known.role == "input" else tensors[known.name]
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda n: env[n]))
        elif is_either(node):
            env[node] = env[taken(node, lambda predicate: bool(env[predicate]))]
        else:
            rule = rule_of(op_name(node)) if known.role == "op" else None
            is_random = draws_random(node) if rule is None else rule.is_random(call_of(node))
            target, args, kwargs = without_draws(node) if is_random else (node.target, node.args, dict(node.kwargs))
            with autocast.entered(known.autocast):
                env[node] = target(*fx.map_arg(args, lambda n: env[n]), **fx.map_arg(kwargs, lambda n: env[n]))
    return []
