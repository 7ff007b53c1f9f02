"""The predicted step time as an expression in the sizes of the mesh axes and the sizes that may change.

The prices are autoshard.costs' own, computed on sympy expressions in place of numbers: a roofline is a Max, a collective a
function named after it, such as `all_reduce_tp(8192*batch/dp, dp, tp)`, of the bytes that its axis holds together and of the
mesh, which becomes a number (or the least over algorithms) once the mesh sizes are known. So an expression is exact
wherever the same layouts are sound and the dims that the plan splits divide; a size's expression comes from the trace
(`dynamic=` in autoshard.plan), what a lowering sends from running it on tensors of symbolic sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from autoshard.collectives import axis_links, collective_terms
from autoshard.conversions import Step, replace_axis
from autoshard.cost_report import CostRow, Pricer, Work
from autoshard.costs import CostModel
from autoshard.equations import Equation
from autoshard.errors import InputError
from autoshard.hardware import Hardware
from autoshard.ops.row import Call, TensorInfo
from autoshard.placements import Layout, R
from autoshard.program import Program, facts, tensor_operands
from autoshard.symbolic import Size, positive
from autoshard.symbolic_sizes import SizeTrace


def step_time(program: Program, hardware: Hardware, fixed: Collection[str] = ()) -> sympy.Expr:
    """The predicted seconds of a step of a planned program as a sympy expression.

    Symbols (integer, positive) are named after the mesh axes of two and more ranks and the plan's dynamic sizes; those in
    `fixed` are numbers. Substituting all of them gives a number: what the same layouts cost at those sizes, on axes of two and
    more ranks, where dims that the plan splits divide (dims that it pads are counted with their padding).
    Raises InputError for names in `fixed` that are neither, for hardware with measured op times, and for a lowering whose
    messages depend on the size of an axis (a ring): fix that one.
    """
    mesh = program.mesh
    known = [*mesh.axes, *program.symbols]
    wrong = [name for name in fixed if name not in known]
    if wrong:
        raise InputError(f"there is no size {wrong[0]!r} to fix; this plan has {', '.join(known)}")
    if hardware.measured is not None and hardware.measured.ops:
        raise InputError(
            f"hardware {hardware.name!r} has measured seconds of single ops, which hold at the sizes that were measured and are no "
            "expression; plan with hardware that has rates alone"
        )
    sizes = {name: sympy.Integer(n) if n == 1 or name in fixed else positive(name) for name, n in zip(mesh.axes, mesh.shape, strict=True)}
    examples = {positive(name): sympy.Integer(program.symbols[name].example) for name in fixed if name in program.symbols}
    numbers = {positive(name): sympy.Integer(symbol.example) for name, symbol in program.symbols.items()}
    pricer = SymbolicPricer(program, SymbolicCosts(mesh, hardware, tuple(sizes.values()), examples, numbers))
    counts = Counter(row.total_s for row in pricer.rows() if row.is_per_step and row.total_s)
    return sympy.Add(*(count * seconds for seconds, count in counts.items()))


# ---------------------------------------------------------------------------------------------------------- collectives


class CollectiveTime(sympy.Function):
    """Seconds of one collective: f(bytes, *mesh sizes), evaluated once every mesh size is a number."""

    hardware: Hardware
    collective: str
    axis: int

    @classmethod
    def eval(cls, whole: sympy.Expr, *sizes: sympy.Expr) -> sympy.Expr | None:
        if whole.is_zero:
            return sympy.Integer(0)
        if not all(size.is_Integer for size in sizes):
            return None
        links = axis_links(cls.hardware, tuple(map(int, sizes)), cls.axis)
        terms = collective_terms(cls.hardware, links, cls.collective)
        return sympy.Min(*(sympy.Float(fixed) + sympy.Float(per_byte) * whole for fixed, per_byte in terms))

    def _eval_is_extended_nonnegative(self) -> bool:
        return True


@dataclass(frozen=True)
class SymbolicCosts(CostModel):
    """autoshard.costs on expressions. sizes: of the mesh axes. fixed: sizes that stay numbers. examples: every size's number."""

    sizes: tuple[sympy.Expr, ...] = ()
    fixed: Mapping[sympy.Symbol, sympy.Integer] = field(default_factory=dict)
    examples: Mapping[sympy.Symbol, sympy.Integer] = field(default_factory=dict)

    def shape(self, value: TensorInfo) -> tuple[sympy.Expr, ...]:
        """Global sizes of a value as expressions."""
        return tuple(map(self.length, value.shape))

    def length(self, size: int | sympy.Expr) -> sympy.Expr:
        """A size as an expression, `fixed` sizes as numbers."""
        if isinstance(size, sympy.Expr):
            return size
        return size.expr.xreplace(dict(self.fixed)) if isinstance(size, Size) else sympy.Integer(int(size))

    def number(self, size: int | sympy.Expr) -> int:
        """A size in the example."""
        return int(size.xreplace(dict(self.examples))) if isinstance(size, sympy.Expr) else int(size)

    def share(self, value: TensorInfo, dim: int, axis: int) -> sympy.Expr:
        """What part of a dim each rank of an axis holds, padding included."""
        n, size = self.sizes[axis], value.shape[dim]
        if self.number(size) % self.mesh.shape[axis] == 0:
            return 1 / n
        length = self.length(size)
        return sympy.ceiling(length / n) / length

    def local_bytes(self, value: TensorInfo, layout: Layout) -> Any:
        held = sympy.Mul(value.dtype.itemsize, *self.shape(value))
        return sympy.Mul(held, *(self.share(value, p.dim, axis) for axis, p in enumerate(layout) if p.is_split))

    def whole_bytes(self, step: Step, value: TensorInfo, layout: Layout) -> Any:
        held = self.local_bytes(value, replace_axis(layout, step.axis, R))
        stretches = (self.share(value, p.dim, step.axis) * self.sizes[step.axis] for p in (step.src, step.dst) if p.is_split)
        return sympy.Mul(held, *stretches)

    def collective_s(self, name: str, axis: int, whole_bytes: Any) -> Any:
        if name == "identity" or self.sizes[axis] == 1:
            return sympy.Integer(0)
        key = f"{name}_{self.mesh.axes[axis]}"
        if key not in self._functions:
            known = {"hardware": self.hardware, "collective": name, "axis": axis}
            self._functions[key] = type(key, (CollectiveTime,), known)
        return self._functions[key](whole_bytes, *self.sizes)

    @cached_property
    def _functions(self) -> dict[str, type[CollectiveTime]]:
        return {}

    def _slower(self, flops_s: Any, memory_s: Any) -> Any:
        return sympy.Max(flops_s, memory_s)


# ------------------------------------------------------------------------------------------------------------ the nodes


@dataclass
class SymbolicPricer(Pricer):
    """Prices nodes as expressions: of a row, only seconds are meant."""

    costs: SymbolicCosts

    def _kernels(self, node: fx.Node, call: Call) -> Any:
        rule, equation, values, layouts, split = self._work(node, call)
        return self._row(*self.costs.op_times(call.op, rule, equation, values, layouts, split))

    def _work(self, node: fx.Node, call: Call) -> Work:
        rule, equation, values, layouts, split = super()._work(node, call)
        if equation is None:
            return rule, equation, values, layouts, split
        lengths = self._factor_lengths(equation, values)
        shares = [sympy.Integer(1)]
        for axis, strategy in enumerate(facts(node).strategies):
            if strategy.factor:
                length, n = equation.sizes.get(strategy.factor), self.costs.sizes[axis]
                is_even = length is None or length % self.program.mesh.shape[axis] == 0
                whole = lengths.get(strategy.factor, n)
                shares.append(n if is_even else whole / sympy.ceiling(whole / n))
        shaped = [replace(value, shape=self.costs.shape(value)) for value in values]
        return rule, replace(equation, sizes=lengths), shaped, layouts, sympy.Mul(*shares)

    def _inside(self, node: fx.Node, call: Call, axes: Mapping[str, Sequence[str]]) -> Any:
        if not axes:
            return
        layouts = [facts(operand).layout for operand in tensor_operands(node)]
        local = [self._local_shape(value, layout) for value, layout in zip(call.inputs, layouts, strict=False)]
        where = f"{node.name} at {facts(node).source}"
        sizes = dict(zip(self.program.mesh.axes, self.costs.sizes, strict=True))
        numbers = dict(zip(self.program.mesh.axes, self.program.mesh.shape, strict=True))
        trace = SizeTrace(sizes, numbers, {symbol: int(n) for symbol, n in self.costs.examples.items()}, where)
        for (axis, name, whole), times in Counter(trace.sent(node.target.__name__, call, local, axes)).items():  # type: ignore[union-attr]
            yield self._row(times * self.costs.collective_s(name, self.program.mesh.index(axis), whole), 0)

    def _local_shape(self, value: TensorInfo, layout: Layout) -> tuple[sympy.Expr, ...]:
        """Sizes of the piece that a rank holds."""
        lengths = list(self.costs.shape(value))
        for axis, placement in enumerate(layout):
            if placement.is_split:
                n, dim = self.costs.sizes[axis], placement.dim
                is_even = self.costs.number(value.shape[dim]) % self.program.mesh.shape[axis] == 0
                lengths[dim] = lengths[dim] / n if is_even else sympy.ceiling(lengths[dim] / n)
        return tuple(lengths)

    def _row(self, forward_s: Any, backward_s: Any) -> CostRow:
        return CostRow("", "", "", "", "", forward_s, backward_s)

    def _factor_lengths(self, equation: Equation, values: Sequence[TensorInfo]) -> dict[str, sympy.Expr]:
        """Every factor of an equation as an expression, from the dims that show it."""
        operands = [*zip(equation.inputs, values, strict=False), *zip(equation.outputs, values[-len(equation.outputs) :], strict=False)]
        shown = [
            (dim, self.costs.length(size), is_joined)
            for operand, value in operands
            for dim, size, is_joined in zip(operand.dims, value.shape, operand.joined, strict=True)
        ]
        found = {dim[0]: length for dim, length, _ in shown if len(dim) == 1 and self.costs.number(length) == equation.sizes[dim[0]]}
        for dim, length, is_joined in shown:
            missing = [factor for factor in dim if factor not in found]
            if len(missing) == 1 and not is_joined:
                found[missing[0]] = length / sympy.Mul(*(found[factor] for factor in dim if factor in found))
        return {factor: found.get(factor, sympy.Integer(size)) for factor, size in equation.sizes.items()}
