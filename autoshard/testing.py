"""Proof of op rules by execution: every strategy that a row allows is run on all ranks and compared with the op itself.

For one use of an op, on small float64 tensors: each operand is laid out as the strategy says, a program of that one op is
localized and simulated as any other program is, and the results are put together again. Then backward: each result gets
its gradient in the dual placement, and each operand's gradient must lie in the dual of the operand's placement.

    placement  operand, result                     its gradient
    S(d)       pieces                              pieces
    P          random terms that sum to the value  the whole on every rank
    R          the whole on every rank             terms that sum to the whole
    I          the whole on every rank             the whole on every rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoshard.candidates import Candidate, CandidateTable
from autoshard.costs import CostModel
from autoshard.equation_builders import TensorInfo
from autoshard.equations import Strategy
from autoshard.errors import RuleError
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.passes.localize_shapes import LocalizeShapes
from autoshard.placements import I, Layout, P, Placement, R, shard
from autoshard.program import Facts, Program, arguments, call_of, facts, op_name, set_facts, tensor_operands
from autoshard.rules import describe, rule_of
from autoshard.simulator import Ranks, SimulatedAxis, _run_node

_MOST_SHOWN = 20


class UnsoundRuleError(RuleError, AssertionError):
    """Strategies that a rule allows do not compute what the op computes; the text lists each with what differs."""


def check_rule(
    op: torch._ops.OpOverload | str,
    *args: Any,
    mesh: MeshSpec | Mapping[str, int] | str = "a=2",
    segmentations: Mapping[int, Sequence[tuple[int, ...]]] | None = None,
    **kwargs: Any,
) -> list[tuple[Strategy, ...]]:
    """Prove the row of `op` for one use, `op(*args, **kwargs)`, on every strategy that the row allows.

    op: an OpOverload, or `namespace::name` or `namespace::name.overload`. args, kwargs: the op's arguments with global,
    small tensors. Values and gradients of float64 tensors are compared to 1e-8; wrap a tensor in torch.nn.Buffer when no
    gradient flows to it, running statistics for example: what the op writes into it is compared. mesh: axes and sizes;
    with several axes every joint strategy whose sizes divide is run. segmentations: segments to propose for dims, by
    their size, beyond those that the op itself shows: `{12: [(4, 4, 4)]}` for a fused weight.

    Returns the strategies proved, one tuple with a strategy per axis each; look there whether what should be split is.
    Raises UnsoundRuleError (an AssertionError) that lists every strategy that fails and what differs by how much, and
    RuleError when the op has no row, when the row does not fit, or when the call draws random numbers.

        register_rule("mylib::scale", "~b* i, i -> b* i")
        check_rule("mylib::scale", torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    """
    case = OpCase(_overload(op), args, kwargs, MeshSpec.of(mesh))
    candidates = case.candidates(segmentations or {})
    failures = [f"{_describe(case, candidate)}: {failure}" for candidate in candidates if (failure := _failure(case, candidate))]
    if failures:
        shown = [*failures[:_MOST_SHOWN], *([f"and {len(failures) - _MOST_SHOWN} more"] if len(failures) > _MOST_SHOWN else [])]
        raise UnsoundRuleError(
            f"the rule of {case.name}, {describe(case.name)!r}, is wrong for shapes {[list(x.shape) for x in case.operands]} on mesh {case.mesh}: "
            f"{len(failures)} of {len(candidates)} strategies fail\n  " + "\n  ".join(shown)
        )
    return [candidate.strategies for candidate in candidates]


@dataclass
class OpCase:
    """One use of an op on a mesh, and what it computes on a single device.

    operands: its tensors in schema order, by `names`; written: the same as the op leaves them; outputs: its results;
    cotangents: of each output, None for one without gradient; gradients: what they give each operand, None without one.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mesh: MeshSpec
    operands: list[Tensor] = field(init=False)
    names: list[str] = field(init=False)
    written: list[Tensor] = field(init=False)
    outputs: list[Tensor] = field(init=False)
    cotangents: list[Tensor | None] = field(init=False)
    gradients: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        node, tensors = self._node()
        self.operands = [tensors[operand] for operand in tensor_operands(node)]
        self.names = _operand_names(node)
        copies = {placeholder: _leaf(x) for placeholder, x in tensors.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda placeholder: copies[placeholder])
        outputs = _tensors(self.op(*args, **kwargs))
        leaves = [copies[operand] for operand in tensor_operands(node)]
        generator = torch.Generator().manual_seed(0)
        self.cotangents = [_random_like(y, generator) if y.requires_grad else None for y in outputs]
        roots = {y: g for y, g in zip(outputs, self.cotangents, strict=True) if g is not None}
        torch.autograd.backward(list(roots), list(roots.values()))
        self.gradients = [(torch.zeros_like(x) if x.grad is None else x.grad) if x.requires_grad else None for x in leaves]
        self.outputs, self.written = [y.detach() for y in outputs], [x.detach() for x in leaves]

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """What the planner would know of the outputs."""
        return tuple(TensorInfo(tuple(y.shape), y.dtype, g is not None) for y, g in zip(self.outputs, self.cotangents, strict=True))

    def candidates(self, segmentations: Mapping[int, Sequence[tuple[int, ...]]]) -> list[Candidate]:
        """What the search would choose from. Raises RuleError when there is nothing to prove."""
        program, node = self.program()
        call, rule = call_of(node), rule_of(op_name(node))
        if rule is None:
            raise RuleError(f"{self.op} has no rule: autoshard.register_rule adds one")
        if rule.is_random(call):
            raise RuleError(f"this call of {self.op} draws random numbers, which differ from rank to rank: prove it with the draws turned off")
        rule.bind(call)
        table = CandidateTable(program, CostModel(self.mesh, hardware_of("cpu")))
        for size, options in segmentations.items():
            table.segmentations[size] = [*table.segmentations.get(size, []), *options]
        return table.of_op(node)

    def program(self, candidate: Candidate | None = None) -> tuple[Program, fx.Node]:
        """A program of this one op, localized for `candidate` when one is given."""
        node, tensors = self._node()
        for placeholder, x in tensors.items():
            set_facts(placeholder, Facts("input", (TensorInfo(tuple(x.shape), x.dtype, _wants_gradient(x)),), name=placeholder.name))
        set_facts(node, Facts("op", self.infos))
        program = Program(node.graph, self.mesh)
        if candidate is not None:
            facts(node).strategies, facts(node).layouts = candidate.strategies, candidate.outputs
            LocalizeShapes()(program)
        return program, node

    def run(self, candidate: Candidate) -> Run:
        """Every rank's operands and results under `candidate`, after backward."""
        program, node = self.program(candidate)
        generator = torch.Generator().manual_seed(1)
        env = {}
        for operand, x, layout in zip(tensor_operands(node), self.operands, candidate.inputs, strict=True):
            pieces = spread(x.detach(), layout, self.mesh, generator)
            env[operand] = Ranks([piece.requires_grad_(_wants_gradient(x)) for piece in pieces])
        axes = {name: SimulatedAxis(self.mesh, name) for name in self.mesh.axes}
        result = _run_node(program, node, axes, lambda tree: fx.map_arg(tree, lambda n: env[n]), 0)
        outputs = [list(column) for column in zip(*map(_tensors, result.values), strict=True)]
        roots: list[Tensor] = []
        seeds: list[Tensor] = []
        for pieces, cotangent, layout in zip(outputs, self.cotangents, candidate.outputs, strict=True):
            if cotangent is not None:
                given = zip(pieces, spread(cotangent, dual(layout), self.mesh, generator), strict=True)
                kept = [(piece, seed) for piece, seed in given if piece.requires_grad]
                roots, seeds = [*roots, *(piece for piece, _ in kept)], [*seeds, *(seed for _, seed in kept)]
        torch.autograd.backward(roots, seeds)
        return Run([env[operand].values for operand in tensor_operands(node)], outputs)

    def _node(self) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
        """The op on placeholders, in a graph of its own; the tensor that each placeholder stands for."""
        graph, tensors = fx.Graph(), {}

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            placeholder = graph.placeholder(f"x{len(tensors)}")
            tensors[placeholder] = value
            return placeholder

        args, kwargs = fx.node.map_aggregate((self.args, dict(self.kwargs)), stand_in)  # type: ignore[misc]
        node = graph.call_function(self.op, args, kwargs)  # type: ignore[arg-type]
        set_facts(node, Facts("op"))
        return node, tensors


@dataclass(frozen=True)
class Run:
    """Local tensors of one simulated use: per operand and per output, one tensor per rank."""

    operands: list[list[Tensor]]
    outputs: list[list[Tensor]]


def dual(layout: Layout) -> Layout:
    """The layout of the gradient of a value."""
    return tuple({"P": R, "R": P}.get(placement.kind, placement) for placement in layout)


def spread(value: Tensor, layout: Layout, mesh: MeshSpec, generator: torch.Generator) -> list[Tensor]:
    """One local tensor per rank; under P random terms, alike on ranks that hold the same term."""
    if any(P in (placement,) for placement in layout) and value.dtype == torch.bool:
        raise UnsoundRuleError("a bool value has no terms")
    pieces = [shard(value, layout, mesh, at).clone() for at in mesh.coordinates()]
    terms: dict[tuple[int, ...], dict[tuple[int, ...], Tensor]] = {}
    for at, piece in zip(mesh.coordinates(), pieces, strict=True):
        place = tuple(c for c, p in zip(at, layout, strict=True) if p.is_split)
        terms.setdefault(place, {}).setdefault(tuple(c for c, p in zip(at, layout, strict=True) if p == P), _random_like(piece, generator))
    for group in terms.values():
        *others, last = group
        group[last] = -sum((group[term] for term in others), torch.zeros_like(group[last]))
    return [
        piece + terms[tuple(c for c, p in zip(at, layout, strict=True) if p.is_split)][tuple(c for c, p in zip(at, layout, strict=True) if p == P)]
        for at, piece in zip(mesh.coordinates(), pieces, strict=True)
    ]


def compare(pieces: Sequence[Tensor], layout: Layout, expected: Tensor, mesh: MeshSpec) -> str:
    """How local tensors that lie as `layout` differ from the global value that they should make; "" when they do not."""
    totals: dict[tuple[int, ...], Tensor] = {}
    terms = [tuple(-1 if p == P else c for c, p in zip(at, layout, strict=True)) for at in mesh.coordinates()]
    seen: set[tuple[int, ...]] = set()
