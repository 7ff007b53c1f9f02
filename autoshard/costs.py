"""Costs in seconds: ops by roofline, conversions by latency and bandwidth; forward, backward and optimizer apart.

op          forward   max(flops / rate of the dtype, bytes / memory rate) + kernel latency, of the local shapes
            backward  of a contraction: as much again per operand that it multiplies and that needs a gradient, and one pass
                      over the bytes per additive one (a bias), or what the rule says (attention: 2.5); of any other op: as much as
                      forward, where a gradient flows
collective  fixed + bytes * rate by algorithm, the cheapest counts: autoshard.collectives
conversion  its collectives, each way; local copies by memory rate
parameter   optimizer step: passes over the local bytes, see OPTIMIZERS

Views cost nothing, nor do ops and conversions of empty tensors, nor conversions on an axis of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from autoshard.collectives import AxisLinks, Terms, axis_links, collective_terms
from autoshard.conversions import COMMUNICATES, Conversion, Step, replace_axis, routes, without_gradient
from autoshard.equations import Equation
from autoshard.errors import InputError
from autoshard.hardware import Hardware
from autoshard.measured import op_key
from autoshard.mesh import MeshSpec
from autoshard.ops.row import Call, Rule, TensorInfo
from autoshard.placements import Layout, R, local_shape, padded_piece

Optimizer = Literal["adamw", "adam", "sgd", "sgd_momentum", "adafactor"]


@dataclass(frozen=True)
class OptimizerCost:
    """passes: how often a step reads or writes as many bytes as the parameter has. state: numbers kept for a local shape."""

    passes: int
    state: Callable[[Sequence[int]], float]


def _factored(shape: Sequence[int]) -> float:
    """Numbers of a second moment that is kept as row and column means (Adafactor); whole for vectors."""
    return math.prod(shape) if len(shape) < 2 else math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))


# Counted from torch.optim's update rules, each tensor read or written once where it is used (what a fused kernel moves).
OPTIMIZERS: Mapping[str, OptimizerCost] = {
    "adamw": OptimizerCost(7, lambda shape: 2 * math.prod(shape)),  # reads parameter, gradient, two moments; writes all but the gradient
    "adam": OptimizerCost(7, lambda shape: 2 * math.prod(shape)),
    "sgd": OptimizerCost(3, lambda shape: 0),  # reads parameter and gradient, writes the parameter
    "sgd_momentum": OptimizerCost(5, lambda shape: math.prod(shape)),  # and reads and writes the momentum
    # reads the gradient for the row means, the column means and the update, writes the update, reads it for its norm and with
    # the parameter, reads that for its norm too, and writes it
    "adafactor": OptimizerCost(8, _factored),
}
_IS_VIEW = (
    "view",
    "reshape",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "split",
    "chunk",
    "unbind",
    "detach",
    "alias",
    "t.",
)


@dataclass(frozen=True)
class CostModel:
    """Prices of one mesh on one kind of hardware."""

    mesh: MeshSpec
    hardware: Hardware

    @cached_property
    def links(self) -> tuple[AxisLinks, ...]:
        """How each axis lies on the links."""
        whole = self.mesh.inside or self.mesh
        known = ((whole.shape, whole.index(name)) if name in whole.axes else ((1,), 0) for name in self.mesh.axes)
        return tuple(axis_links(self.hardware, shape, axis) for shape, axis in known)

    @cached_property
    def axis_rates(self) -> tuple[float, ...]:
        """Bytes/s of a ring on each axis."""
        return tuple(links.ring_bytes_per_s for links in self.links)

    def local_bytes(self, value: TensorInfo, layout: Layout) -> float:
        """Bytes that each rank holds of a value in a layout that fits it, padding included."""
        held = value.nbytes / math.prod([n for placement, n in zip(layout, self.mesh.shape, strict=True) if placement.is_split])
        if self.pads(value.shape):  # looked up: this is called for every candidate
            held *= math.prod(stretch(value.shape, p.dim, n) for p, n in zip(layout, self.mesh.shape, strict=True) if p.is_split)
        return held

    def local_shapes(self, values: Sequence[TensorInfo], layouts: Sequence[Layout]) -> list[tuple[int, ...]]:
        """What each rank holds, padding included."""
        return [local_shape(value.shape, layout, self.mesh.shape) or () for value, layout in zip(values, layouts, strict=False)]

    def copy_s(self, value: TensorInfo, layout: Layout) -> float:
        """Seconds of reading and writing a value once, and its gradient where it has one."""
        device = self.hardware.device
        once = 2 * self.local_bytes(value, layout) / device.memory_bytes_per_s + device.kernel_latency_s
        return once * (2 if value.needs_grad else 1)

    def pads(self, shape: tuple[int, ...]) -> bool:
        """Whether some axis splits some dim of this shape unevenly."""
        if shape not in self._pads:
            self._pads[shape] = any(size % n and padded_piece(size, n) for size in shape for n in self.mesh.shape)
        return self._pads[shape]

    @cached_property
    def _pads(self) -> dict[tuple[int, ...], bool]:
        return {}

    def op_s(
        self,
        name: str,
        rule: Rule | None,
        equation: Equation | None,
        values: Sequence[TensorInfo],
        layouts: Sequence[Layout],
        split: float,
        call: Call | None = None,
    ) -> float:
        """Seconds of one op, forward and backward; arguments as in op_times."""
        return sum(self.op_times(name, rule, equation, values, layouts, split, call))

    def op_times(
        self,
        name: str,
        rule: Rule | None,
        equation: Equation | None,
        values: Sequence[TensorInfo],
        layouts: Sequence[Layout],
        split: float,
        call: Call | None = None,
    ) -> tuple[float, float]:
        """Seconds of one op: forward, backward. `values`, `layouts`: its inputs and outputs; `split`: ranks sharing the work.

        call: the use of the op, by which a measured time is found where the hardware has one.
        """
        is_view = name.startswith("aten.") and name[5:].startswith(_IS_VIEW) and "_scatter" not in name
        if is_view or name == "either":
            return 0.0, 0.0
        sizes = [self.local_bytes(value, layout) for value, layout in zip(values, layouts, strict=True)]
        moved = sum(sizes)
        if not moved:
            return 0.0, 0.0
        if call is not None and self.hardware.measured is not None and self.hardware.measured.ops:
            found = self.hardware.measured.ops.get(op_key(call, self.local_shapes(call.inputs, layouts)))
            if found is not None:
                return found
        device = self.hardware.device
        memory_s, latency_s = moved / device.memory_bytes_per_s, device.kernel_latency_s
        if rule is None or equation is None or rule.bound != "matmul":
            inputs = values if equation is None else values[: len(equation.inputs)]
            forward = memory_s + latency_s
            return forward, forward if any(value.needs_grad for value in inputs) else 0.0
        flops = 2.0 * rule.products(equation.sizes, values) / split
        forward = self._slower(flops / self._flops_per_s(values[0].dtype), memory_s) + latency_s
        if rule.backward is not None:
            return forward, forward * rule.backward if any(value.needs_grad for value in values[: len(equation.inputs)]) else 0.0
        backward = 0.0
        for operand, value, held in zip(equation.inputs, values, sizes, strict=False):
            if value.needs_grad:  # a bias: its gradient is a sum over the output's
                summed_s = (sum(sizes[len(equation.inputs) :]) + held) / device.memory_bytes_per_s + latency_s
                backward += summed_s if operand.is_additive else forward
        return forward, backward

    def _slower(self, flops_s: float, memory_s: float) -> float:
        """The roofline."""
        return max(flops_s, memory_s)

    def _flops_per_s(self, dtype: torch.dtype) -> float:
        rate = self._rates.get(dtype)
        if rate is None:
            rate = self._rates[dtype] = self.hardware.device.reached_flops_per_s(dtype)
        return rate

    @cached_property
    def _rates(self) -> dict[torch.dtype, float]:
        return {}

    def whole_bytes(self, step: Step, value: TensorInfo, layout: Layout) -> float:
        """Bytes of the value that the ranks of the step's axis hold together, padding included."""
        held = self.local_bytes(value, replace_axis(layout, step.axis, R))
        for placement in (step.src, step.dst):
            held *= stretch(value.shape, placement.dim, self.mesh.shape[step.axis]) if placement.is_split else 1.0
        return held

    def collective_terms(self, name: str, axis: int) -> tuple[Terms, ...]:
        """Of every algorithm for a collective: fixed seconds, and seconds per byte that the ranks of the axis hold together."""
        key = (name, axis)
        if key not in self._collectives:
            self._collectives[key] = collective_terms(self.hardware, self.links[axis], name)
        return self._collectives[key]

    @cached_property
    def _collectives(self) -> dict[tuple[str, int], tuple[Terms, ...]]:
        return {}

    def collective_s(self, name: str, axis: int, whole_bytes: float) -> float:
        """Seconds of one collective on `whole_bytes`, what the ranks of the axis hold together, by its best algorithm."""
        if not whole_bytes:
            return 0.0
        return min(fixed + per_byte * whole_bytes for fixed, per_byte in self.collective_terms(name, axis))

    def row_terms(self, row: Conversion, axis: int, needs_grad: bool) -> tuple[Terms, ...]:
        """Of a conversion as of collective_terms: forward, and backward where a gradient flows; both move the same bytes."""
        terms = self.collective_terms(row.forward, axis)
        if not needs_grad:
            return terms
        back = self.collective_terms(row.backward, axis)
        many = max(len(terms), len(back))  # the same algorithm is best both ways; what has one choice takes it
        terms, back = (side * (many // len(side)) for side in (terms, back))
        return tuple((a[0] + b[0], a[1] + b[1]) for a, b in zip(terms, back, strict=True))

    def best_route(self, src: Layout, dst: Layout, value: TensorInfo) -> tuple[float, tuple[Step, ...]] | None:
        """Cheapest sequence of conversions and its seconds, forward and (where a gradient flows) backward; None without one."""
        best = None
        for fixed, per_byte, route in self.priced_routes(src, dst, value):
            seconds = fixed + per_byte * value.nbytes if value.nbytes else 0.0
            if best is None or seconds < best[0]:
                best = (seconds, route)
        return best

    def priced_routes(self, src: Layout, dst: Layout, value: TensorInfo) -> tuple[tuple[float, float, tuple[Step, ...]], ...]:
        """Every route with its fixed seconds and seconds per byte of the value; they depend on the shape only where pieces nest.

        A route stands once for every choice of algorithms, so that the least of all is the price at any size.
        """
        table = self._routes
        key = (src, dst, value.needs_grad, value.shape if self.pads(value.shape) else None)
        if key not in table:
            split = {(p.dim, axis) for layout in (src, dst) for axis, p in enumerate(layout) if p.is_split}
            nests = len({dim for dim, _ in split}) < len(split)
            table[key] = {} if nests else _priced_routes(self, src, dst, value)
        found = table[key]
        if isinstance(found, dict):
            if value.shape not in found:
                found[value.shape] = _priced_routes(self, src, dst, value)
            return found[value.shape]
        return found

    @cached_property
    def _routes(self) -> dict:
        return {}

    def communicates(self, src: Layout, dst: Layout, value: TensorInfo) -> bool:
        """Whether converting moves bytes between ranks, forward or backward."""
        best = self.best_route(src, dst, value)
        directions = [
            name for step in (best[1] if best else ()) for name in (step.row.forward, step.row.backward)[: 2 if value.needs_grad else 1]
        ]
        return best is None or any(name in COMMUNICATES for name in directions)

    def parameter_s(self, value: TensorInfo, layout: Layout, optimizer: Optimizer = "adamw") -> float:
        """Optimizer step on one parameter. Raises InputError for an optimizer that is not in OPTIMIZERS."""
        if not value.needs_grad:
            return 0.0
        return optimizer_cost(optimizer).passes * self.local_bytes(value, layout) / self.hardware.device.memory_bytes_per_s

    def state_bytes(self, value: TensorInfo, layout: Layout, optimizer: Optimizer = "adamw") -> float:
        """Bytes that a rank keeps for a parameter beside it and its gradient: the optimizer's states, in the parameter's dtype."""
        if not value.needs_grad:
            return 0.0
        local = [self._local_length(value.shape, dim, layout) for dim in range(len(value.shape))]
        return optimizer_cost(optimizer).state(local) * value.dtype.itemsize

    def _local_length(self, shape: tuple[int, ...], dim: int, layout: Layout) -> int:
        ways = math.prod(n for placement, n in zip(layout, self.mesh.shape, strict=True) if placement.is_split and placement.dim == dim)
        return -(-shape[dim] // ways)


def optimizer_cost(name: str) -> OptimizerCost:
    """The row of OPTIMIZERS. Raises InputError."""
    if name not in OPTIMIZERS:
        raise InputError(f"no optimizer {name!r} is known to the cost model; there are {', '.join(get_args(Optimizer))}")
    return OPTIMIZERS[name]


def _priced_routes(model: CostModel, src: Layout, dst: Layout, value: TensorInfo) -> tuple[tuple[float, float, tuple[Step, ...]], ...]:
    unit = TensorInfo(value.shape if model.pads(value.shape) else (), torch.uint8, value.needs_grad)  # one byte, unless padding counts
    start = src if value.needs_grad else without_gradient(src)
    priced = []
    for route in routes(src, dst, value.shape, model.mesh.shape, value.needs_grad):
        totals: list[Terms] = [(0.0, 0.0)]
        layout = start
        for step in route:
            whole = model.whole_bytes(step, unit, layout) / unit.nbytes
            terms = model.row_terms(step.row, step.axis, value.needs_grad)
            totals = [(total[0] + fixed, total[1] + per_byte * whole) for total in totals for fixed, per_byte in terms]
            layout = replace_axis(layout, step.axis, step.dst)
        priced += [(*total, route) for total in totals]
    return tuple(priced)


def split_of(equation: Equation | None, factors: Sequence[str], sizes: Sequence[int]) -> float:
    """How many ranks share the work of an op whose `factors` are split, one per axis; work on padding is shared by none."""
    split = [(factor, n) for factor, n in zip(factors, sizes, strict=True) if factor]
    return math.prod(n / (stretch((equation.sizes.get(factor, n),), 0, n) if equation is not None else 1.0) for factor, n in split)


def stretch(shape: Sequence[int], dim: int, n: int) -> float:
    """By how much padding lengthens a dim that `n` ranks split; 1.0 where it divides. An empty shape stands for any that divides."""
    if not shape or not shape[dim] % n:
        return 1.0
    return -(-shape[dim] // n) * n / shape[dim]
