"""Traces a model of the zoo once per mode, plans it many times, and compares every plan with the eager model on one device.

What must agree on every simulated rank: results, the gradients of all parameters and of inputs that ask for one (random
cotangents; whether there is a gradient at all, too), and all buffers afterwards. The oracle is the eager model itself, run with
random ops switched off: dropout keeps everything, numbers that are drawn are a constant.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from training_oracle import cotangents_of, fresh, leaves_of, run_text

from autoshard.errors import AutoshardError, ConstraintError, InputError
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.passes import AnnotateShardings, EmitPrograms, FoldConstants, InsertCollectives, LocalizeShapes, NormalizeGraph, TraceModel
from autoshard.planner import check_batch
from autoshard.program import Program, draws_random, facts
from autoshard.quiet_random import DRAWN, filled
from autoshard.runner import run_passes
from autoshard.simulator import Ranks, Simulation, run_program
from autoshard.verification import difference, largest, tolerance_of
from zoo.models import Entry, build

MESHES = ("a=2", "a=2,b=2")
KINDS = ("ddp", "fsdp", "megatron", "random 0", "random 1")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
SEEDS = 4
SMALLEST = 1e-3  # what counts as zero beside the largest value of all tensors of a kind


class QuietRandom(TorchFunctionMode):
    """Eager torch with random ops switched off."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("dropout", "feature_dropout", "alpha_dropout") and len(args) > 1 and isinstance(args[1], float):
            args = (args[0], 0.0, *args[2:])
        given |= {key: 0.0 for key in ("p", "dropout_p") if key in given and ("dropout" in name or key == "dropout_p")}
        if name == "multi_head_attention_forward" and len(args) > 10:
            args = (*args[:10], 0.0, *args[11:])
        if name == "scaled_dot_product_attention" and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        result = func(*args, **given)
        drawn = name.removesuffix("_")
        if drawn not in DRAWN or not isinstance(result, Tensor):
            return result
        constant = filled(result, drawn)
        return result.copy_(constant) if name.endswith("_") else constant


@dataclass(frozen=True)
class Expected:
    """What one device computes."""

    results: list[Tensor]
    cotangents: list[Tensor | None]
    gradients: dict[str, Tensor | None]
    inputs: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


@dataclass
class Outcome:
    """Of one plan. status: `equal`, `different` (wrong numbers), `error`, or `not applicable` (the template cannot be had).

    split: share of the ops that are split on some axis; where it is 0 every rank computes everything, and `equal` says little.
    """

    mode: str
    mesh: str
    kind: str
    status: str
    detail: str = ""
    error: float = 0.0
    split: float = 0.0


@dataclass
class Subject:
    """One traced model in one mode, and what it computes on one device."""

    entry: Entry
    mode: str
    program: Program
    held: dict[str, Tensor]
    arguments: dict[str, Tensor]
    expected: Expected
    tolerance: float

    @classmethod
    def of(cls, entry: Entry, mode: str) -> Subject:
        """Raises AutoshardError where the model cannot be traced."""
        model, args, kwargs = build(entry, mode)
        program = Program(fx.Graph(), MeshSpec.of("a=2,b=2"))
        for a_pass in (TraceModel(model, args, kwargs), NormalizeGraph(), FoldConstants()):
            program = a_pass(program)
        named = zip(program.flat_inputs, pytree.tree_leaves((args, kwargs)), strict=True)
        arguments = {name: leaf for name, leaf in named if name is not None}
        named_tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        held = {name: x.detach().clone() for name, x in named_tensors} | program.constants
        tolerance = tolerance_of(program, TOLERANCE) if entry.tolerance is None else entry.tolerance
        return cls(entry, mode, program, held, arguments, run_alone(entry, mode, program), tolerance)

    def plan(self, mesh: str, kind: str) -> Program:
        """The finished program of one plan. Raises InputError or ConstraintError where a template cannot be had.

        Random prices may make it cheapest to split nothing: then the next seeds are tried, a few.
        """
        if not kind.startswith("random"):
            check_batch(list(self.arguments.values()), MeshSpec.of(mesh), kind, "global")
            return self._finish(mesh, template=kind)
        first = int(kind.split()[1])
        for seed in range(first, first + SEEDS * 10, 10):
            program = self._finish(mesh, seed=seed)
            if split_share(program):
                break
        return program

    def _finish(self, mesh: str, **options: Any) -> Program:
        program, hardware = fresh(self.program, MeshSpec.of(mesh)), hardware_of("h100")
        passes = (AnnotateShardings(hardware, **options), InsertCollectives(hardware, True), LocalizeShapes(), EmitPrograms("Zoo"))
        return run_passes(passes, program)

    def check(self, mesh: str, kind: str) -> Outcome:
        """Plan, run on all ranks, compare."""
        outcome = Outcome(self.mode, mesh, kind, "equal")
        try:
            program = self.plan(mesh, kind)
        except (InputError, ConstraintError) as error:
            is_random = kind.startswith("random")
            outcome.status, outcome.detail = ("error" if is_random else "not applicable"), str(error).splitlines()[0]
            return outcome
        except Exception as error:
            outcome.status, outcome.detail = "error", f"planning: {describe(error)}"
            return outcome
        outcome.split = split_share(program)
        try:
            differences = self.differences(self.run(program), program)
        except Exception as error:
            outcome.status, outcome.detail = "error", f"running: {describe(error)}"
            return outcome
        outcome.error = max(differences.values(), default=0.0)
        wrong = sorted((name for name, error in differences.items() if error > self.tolerance), key=lambda name: -differences[name])
        if wrong:
            outcome.status = "different"
            outcome.detail = f"{len(wrong)} of {len(differences)}: " + "; ".join(f"{n} off by {differences[n]:.2g}" for n in wrong[:4])
        return outcome

    def run(self, program: Program) -> Simulation:
        """All ranks of a program, forward and backward. Without random ops it is the emitted text that runs."""
        held, arguments = copy.deepcopy(self.held), self.arguments
        if any(draws_random(node) for node in program.nodes("op")):
            simulation = run_program(program, held, arguments, is_random=False)
        else:
            simulation = run_text(program, held, arguments)
        if any(cotangent is not None for cotangent in self.expected.cotangents):
            simulation.backward(self.expected.cotangents)
        return simulation

    def differences(self, simulation: Simulation, program: Program) -> dict[str, float]:
        """Largest difference on any rank of everything that must agree, beside the largest value."""
        expected, placed = self.expected, {facts(node).name: node for node in program.nodes("parameter", "buffer")}
        nodes = [node for node in program.output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
        outputs = [output for output in simulation.outputs if isinstance(output, Ranks)]
        assert len(nodes) == len(outputs) == len(expected.results), f"{len(outputs)} results, not {len(expected.results)}"
        found: dict[str, float] = {}

        def compare(
            what: str, wanted: Tensor | None, pieces: Sequence[Tensor | None], node: fx.Node | None, among: list[Tensor | None]
        ) -> None:
            found[what] = difference(wanted, pieces, node, program.mesh, scale_of(wanted, among))

        for k, (node, output) in enumerate(zip(nodes, outputs, strict=True)):
            compare(f"result {k}", expected.results[k], output.values, node, expected.results)
        everywhere = [*expected.gradients.values(), *expected.inputs.values()]
        for name, gradient in expected.gradients.items():
            own = program.aliases.get(name, name)
            pieces = [x.grad for x in simulation.leaves[own].values] if own in placed else [None] * program.mesh.size
            compare(f"gradient of {name}", gradient, pieces, placed.get(own), everywhere)
        for node in program.nodes("input"):
            name = facts(node).name
            compare(f"gradient of input {name}", expected.inputs[name], [x.grad for x in simulation.inputs[name].values], node, everywhere)
        for name, buffer in expected.buffers.items():
            own = program.aliases.get(name, name)
            if own in placed:
                compare(f"buffer {name}", buffer, simulation.leaves[own].values, placed[own], [buffer])
            elif not torch.equal(buffer, self.held[name]):
                found[f"buffer {name} (unknown to the program)"] = float("inf")
        return found


def split_share(program: Program) -> float:
    """Share of the ops that are split along a factor on some axis."""
    ops = [node for node in program.nodes("op") if not facts(node).is_constant]
    return sum(any(strategy.factor for strategy in facts(node).strategies) for node in ops) / max(len(ops), 1)


def run_alone(entry: Entry, mode: str, program: Program) -> Expected:
    """The eager model on one device, built anew."""
    model, args, kwargs = build(entry, mode)
    leaves = pytree.tree_leaves((args, kwargs))
    with QuietRandom():
        results = leaves_of(model(*args, **kwargs))
    cotangents = cotangents_of(results)
    pairs = [(y, g) for y, g in zip(results, cotangents, strict=True) if g is not None]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    inputs = {name: leaf.grad for name, leaf in zip(program.flat_inputs, leaves, strict=True) if name is not None}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return Expected([y.detach() for y in results], cotangents, gradients, inputs, buffers)


def scale_of(wanted: Tensor | None, among: Sequence[Tensor | None]) -> float:
    """What a tensor's differences are measured by: its largest number, or that of all tensors of its kind where it is next to nothing."""
    most = max((largest(x) for x in among if x is not None), default=0.0)
    return max(0.0 if wanted is None else largest(wanted), SMALLEST * most) or 1.0


def describe(error: BaseException) -> str:
    """The kind of error and the first lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    most = 3 if isinstance(error, AutoshardError) else 1
    return f"{type(error).__name__}: {' | '.join(lines[:most])[:400]}"


def outcomes(entry: Entry, kinds: Sequence[str] = KINDS, meshes: Sequence[str] = MESHES) -> Iterator[Outcome]:
    """Of every plan of every mode; one outcome of kind `trace` for a mode that cannot be traced."""
    for mode in entry.modes:
        gc.collect()
        try:
            subject = Subject.of(entry, mode)
        except Exception as error:
            yield Outcome(mode, "", "trace", "error", describe(error))
            continue
        yield from (subject.check(mesh, kind) for mesh in meshes for kind in kinds)
