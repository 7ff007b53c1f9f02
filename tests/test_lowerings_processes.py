"""Lowerings of reductions, normalisation and losses on two gloo processes, forward and backward: what simulated ranks compute."""

from __future__ import annotations

import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import Tensor, fx
from uses import USES

from autoshard.candidates import Candidate, lowered_axes
from autoshard.mesh import MeshSpec
from autoshard.ops import RULES, loss, normalization, reduction
from autoshard.program import tensor_operands
from autoshard.runtime import Axis
from autoshard.testing import OpCase, difference, dual, spread

MESH = MeshSpec.of("a=2")
NAMES = sorted(name for family in (loss, normalization, reduction) for name, rule in family.ROWS.items() if rule.lowering is not None)


def cases() -> list[tuple[OpCase, Candidate]]:
    """The first use of every op, with every strategy that calls its lowering."""
    found = []
    for name in NAMES:
        _, base, variant = name.split(".")
        case = OpCase(getattr(getattr(torch.ops.aten, base), variant), USES[name][0].args, USES[name][0].kwargs, MESH)
        candidates = [c for c in case.candidates({}) if lowered_axes(RULES[name], [s.factor for s in c.strategies], MESH.axes)]
        found += [(case, candidate) for candidate in candidates]
    return found


def run_here() -> list[list[Tensor]]:
    """This process's results and its operands' gradients, for every case."""
    rank = dist.get_rank()
    axis = Axis("a", 2, rank, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    return [_run(case, candidate, axis, rank) for case, candidate in cases()]


def _run(case: OpCase, candidate: Candidate, axis: Axis, rank: int) -> list[Tensor]:
    program, node = case.program(candidate)
    generator = torch.Generator().manual_seed(1)
    env = {}
    for operand, x, layout, gradient in zip(tensor_operands(node), case.operands, candidate.inputs, case.gradients, strict=True):
        env[operand] = spread(x.detach(), layout, program.mesh, generator)[rank].requires_grad_(gradient is not None)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: env[operand])
    results = node.target(*args, **{k: (axis,) if k.endswith("_axes") else v for k, v in kwargs.items()})  # type: ignore[operator]
    results = results if isinstance(results, tuple) else (results,)
    roots, seeds = [], []
    for y, cotangent, layout in zip(results, case.cotangents, candidate.outputs, strict=True):
        if cotangent is not None and y.requires_grad:
            roots.append(y)
            seeds.append(spread(cotangent, dual(layout), program.mesh, generator)[rank])
    torch.autograd.backward(roots, seeds)
    leaves = [x for x in env.values() if x.requires_grad]
    return [y.detach() for y in results] + [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def test_processes_compute_what_the_op_does() -> None:
    ranks = run_on_ranks(2, run_here)
    wrong = []
    for number, (case, candidate) in enumerate(cases()):
        layouts = [*candidate.outputs, *(dual(layout) for layout, g in zip(candidate.inputs, case.gradients, strict=True) if g is not None)]
        wanted = [*case.outputs, *(g for g in case.gradients if g is not None)]
        for k, (layout, expected) in enumerate(zip(layouts, wanted, strict=True)):
            if text := difference([rank[number][k] for rank in ranks], layout, expected, MESH):
                wrong.append(f"{case.op} {[s.factor for s in candidate.strategies]} tensor {k} {text}")
    assert not wrong, wrong
    assert len(cases()) > len(NAMES)
