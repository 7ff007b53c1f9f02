"""The oracle of the property tests: does a program train on all ranks as its model does on one device?

On all simulated ranks, in float64: results, the gradients of parameters and inputs for random cotangents, buffers, and the
parameters after three steps of AdamW on every rank's own shards must be the single device's, on every rank (not only on the
first one that holds a value). Whether a gradient is None must agree too, since optimizers pass over such parameters. The
emitted text can be run in place of the graph.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autoshard import runtime
from autoshard.candidates import Candidate, CandidateTable
from autoshard.costs import CostModel
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.passes import AnnotateShardings, EmitPrograms, FoldConstants, InsertCollectives, LocalizeShapes, NormalizeGraph, TraceModel
from autoshard.placements import I, Layout, R, shard
from autoshard.program import Program, facts, native_layout, set_facts, tensor_operands
from autoshard.runner import run_passes
from autoshard.simulator import Ranks, SimulatedAxis, Simulation, run_program

STEPS = 3
_RELATIVE = 1e-9
_SMALLEST = 0.1  # what counts as zero beside the largest value of a tensor


# ---------------------------------------------------------------------------------------------------- the single device


@dataclass
class Truth:
    """What one device computes: per step the results, gradients and input gradients, then parameters and buffers."""

    steps: list[tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor | None]]]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    cotangents: list[Tensor | None]


def leaves_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def optimizer(parameters: Sequence[Tensor]) -> torch.optim.Optimizer | None:
    return torch.optim.AdamW(parameters, 0.01, eps=1e-4, weight_decay=0.1, foreach=True) if parameters else None


def cotangents_of(results: Sequence[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(len(results))
    return [torch.randn(y.shape, dtype=y.dtype, generator=generator) if y.requires_grad else None for y in results]


def train_alone(model: nn.Module, arguments: Mapping[str, Any]) -> Truth:
    """Train on one device."""
    steps, cotangents = [], []
    stepper = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(STEPS):
        given = {name: x.detach().requires_grad_(x.requires_grad) for name, x in arguments.items()}
        results = leaves_of(model(**given))
        cotangents = cotangents_of(results)
        pairs = [(y, g) for y, g in zip(results, cotangents, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        steps.append(([y.detach().clone() for y in results], grads, {name: x.grad for name, x in given.items()}))
        if stepper is not None:
            stepper.step()
            stepper.zero_grad()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return Truth(steps, parameters, dict(model.named_buffers()), cotangents)


# -------------------------------------------------------------------------------------------------------- all ranks


@dataclass
class Case:
    """One traced model and what it computes on one device; planned many times."""

    model: nn.Module
    arguments: Mapping[str, Any]
    truth: Truth
    traced: Program

    @classmethod
    def of(cls, model: nn.Module, arguments: Mapping[str, Any], mesh: str = "a=2,b=2,c=2") -> Case:
        """mesh: names the axes of the meshes to come."""
        program = Program(fx.Graph(), MeshSpec.of(mesh))
        for a_pass in (TraceModel(model, (), arguments), NormalizeGraph(), FoldConstants()):
            program = a_pass(program)
        return cls(model, arguments, train_alone(copy.deepcopy(model), arguments), program)

    def plan(
        self,
        mesh: str,
        seed: int | None,
        outputs: str = "whole",
        entries: Mapping[str, Layout] | None = None,
        is_scattered: bool = False,
        **options: Any,
    ) -> Program:
        """The finished program of one plan. entries: how inputs are given, whole when not named; is_scattered: see ScatterShardings."""
        program, hardware, whole = fresh(self.traced, MeshSpec.of(mesh)), hardware_of("h100"), outputs == "whole"
        for node in program.nodes("input"):
            if entries:
                facts(node).layouts = (entries[facts(node).name],)
        annotate = ScatterShardings(seed) if is_scattered else AnnotateShardings(hardware, seed=seed, wants_whole_outputs=whole, **options)
        return run_passes((annotate, InsertCollectives(hardware, whole), LocalizeShapes(), EmitPrograms("Drawn")), program)

    def prove(self, program: Program, is_text: bool = False) -> None:
        """Raise AssertionError unless every rank trains as one device does. is_text: run the emitted text instead of the graph."""
        model, mesh = copy.deepcopy(self.model), program.mesh
        held: dict[str, Any] = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        initial = {name: x.detach().clone() for name, x in held.items()}
        held |= program.constants
        nodes = {facts(node).name: node for node in program.nodes("parameter", "buffer")}
        stepper, kinds = None, dict(model.named_parameters())
        run = run_text if is_text else run_program
        for number, (results, gradients, input_gradients) in enumerate(self.truth.steps):
            simulation = run(program, held, self.arguments)
            compare_results(simulation, results)
            if any(g is not None for g in self.truth.cotangents):
                simulation.backward(self.truth.cotangents)
            for name, expected in gradients.items():
                name = program.aliases.get(name, name)
                if name in nodes:
                    compare(
                        f"gradient of {name} at step {number}",
                        [x.grad for x in simulation.leaves[name].values],
                        expected,
                        nodes[name],
                        mesh,
                    )
            for node in program.nodes("input"):
                found = [x.grad for x in simulation.inputs[facts(node).name].values]
                compare(f"gradient of input {node.name}", found, input_gradients[facts(node).name], node, mesh)
            held |= simulation.leaves
            trained = [
                x
                for name in nodes
                if program.aliases.get(name, name) in kinds or name in program.aliases.values()
                for x in simulation.leaves[name].values
            ]
            if stepper is None:
                stepper = optimizer([x for x in trained if x.requires_grad])
            if stepper is not None:
                stepper.step()
                stepper.zero_grad()
        for name, expected in {**self.truth.parameters, **self.truth.buffers}.items():
            own = program.aliases.get(name, name)
            if own in nodes:
                compare(f"{name} after {STEPS} steps", simulation.leaves[own].values, expected, nodes[own], mesh)
            else:
                assert torch.equal(expected, initial[name]), f"{name} changes on one device, and the program does not know it"


@dataclass(frozen=True)
class ScatterShardings:
    """In place of annotate_shardings: every node takes any of its candidates, some values a hub; nothing is solved.

    Reaches combinations that no price would choose, and is fast on three axes.
    """

    seed: int

    def __call__(self, program: Program) -> Program:
        chance, costs = random.Random(self.seed), CostModel(program.mesh, hardware_of("h100"))
        table, ndim = CandidateTable(program, costs), program.mesh.ndim
        for node in program.graph.nodes:
            known = facts(node)
            if known.role in ("input", "buffer"):
                known.layouts = known.layouts or (native_layout(ndim, known.needs_grad),)
            elif known.role == "projection":
                known.layouts = (facts(node.args[0]).layouts[node.args[1]],)
            elif known.role in ("op", "parameter"):
                operands = tensor_operands(node) if known.role == "op" else []
                options = list(table.of_op(node) if known.role == "op" else table.of_parameter(known.value))
                chance.shuffle(options)
                chosen = next(c for c in options if self._fits(c, node, operands, costs))
                known.strategies, known.layouts = chosen.strategies, chosen.outputs
            if known.role in ("parameter", "projection") or (known.role == "op" and len(known.values) == 1 and not known.is_constant):
                hubs = [c.outputs[0] for c in table.of_parameter(known.value)]
                hub = chance.choice([None, None, *hubs])
                reachable = hub is not None and costs.best_route(known.layout, hub, known.value) is not None
                known.hub, known.is_pinned = hub if reachable else None, reachable and chance.random() < 0.3
        return program

    def _fits(self, candidate: Candidate, node: fx.Node, operands: list[fx.Node], costs: CostModel) -> bool:
        if facts(node).is_constant:
            return all(p == R for layout in (*candidate.inputs, *candidate.outputs) for p in layout)
        ways = [(facts(o).layout, want, facts(o)) for o, want in zip(operands, candidate.inputs, strict=True)]
        ways += [(known.hub, want, known) for _, want, known in ways if known.hub is not None]
        whole = [tuple(I if v.needs_grad else R for _ in layout) for v, layout in zip(facts(node).values, candidate.outputs, strict=True)]
        leaves = zip(candidate.outputs, whole, facts(node).values, strict=True)
        return all(costs.best_route(a, b, known.value) is not None for a, b, known in ways) and all(
            costs.best_route(a, b, v) is not None for a, b, v in leaves
        )


def fresh(program: Program, mesh: MeshSpec) -> Program:
    """A copy of a traced program on another mesh."""
    return program.on_mesh(mesh)


def run_text(program: Program, held: Mapping[str, Any], arguments: Mapping[str, Tensor]) -> Simulation:
    """Run the emitted text on all ranks: its axes convert lists of tensors."""
    sys.modules.setdefault("autoshard_runtime", runtime)
    space: dict[str, Any] = {"__name__": "emitted"}
    exec(compile(program.source, "<emitted>", "exec"), space)
    simulation = Simulation(program)
    spread = run_program(placeholders_of(program), held, arguments)
    simulation.leaves, simulation.inputs = spread.leaves, spread.inputs
    axes = [_TextAxis(program.mesh, name) for name in program.mesh.axes]
    rank = space["Rank"](axes, simulation.leaves.__getitem__, torch.device("cpu"))
    result = rank.forward(*(simulation.inputs[facts(node).name] for node in program.nodes("input")))
    nodes = list(program.output.args[0])  # type: ignore[arg-type]
    simulation.outputs = [_everywhere(x, program.mesh) if isinstance(x, Tensor) else x for x in result]
    for node, value in zip(nodes, simulation.outputs, strict=True):
        if isinstance(node, fx.Node):
            simulation.values[node.name] = value
    return simulation


class _TextAxis(SimulatedAxis):
    """Converts also what the text makes of no input: a plain tensor, the same on every rank."""

    def convert(self, x: Any, forward: Any, backward: Any) -> Ranks:
        return super().convert(_everywhere(x, self.mesh), forward, backward)


def _everywhere(x: Any, mesh: MeshSpec) -> Ranks:
    return x if isinstance(x, Ranks) else Ranks([x] * mesh.size)


def placeholders_of(program: Program) -> Program:
    """The placeholders of a program alone, to spread tensors over ranks."""
    graph = fx.Graph()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            set_facts(graph.node_copy(node), facts(node))
    set_facts(graph.output([]), facts(program.output))
    return replace(program, graph=graph)


def compare_results(simulation: Simulation, results: Sequence[Tensor]) -> None:
    program = simulation.program
    nodes = [node for node in program.output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    found = [output for output in simulation.outputs if isinstance(output, Ranks)]
    for k, (node, output, expected) in enumerate(zip(nodes, found, results, strict=True)):
        compare(f"result {k}", output.values, expected, node, program.mesh)


def compare(what: str, pieces: Sequence[Tensor | None], expected: Tensor | None, node: fx.Node, mesh: MeshSpec) -> None:
    """Every rank's piece against its part of the global value."""
    has = [piece is not None for piece in pieces]
    assert all(has) or not any(has), f"{what}: only some ranks have one"
    assert has[0] == (expected is not None), (
        f"{what}: is {'there' if has[0] else 'None'} on the ranks and {'None' if has[0] else 'there'} on one device"
    )
    if expected is None:
        return
    layout = facts(node).layout
    scale = max(float(expected.abs().max()) if expected.numel() and expected.is_floating_point() else 1.0, _SMALLEST)
    for at, piece in zip(mesh.coordinates(), pieces, strict=True):
        want = shard(expected.detach(), layout, mesh, at)
        assert piece is not None
        assert (piece.shape, piece.dtype) == (want.shape, want.dtype), (
            f"{what} on {at}: {piece.dtype}{tuple(piece.shape)}, not {want.dtype}{tuple(want.shape)}"
        )
        error = float((piece.detach().double() - want.double()).abs().max()) if want.numel() else 0.0
        assert error <= _RELATIVE * scale, (
            f"{what} on rank {at} of {mesh} as {layout} is off by {error:.2g}, the largest value is {scale:.2g}"
        )
