"""Candidates: for every node of a program, the joint strategies over all axes that are sound and whose sizes divide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import fx

from autoshard.conversions import without_gradient
from autoshard.costs import CostModel, split_of
from autoshard.equations import Equation, Strategy, base, divides, linear_operands, strategies
from autoshard.errors import RuleError
from autoshard.mesh import MeshSpec
from autoshard.ops.row import Call, Rule, TensorInfo
from autoshard.placements import I, Layout, Placement, R, S, local_shape, padded_axes
from autoshard.program import Program, call_at, call_of, facts, is_sized, strange_sizes
from autoshard.rules import rule_of
from autoshard.traffic import meter, seconds_inside

_MOST_SEGMENTS = 64
_FEW_SEGMENTS = 4


@dataclass(frozen=True)
class Candidate:
    """One way to run a node: its strategy on every axis, the layouts it wants and gives, its seconds, forward and backward.

    gathers_again: of a weight, whether backward gathers copies of it again rather than keeping them.
    """

    strategies: tuple[Strategy, ...]
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    cost_s: float
    gathers_again: bool = False


@dataclass
class CandidateTable:
    """Makes and remembers candidates; equal calls share one list, which is how repeated layers become equal tables."""

    program: Program
    costs: CostModel
    segmentations: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    _known: dict[object, list[Candidate]] = field(default_factory=dict)
    _sent: dict[object, tuple[Call, list[tuple[int, str, float]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.segmentations = find_segmentations(self.program)

    def of_op(self, node: fx.Node) -> list[Candidate]:
        """Candidates of an op node; only whole ones when it has no rule."""
        call = call_of(node)
        text = str(sorted(call.arguments.items(), key=lambda item: item[0]))  # a size that may change reads as its expression
        key = (call.op, call.inputs, call.outputs, text, str([info.shape for info in (*call.inputs, *call.outputs)]))
        if key not in self._known:
            found = self._make(call, *bound_rule(node))
            self._known[key] = self._that_hold(call, found) if is_sized(node) else found
        return self._known[key]

    def _that_hold(self, call: Call, candidates: list[Candidate]) -> list[Candidate]:
        """Those that are sound at other sizes than the example's too, not because lengths happen to be equal there."""
        other = call_at(call, strange_sizes(self.program))
        layouts = {(found.inputs, found.outputs) for found in self._make(other, *bind_rule(other))}
        return [candidate for candidate in candidates if (candidate.inputs, candidate.outputs) in layouts]

    def of_parameter(self, value: TensorInfo) -> list[Candidate]:
        """Layouts a parameter may rest in: whole or split, whose gradients lie as the parameter does."""
        key = ("parameter", value)
        if key not in self._known:
            whole = I if value.needs_grad else R
            splits = [S(dim, segments) for dim, size in enumerate(value.shape) for segments in ((), *self._equal_segments(size))]
            options = [[whole, *(s for s in splits if n > 1)] for n in self.program.mesh.shape]
            layouts = [layout for layout in itertools.product(*options) if is_storable(layout) and self._fits(value, layout)]
            self._known[key] = [Candidate((), (), (layout,), self._resting_s(value, layout)) for layout in layouts]
        return self._known[key]

    def _resting_s(self, value: TensorInfo, layout: Layout) -> float:
        """Seconds of the optimizer step, and of padding what does not divide whenever it is read."""
        is_padded = bool(padded_axes(value.shape, layout, self.program.mesh.shape))
        return self.costs.parameter_s(value, layout) + (self.costs.copy_s(value, layout) if is_padded else 0.0)

    def _equal_segments(self, size: int) -> list[tuple[int, ...]]:
        return [segments for segments in self.segmentations.get(size, []) if len(set(segments)) == 1]

    def _fits(self, value: TensorInfo, layout: Layout) -> bool:
        return local_shape(value.shape, layout, self.program.mesh.shape) is not None

    def _make(self, call: Call, rule: Rule | None, equation: Equation | None) -> list[Candidate]:
        sizes = self.program.mesh.shape
        if equation is None:
            per_axis: list[Sequence[Strategy]] = [[whole_strategy(call, p) for p in ((R, I) if n > 1 else (I,))] for n in sizes]
        else:
            per_axis = [strategies(equation, n, self.segmentations) if n > 1 else [whole_strategy(call)] for n in sizes]
            per_axis = [[settle(s, rule) for s in options] for options in per_axis]
        values = (*call.inputs, *call.outputs)
        best: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], Candidate] = {}
        pads = any(self.costs.pads(value.shape) for value in values)
        for joint in itertools.product(*per_axis):
            factors = [strategy.factor for strategy in joint]
            if equation is not None and not divides(equation, factors, sizes):
                continue
            layouts = layouts_of(joint, values, len(call.inputs))
            if not all(self._fits(value, layout) for value, layout in zip(values, layouts, strict=True)):
                continue
            inputs, outputs = tuple(layouts[: len(call.inputs)]), tuple(layouts[len(call.inputs) :])
            is_plain = self.costs.hardware.measured is not None and not lowered_axes(rule, factors, self.program.mesh.axes)
            measured = call if is_plain else None  # times are measured of ops, not of their lowerings
            cost = self.costs.op_s(call.op, rule, equation, values, layouts, split_of(equation, factors, sizes), measured)
            cost += self._inside_s(call, rule, factors, inputs)
            masks = masks_of(rule, equation, factors, sizes) if pads else []
            cost += sum(self.costs.copy_s(call.inputs[mask.operand], inputs[mask.operand]) for mask in masks)
            if (inputs, outputs) not in best or cost < best[inputs, outputs].cost_s:
                best[inputs, outputs] = Candidate(joint, inputs, outputs, cost)
        return list(best.values())

    def forward_s(self, node: fx.Node, candidates: Sequence[Candidate]) -> np.ndarray:
        """f64[len(candidates)]: seconds of the forward direction of an op alone."""
        call, (rule, equation), sizes = call_of(node), bound_rule(node), self.program.mesh.shape
        inputs, outputs = ([replace(info, needs_grad=False) for info in infos] for infos in (call.inputs, call.outputs))
        once = Call(call.op, call.arguments, tuple(inputs), tuple(outputs))
        found = []
        for candidate in candidates:
            factors, layouts = [strategy.factor for strategy in candidate.strategies], [*candidate.inputs, *candidate.outputs]
            split = split_of(equation, factors, sizes)
            seconds = self.costs.op_s(call.op, rule, equation, [*inputs, *outputs], layouts, split)
            found.append(seconds + self._inside_s(once, rule, factors, candidate.inputs))
        return np.array(found)

    def _inside_s(self, call: Call, rule: Rule | None, factors: Sequence[str], inputs: Sequence[Layout]) -> float:
        """Seconds of what the op's lowering sends under this strategy."""
        axes = lowered_axes(rule, factors, self.program.mesh.axes)
        if not axes or rule is None or rule.lowering is None:
            return 0.0
        # What is sent depends on local shapes and on the sizes of axes; which axes they are is put in afterwards.
        mesh = self.program.mesh
        used = list(dict.fromkeys(axis for names in axes.values() for axis in names))
        pattern = tuple((keyword, tuple(used.index(axis) for axis in names)) for keyword, names in axes.items())
        local = tuple(local_shape(info.shape, layout, mesh.shape) for info, layout in zip(call.inputs, inputs, strict=False))
        key = (id(call), local, pattern, tuple(mesh.shape[mesh.index(axis)] for axis in used))
        if key not in self._sent:
            found = meter(rule.lowering.function, call, inputs, axes, mesh)
            self._sent[key] = call, [(used.index(axis), name, whole) for axis, name, whole in found]
        return seconds_inside(self.costs, [(used[k], name, whole) for k, name, whole in self._sent[key][1]])


def lowered_axes(rule: Rule | None, factors: Sequence[str], axes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Keyword of the rule's lowering -> the axes that split its factor, outermost first; empty where none does."""
    found: dict[str, tuple[str, ...]] = {}
    for axis, factor in zip(axes, factors, strict=True):
        keywords = rule.lowering.axes.get(base(factor), "") if rule is not None and rule.lowering is not None and factor else ""
        for keyword in keywords.split():
            found[keyword] = (*found.get(keyword, ()), axis)
    return found


def axes_in_place(rule: Rule, node: fx.Node, factors: Sequence[str], mesh: MeshSpec) -> dict[str, tuple[str, ...]]:
    """lowered_axes of a node of a typed program; keywords without axes where the lowering stands in for an op on one sample."""
    axes = lowered_axes(rule, factors, mesh.axes)
    if axes or rule.lowering is None or not rule.lowering.lone_sample or not facts(node).value.needs_grad:
        return axes
    local = local_shape(facts(node).value.shape, facts(node).layout, mesh.shape)
    return dict.fromkeys(rule.lowering.axes.values(), ()) if local and local[0] == 1 else {}


def lowered_sizes(rule: Rule | None, equation: Equation | None, factors: Sequence[str], sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Keyword of the rule's lowering -> per axis of its `*_axes` the global length of a factor that does not divide, 0 where one does."""
    found: dict[str, tuple[int, ...]] = {}
    if rule is None or rule.lowering is None or equation is None:
        return found
    for factor, n in zip(factors, sizes, strict=True):
        keyword = rule.lowering.axes.get(base(factor)) if factor else None
        if keyword is not None:
            name, length = keyword.removesuffix("_axes") + "_sizes", equation.sizes.get(factor, 0)
            found[name] = (*found.get(name, ()), length if length % n else 0)
    return {name: lengths for name, lengths in found.items() if any(lengths)}


class Mask(NamedTuple):
    """An operand (by number) that must be zero at the padding of `dim` on `axis` (by number), a dim of global length `size`."""

    operand: int
    axis: int
    dim: int
    size: int


def masks_of(rule: Rule | None, equation: Equation | None, factors: Sequence[str], sizes: Sequence[int]) -> list[Mask]:
    """What keeps padding out of the sums of an op: for every padded factor that no output has, the smallest linear operand."""
    found: list[Mask] = []
    for axis, (factor, n) in enumerate(zip(factors, sizes, strict=True)):
        length = equation.sizes.get(factor, 0) if equation is not None else 0
        if equation is None or length % n == 0 or any((factor,) in operand.dims for operand in equation.outputs):
            continue
        if rule is not None and rule.lowering is not None and base(factor) in rule.lowering.skips_padding:
            continue
        known = equation.sizes
        for k in sorted(linear_operands(equation, factor), key=lambda k: math.prod(known[f] for d in equation.inputs[k].dims for f in d))[
            :1
        ]:
            found.append(Mask(k, axis, equation.inputs[k].dims.index((factor,)), length))
    return found


def bound_rule(node: fx.Node) -> tuple[Rule | None, Equation | None]:
    """The row of an op and its equation; (None, None) without a row, or where the row does not fit the call."""
    return (None, None) if facts(node).is_drawn_whole else bind_rule(call_of(node))


def bind_rule(call: Call) -> tuple[Rule | None, Equation | None]:
    """bound_rule of a call."""
    rule = rule_of(call.op)
    if rule is None:
        return None, None
    try:
        return rule, rule.bind(call)
    except RuleError:
        return None, None


def whole_strategy(call: Call, placement: Placement = I) -> Strategy:
    """Every operand and result whole."""
    return Strategy((placement,) * len(call.inputs), (placement,) * len(call.outputs))


def settle(strategy: Strategy, rule: Rule | None) -> Strategy:
    """Strategy of a lowering that sums inside: outputs that would be partial are invariant."""
    if rule is None or rule.lowering is None or base(strategy.factor) not in rule.lowering.settled:
        return strategy
    outputs = tuple(I if placement.kind == "P" else placement for placement in strategy.outputs)
    return Strategy(strategy.inputs, outputs, strategy.factor)


def layouts_of(joint: Iterable[Strategy], values: Sequence[TensorInfo], inputs: int) -> list[Layout]:
    """Layouts of all inputs and outputs under one strategy per axis; values without gradient take R where I is asked."""
    columns = list(zip(*((*strategy.inputs, *strategy.outputs) for strategy in joint), strict=True))
    return [tuple(column) if value.needs_grad else without_gradient(tuple(column)) for value, column in zip(values, columns, strict=True)]


def is_storable(layout: Layout) -> bool:
    """Whether DTensor can say this layout: segments that are equal, of a dim that no other axis splits."""
    return not any(placement.segments and not _is_strided_shard(layout, axis) for axis, placement in enumerate(layout))


def _is_strided_shard(layout: Layout, axis: int) -> bool:
    others = [other for k, other in enumerate(layout) if k != axis]
    return len(set(layout[axis].segments)) == 1 and not any(other.is_split and other.dim == layout[axis].dim for other in others)


def leaving_layout(layout: Layout, value: TensorInfo, wants_whole: bool, sizes: Sequence[int] = ()) -> Layout:
    """What leaves the program: whole, or (on request) split where it divides and is split in a way that DTensor can say."""
    whole = I if value.needs_grad else R
    if wants_whole or not value.shape:
        return (whole,) * len(layout)
    padded = {axis for axis, _ in padded_axes(value.shape, layout, sizes)} if sizes else set()
    return tuple(
        p if p.is_split and k not in padded and (not p.segments or _is_strided_shard(layout, k)) else whole for k, p in enumerate(layout)
    )


def find_segmentations(program: Program) -> dict[int, list[tuple[int, ...]]]:
    """Segments worth proposing for a dim, by its size: those that the graph's splits, concatenations and reshapes show."""
    found: dict[int, dict[tuple[int, ...], None]] = {}
    for node in program.nodes("op"):
        _, equation = bound_rule(node)
        if equation is None or facts(node).is_constant:
            continue
        for group in equation.joined:
            sizes = tuple(equation.sizes[name] for name in group)
            found.setdefault(sum(sizes), {})[sizes] = None
        for operand in (*equation.inputs, *equation.outputs):
            for k, dim in enumerate(operand.dims):
                if not operand.joined[k] and len(dim) > 1:
                    for segments in _products(equation, dim, is_leading=k == 0):
                        found.setdefault(sum(segments), {})[segments] = None
    return {size: [s for s in options if len(s) <= _MOST_SEGMENTS] for size, options in found.items()}


def _products(equation: Equation, dim: tuple[str, ...], is_leading: bool) -> Iterable[tuple[int, ...]]:
    """Segments that splitting an inner factor of a product dim means."""
    total = 1
    for factor in dim:
        total *= equation.sizes[factor]
    before = 1
    for factor in dim[:-1]:
        before *= equation.sizes[factor]
        if 1 < before <= (_MOST_SEGMENTS if is_leading else _FEW_SEGMENTS):
            yield (total // before,) * before
