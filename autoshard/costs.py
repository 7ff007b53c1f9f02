"""Costs in seconds: ops by roofline, conversions by latency and bandwidth, forward and backward together.

    op          max(flops / rate, bytes / memory rate) + kernel latency, of the local shapes; backward costs as much per
                operand that needs a gradient (contractions) or per pass (the rest)
    conversion  latency + wire bytes / axis rate, each way that communicates; local copies by memory rate
    parameter   optimizer step: 7 passes over the local bytes (read and write parameter and two moments, read gradient)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import fx

from autoshard.conversions import BY_NAME, COMMUNICATES, WIRE, Step, replace_axis, routes, without_gradient
from autoshard.equation_builders import TensorInfo
from autoshard.equations import Equation, Strategy
from autoshard.hardware import Hardware
from autoshard.mesh import MeshSpec
from autoshard.placements import Layout, local_shape
from autoshard.program import Program, facts
from autoshard.rules import Rule

OPTIMIZER_PASSES = 7
STATE_TENSORS = 4  # parameter, gradient and two moments
_IS_VIEW = ("view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "chunk", "unbind", "detach", "alias", "t.")


@dataclass(frozen=True)
class CostModel:
    """Prices of one mesh on one kind of hardware."""

    mesh: MeshSpec
    hardware: Hardware

    @cached_property
    def axis_rates(self) -> tuple[float, ...]:
        return self.hardware.axis_bytes_per_s(self.mesh.shape)

    def local_bytes(self, value: TensorInfo, layout: Layout) -> float:
        shape = local_shape(value.shape, layout, self.mesh.shape)
        assert shape is not None, (value, layout)
        return math.prod(shape) * value.dtype.itemsize

    def op_s(self, name: str, rule: Rule | None, equation: Equation | None, values: Sequence[TensorInfo], layouts: Sequence[Layout], split: float) -> float:
        """Seconds of one op, forward and backward. `values`, `layouts`: its inputs and outputs; `split`: ranks sharing the work."""
        hardware = self.hardware
        if name.startswith("aten.") and name[5:].startswith(_IS_VIEW):
            return 0.0
        moved = sum(self.local_bytes(value, layout) for value, layout in zip(values, layouts, strict=True))
        flops = 0.0
        if rule is not None and equation is not None and rule.bound == "matmul":
            flops = 2.0 * math.prod(equation.sizes.values()) / split
        once = max(flops / (hardware.flops_per_s * hardware.efficiency), moved / hardware.memory_bytes_per_s) + hardware.kernel_latency_s
        gradients = sum(value.needs_grad for value in values[: len(equation.inputs)]) if equation is not None else sum(v.needs_grad for v in values)
        return once * (1 + (gradients if flops else min(gradients, 1)))

    def step_s(self, step: Step, value: TensorInfo, layout: Layout) -> float:
        """Seconds of one conversion step, forward and, where a gradient flows, backward; `layout` is the one before it."""
        whole = self.whole_bytes(step, value, layout)
        directions = (step.row.forward, step.row.backward)[: 2 if value.needs_grad else 1]
        return sum(self.collective_s(name, whole, step.axis) for name in directions)

    def whole_bytes(self, step: Step, value: TensorInfo, layout: Layout) -> float:
        """Bytes of the value that the ranks of the step's axis hold together."""
        both = step.src.is_split and step.dst.is_split
        held = self.local_bytes(value, replace_axis(layout, step.axis, step.src if step.dst.is_split else step.dst))
        return held * self.mesh.shape[step.axis] if both else held

    def collective_s(self, name: str, whole_bytes: float, axis: int) -> float:
        """Seconds of one collective over a value that the axis holds `whole_bytes` of together."""
        n, hardware = self.mesh.shape[axis], self.hardware
        if n == 1 or name == "identity":
            return 0.0
        if name in COMMUNICATES:
            return hardware.collective_latency_s + WIRE[name](n) * whole_bytes / self.axis_rates[axis]
        return hardware.kernel_latency_s + whole_bytes / hardware.memory_bytes_per_s

    def route_s(self, route: Sequence[Step], value: TensorInfo, src: Layout) -> float:
        total = 0.0
        for step in route:
            total += self.step_s(step, value, src)
            src = replace_axis(src, step.axis, step.dst)
        return total

    def best_route(self, src: Layout, dst: Layout, value: TensorInfo) -> tuple[float, tuple[Step, ...]] | None:
        """Cheapest sequence of conversions and its seconds, or None where there is none."""
        return _best_route(self, src, dst, value)

    def parameter_s(self, value: TensorInfo, layout: Layout) -> float:
        """Optimizer step on one parameter."""
        if not value.needs_grad:
            return 0.0
        return OPTIMIZER_PASSES * self.local_bytes(value, layout) / self.hardware.memory_bytes_per_s


@lru_cache(maxsize=1 << 18)
def _best_route(model: CostModel, src: Layout, dst: Layout, value: TensorInfo) -> tuple[float, tuple[Step, ...]] | None:
    found = routes(src, dst, value.shape, model.mesh.shape, value.needs_grad)
    start = src if value.needs_grad else without_gradient(src)
    priced = [(model.route_s(route, value, start), route) for route in found]
    return min(priced, key=lambda pair: pair[0], default=None)


def split_of(strategies: Sequence[Strategy], sizes: Sequence[int]) -> float:
    """How many ranks share the work of an op under one strategy per axis."""
    return math.prod(n for strategy, n in zip(strategies, sizes, strict=True) if strategy.factor)


def wire_bytes(program: Program, node: fx.Node, costs: CostModel) -> tuple[float, float]:
    """Bytes that a rank sends in one conversion node: forward, and backward where a gradient flows."""
    known, before = facts(node), facts(node.args[0]).layout  # type: ignore[arg-type]
    axis = program.mesh.index(str(node.args[1]))
    n, row = program.mesh.shape[axis], BY_NAME[node.target.__name__]  # type: ignore[union-attr]
    step = Step(axis, before[axis], known.layout[axis])
    whole = costs.whole_bytes(step, known.value, before)
    return WIRE[row.forward](n) * whole, WIRE[row.backward](n) * whole if known.needs_grad else 0.0


def traffic(program: Program, costs: CostModel) -> dict[str, float]:
    """Bytes that a rank sends in one forward and backward pass, by collective, in conversion nodes."""
    moved: dict[str, float] = {}
    for node in program.nodes("conversion"):
        row = BY_NAME[node.target.__name__]  # type: ignore[union-attr]
        for name, count in zip((row.forward, row.backward), wire_bytes(program, node, costs), strict=True):
            if count:
                moved[name] = moved.get(name, 0.0) + count
    return moved
