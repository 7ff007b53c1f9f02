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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from autoshard.candidates import Candidate, CandidateTable
from autoshard.costs import CostModel
from autoshard.equations import Equation, Strategy
from autoshard.errors import RuleError
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.ops.row import TensorInfo, is_differentiable
from autoshard.passes.localize_shapes import LocalizeShapes
from autoshard.placements import Layout, P, R, pad, shard
from autoshard.program import Facts, Program, arguments, call_of, facts, op_name, set_facts, source_of, tensor_operands
from autoshard.rules import describe, rule_of
from autoshard.simulator import Ranks, SimulatedAxis, _run_node

if TYPE_CHECKING:
    from autoshard.discovery import Discovery

_MOST_SHOWN = 20
_MOST_VALUES = 8
_LONGEST_TRIED = 6


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
    Raises UnsoundRuleError (an AssertionError) that lists every strategy that fails and what differs by how much, with the
    smallest operands found on which the first still fails; RuleError when the op has no row, when the row does not fit, or
    when the call draws random numbers.

        register_rule("mylib::scale", "~b* i, i -> b* i")
        check_rule("mylib::scale", torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    """
    case = OpCase(op_overload(op), args, kwargs, MeshSpec.of(mesh))
    candidates = case.candidates(segmentations or {})
    if _draws(case):
        raise RuleError(f"this call of {case.op} draws random numbers: prove it with the draws turned off")
    failing = [(candidate, failure) for candidate in candidates if (failure := failure_of(case, candidate))]
    if failing:
        shown = [f"{_describe(case, candidate)}: {failure}" for candidate, failure in failing[:_MOST_SHOWN]]
        shown += [f"and {len(failing) - _MOST_SHOWN} more"] if len(failing) > _MOST_SHOWN else []
        shown.append(f"smallest counterexample: {_smallest(case, *failing[0], segmentations or {})}")
        row = describe(op_name(case.program()[1]))
        raise UnsoundRuleError(
            f"the rule of {case.op}, {row!r}, is wrong for shapes {[list(x.shape) for x in case.operands]} "
            f"on mesh {case.mesh}: {len(failing)} of {len(candidates)} strategies fail\n  " + "\n  ".join(shown)
        )
    return [candidate.strategies for candidate in candidates]


def discover_rule(
    op: torch._ops.OpOverload | str, *args: Any, samples: Sequence[tuple[Sequence[Any], Mapping[str, Any]]] | None = None, **kwargs: Any
) -> Discovery:
    """Find the rule of `op` by running it on pieces; print the result, it is the line to put into the program.

    op, args, kwargs: as for check_rule, small float64 tensors; lengths that have several divisors (4, 6, 12) and differ from
    each other decide most. samples: several uses, each `(args, kwargs)`: the rule holds for all, and dims of which some uses
    have more than others become `x*`.
    Raises RuleError when the op draws random numbers or has no tensors.

        print(discover_rule("mylib::scale", torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)))
        # register_rule("mylib::scale", "~a b, ~b -> a b")  # 6 strategies proved
    """
    from autoshard import discovery  # it stands on this module

    return discovery.discover(op, [(args, kwargs)] if samples is None else samples)


def _draws(case: OpCase) -> bool:
    _, node = case.program()
    rule = rule_of(op_name(node))
    return rule is not None and rule.is_random(call_of(node))


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
        rule = rule_of(op_name(node))
        if rule is None:
            raise RuleError(f"{self.op} has no rule: autoshard.register_rule adds one")
        rule.bind(call_of(node))
        table = CandidateTable(program, CostModel(self.mesh, hardware_of("cpu")))
        for size, options in segmentations.items():
            table.segmentations[size] = [*table.segmentations.get(size, []), *options]
        return table.of_op(node)

    def equation(self) -> Equation:
        """The op's row, bound to this use. Raises RuleError when there is none or it does not fit."""
        _, node = self.program()
        rule = rule_of(op_name(node))
        if rule is None:
            raise RuleError(f"{self.op} has no rule: autoshard.register_rule adds one")
        return rule.bind(call_of(node))

    def compute(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """What the op computes on other operands, in schema order, without gradients."""
        node, _ = self._node()
        env = dict(zip(tensor_operands(node), operands, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda placeholder: env[placeholder])
        with torch.no_grad():
            return _tensors(self.op(*args, **kwargs))

    def program(self, candidate: Candidate | None = None, is_localized: bool = True) -> tuple[Program, fx.Node]:
        """A program of this one op, localized for `candidate` when one is given."""
        node, tensors = self._node()
        for placeholder, x in tensors.items():
            set_facts(placeholder, Facts("input", (TensorInfo(tuple(x.shape), x.dtype, _wants_gradient(x)),), name=placeholder.name))
        set_facts(node, Facts("op", self.infos))
        program = Program(node.graph, self.mesh)
        if candidate is not None and is_localized:
            facts(node).strategies, facts(node).layouts = candidate.strategies, candidate.outputs
            LocalizeShapes()(program)
        return program, node

    def run(self, candidate: Candidate, is_localized: bool = True) -> Run:
        """Every rank's operands and results under `candidate`, after backward; without `is_localized` the op runs as it is."""
        program, node = self.program(candidate, is_localized)
        generator = torch.Generator().manual_seed(1)
        env: dict[fx.Node, Any] = {}
        operands = [source_of(operand) for operand in tensor_operands(node)]
        for operand, x, layout in zip(operands, self.operands, candidate.inputs, strict=True):
            pieces = spread(x.detach(), layout, self.mesh, generator)
            env[operand] = Ranks([piece.requires_grad_(_wants_gradient(x)) for piece in pieces])
        axes = {name: SimulatedAxis(self.mesh, name) for name in self.mesh.axes}
        for each in program.nodes("mask", "op"):
            env[each] = _run_node(program, each, axes, lambda tree: fx.map_arg(tree, lambda n: env[n]), 0)
        result = env[node]
        outputs = [list(column) for column in zip(*map(_tensors, result.values), strict=True)]
        roots: list[Tensor] = []
        seeds: list[Tensor] = []
        for pieces, cotangent, layout in zip(outputs, self.cotangents, candidate.outputs, strict=True):
            if cotangent is not None:
                given = zip(pieces, spread(cotangent, dual(layout), self.mesh, generator, is_gradient=True), strict=True)
                kept = [(piece, seed) for piece, seed in given if piece.requires_grad]
                roots, seeds = [*roots, *(piece for piece, _ in kept)], [*seeds, *(seed for _, seed in kept)]
        torch.autograd.backward(roots, seeds)
        return Run([env[operand].values for operand in operands], outputs)

    def _node(self) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
        """The op on placeholders, in a graph of its own; the tensor that each placeholder stands for."""
        graph, tensors = fx.Graph(), dict[fx.Node, Tensor]()

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            placeholder = graph.placeholder(f"x{len(tensors)}")
            tensors[placeholder] = value
            return placeholder

        args, kwargs = fx.node.map_aggregate((self.args, dict(self.kwargs)), stand_in)
        node = graph.call_function(self.op, args, kwargs)
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


def spread(value: Tensor, layout: Layout, mesh: MeshSpec, generator: torch.Generator, is_gradient: bool = False) -> list[Tensor]:
    """One local tensor per rank, padded; under P random terms, the same on ranks that hold the same term."""
    return [pad(piece, layout, value.shape, mesh, is_gradient) for piece in _terms(value, layout, mesh, generator)]


def _terms(value: Tensor, layout: Layout, mesh: MeshSpec, generator: torch.Generator) -> list[Tensor]:
    pieces = [shard(value, layout, mesh, at).clone() for at in mesh.coordinates()]
    if P not in layout:
        return pieces
    if value.dtype == torch.bool:
        raise UnsoundRuleError("a bool has no terms")
    terms: dict[tuple[int, ...], dict[tuple[int, ...], Tensor]] = {}
    for at, piece in zip(mesh.coordinates(), pieces, strict=True):
        terms.setdefault(_along(at, layout, "S"), {}).setdefault(_along(at, layout, "P"), _random_like(piece, generator))
    for group in terms.values():
        last = list(group)[-1]
        group[last] = -sum((term for number, term in group.items() if number != last), torch.zeros_like(group[last]))
    return [piece + terms[_along(at, layout, "S")][_along(at, layout, "P")] for at, piece in zip(mesh.coordinates(), pieces, strict=True)]


def difference(
    pieces: Sequence[Tensor], layout: Layout, expected: Tensor, mesh: MeshSpec, relative: float = 1e-8, is_gradient: bool = False
) -> str:
    """How local tensors that lie as `layout` miss the global value that they should make, on any rank; "" when they make it.

    Padding counts: copies of the last slice, or zeros when it is a gradient.
    """
    held = tuple(R if p == P else p for p in layout)
    wanted = [pad(shard(expected, held, mesh, at), held, expected.shape, mesh, is_gradient) for at in mesh.coordinates()]
    for piece, want in zip(pieces, wanted, strict=True):
        if piece.shape != want.shape:
            return f"has shape {list(piece.shape)} on a rank, should have {list(want.shape)}"
        if piece.dtype != want.dtype:
            return f"is {piece.dtype}, should be {want.dtype}"
    totals: dict[tuple[int, ...], Tensor] = {}
    for at, piece in zip(mesh.coordinates(), pieces, strict=True):
        term = _along(at, layout, "SRI")
        totals[term] = totals[term] + piece.detach() if term in totals else piece.detach()
    largest = max(_distance(totals[_along(at, layout, "SRI")], want) for at, want in zip(mesh.coordinates(), wanted, strict=True))
    finite = _wide(expected[expected.isfinite()]).abs()
    allowed = relative * max(1.0, float(finite.max()) if finite.numel() else 1.0) if is_differentiable(expected.dtype) else 0.0
    return f"differs by {largest:.2g}" if largest > allowed else ""


def failure_of(case: OpCase, candidate: Candidate, is_localized: bool = True) -> str:
    """What is wrong with one candidate: the first operand or result that differs, or what its execution raised; "" when sound."""
    try:
        run = case.run(candidate, is_localized)
    except Exception as error:  # an op may raise anything on operands that do not fit together
        return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    names = [f"output {k}" if len(case.outputs) > 1 else "output" for k in range(len(case.outputs))]
    checks = [(*check, False) for check in zip(names, run.outputs, candidate.outputs, case.outputs, strict=True)]
    for name, pieces, layout, after, gradient in zip(case.names, run.operands, candidate.inputs, case.written, case.gradients, strict=True):
        if gradient is not None:
            local = [torch.zeros_like(x) if x.grad is None else x.grad for x in pieces]
            checks.append((f"gradient of {name}", local, dual(layout), gradient, True))
        else:
            checks.append((f"{name} after the op", pieces, layout, after, False))
    precisions = [torch.finfo(x.dtype).eps for x in (*case.operands, *case.outputs) if is_differentiable(x.dtype)]
    relative = max(1e-16, *precisions) ** 0.5 if precisions else 0.0
    for name, pieces, layout, expected, is_gradient in checks:
        if text := difference(pieces, layout, expected, case.mesh, relative, is_gradient):
            return f"{name} {text}"
    return ""


def _smallest(case: OpCase, candidate: Candidate, failure: str, segmentations: Mapping[int, Sequence[tuple[int, ...]]]) -> str:
    """The same failure on operands of which no factor can be made shorter; their values where they are few."""
    sizes = {factor: size for factor, size in case.equation().sizes.items() if size > 1}
    while sizes:
        factor, size = next(iter(sizes.items()))
        del sizes[factor]
        for shorter in range(1, min(size, _LONGEST_TRIED + 1)):
            smaller = _shorten(case, factor, shorter)
            found = smaller and _same_failure(smaller, candidate, failure, segmentations)
            if smaller and found:
                case, (candidate, failure) = smaller, found
                break
    operands = ", ".join(f"{name} = {_values(x)}" for name, x in zip(case.names, case.operands, strict=True))
    return f"{operands}: {_describe(case, candidate)}: {failure}"


def _shorten(case: OpCase, factor: str, size: int) -> OpCase | None:
    """The use with one factor cut to its first `size` entries; None where it is a part of a dim, or the op then raises."""
    new: dict[int, Tensor] = {}
    for x, operand in zip(case.operands, case.equation().inputs, strict=True):
        for k, dim in enumerate(operand.dims):
            if factor in dim and dim != (factor,):
                return None
            shortened = new.get(id(x), x)
            if dim == (factor,):
                piece = shortened.detach().narrow(k, 0, size).clone()
                new[id(x)] = nn.Buffer(piece) if isinstance(x, nn.Buffer) else piece
    if not new:
        return None
    args, kwargs = fx.node.map_aggregate((case.args, dict(case.kwargs)), lambda x: new.get(id(x), x))
    try:
        return OpCase(case.op, args, kwargs, case.mesh)
    except Exception:  # an op may raise anything on operands that do not fit together
        return None


def _same_failure(
    case: OpCase, candidate: Candidate, failure: str, segmentations: Mapping[int, Sequence[tuple[int, ...]]]
) -> tuple[Candidate, str] | None:
    """The strategy in a smaller case, and what is wrong there, if it is wrong in the same way."""
    try:
        options = case.candidates(segmentations)
    except Exception:  # the row need not fit
        return None
    for option in options:
        if (option.inputs, option.outputs) == (candidate.inputs, candidate.outputs):
            found = failure_of(case, option)
            return (option, found) if found and found.startswith("raises") == failure.startswith("raises") else None
    return None


def _values(x: Tensor) -> str:
    if x.numel() > _MOST_VALUES:
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return str((x.detach().double() * 1e4).round().div(1e4).tolist() if x.is_floating_point() else x.tolist())


def _describe(case: OpCase, candidate: Candidate) -> str:
    """`i split on a: input S(1), weight S(1), bias P -> P`; on several axes the layouts are tuples."""
    named = zip(case.mesh.axes, candidate.strategies, strict=True)
    split = [f"{strategy.factor} split on {axis}" for axis, strategy in named if strategy.factor]
    operands = ", ".join(f"{name} {_plain(layout)}" for name, layout in zip(case.names, candidate.inputs, strict=True))
    return f"{' and '.join(split) or 'nothing split'}: {operands} -> {', '.join(map(_plain, candidate.outputs))}"


def _plain(layout: Layout) -> str:
    return " ".join(map(str, layout)) if len(layout) == 1 else f"({' '.join(map(str, layout))})"


def _along(coordinate: Sequence[int], layout: Layout, kinds: str) -> tuple[int, ...]:
    """The coordinate on those axes alone where the layout is one of `kinds`."""
    return tuple(c for c, placement in zip(coordinate, layout, strict=True) if placement.kind in kinds)


def _distance(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (_wide(a) - _wide(b)).abs())
    return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    if is_differentiable(x.dtype):
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return torch.randint(-128, 128, x.shape, dtype=x.dtype, generator=generator)


def _wants_gradient(x: Tensor) -> bool:
    return x.dtype in (torch.float64, torch.complex128) and not isinstance(x, nn.Buffer)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(_wants_gradient(x))


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]


def _operand_names(node: fx.Node) -> list[str]:
    names = []
    for name, value in arguments(node).items():
        if isinstance(value, fx.Node):
            names.append(name)
        elif isinstance(value, (tuple, list)):
            names += [f"{name}[{k}]" for k, item in enumerate(value) if isinstance(item, fx.Node)]
    return names


def op_overload(op: torch._ops.OpOverload | str) -> torch._ops.OpOverload:
    """The op that a text like `namespace::name.overload` names."""
    if not isinstance(op, str):
        return op
    namespace, _, name = op.partition("::")
    base, _, overload = name.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise RuleError(f"no op {op!r}: import or define it first (write it as 'namespace::name')") from error
