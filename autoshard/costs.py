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
from functools import cached_property

import torch

from autoshard.conversions import COMMUNICATES, WIRE, Step, replace_axis, routes, without_gradient
from autoshard.equations import Equation
from autoshard.hardware import Hardware
from autoshard.mesh import MeshSpec
from autoshard.ops.row import Rule, TensorInfo
from autoshard.placements import Layout, R, padded_piece

OPTIMIZER_PASSES = 7
STATE_TENSORS = 4  # parameter, gradient and two moments
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
    def axis_rates(self) -> tuple[float, ...]:
        return self.hardware.axis_bytes_per_s(self.mesh.shape)

    def local_bytes(self, value: TensorInfo, layout: Layout) -> float:
        """Bytes that each rank holds of a value in a layout that fits it, padding included."""
        held = value.nbytes / math.prod([n for placement, n in zip(layout, self.mesh.shape, strict=True) if placement.is_split])
        if self.pads(value.shape):  # looked up: this is called for every candidate
            held *= math.prod(stretch(value.shape, p.dim, n) for p, n in zip(layout, self.mesh.shape, strict=True) if p.is_split)
        return held

    def copy_s(self, value: TensorInfo, layout: Layout) -> float:
        """Seconds of reading and writing a value once, and its gradient where it has one."""
        once = 2 * self.local_bytes(value, layout) / self.hardware.memory_bytes_per_s + self.hardware.kernel_latency_s
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
        self, name: str, rule: Rule | None, equation: Equation | None, values: Sequence[TensorInfo], layouts: Sequence[Layout], split: float
    ) -> float:
        """Seconds of one op, forward and backward. `values`, `layouts`: its inputs and outputs; `split`: ranks sharing the work."""
        hardware = self.hardware
        if name.startswith("aten.") and name[5:].startswith(_IS_VIEW) and "_scatter" not in name:
            return 0.0
        moved = sum(self.local_bytes(value, layout) for value, layout in zip(values, layouts, strict=True))
        flops = 0.0
        if rule is not None and equation is not None and rule.bound == "matmul":
            flops = 2.0 * rule.products(equation.sizes, values) / split
        once = max(flops / (hardware.flops_per_s * hardware.efficiency), moved / hardware.memory_bytes_per_s) + hardware.kernel_latency_s
        gradients = (
            sum(value.needs_grad for value in values[: len(equation.inputs)]) if equation is not None else sum(v.needs_grad for v in values)
        )
        return once * (1 + (gradients if flops else min(gradients, 1)))

    def whole_bytes(self, step: Step, value: TensorInfo, layout: Layout) -> float:
        """Bytes of the value that the ranks of the step's axis hold together, padding included."""
        held = self.local_bytes(value, replace_axis(layout, step.axis, R))
        for placement in (step.src, step.dst):
            held *= stretch(value.shape, placement.dim, self.mesh.shape[step.axis]) if placement.is_split else 1.0
        return held

    def collective_terms(self, name: str, axis: int) -> tuple[float, float]:
        """Seconds of one collective: fixed, and per byte of the value that the ranks of the axis hold together."""
        n, hardware = self.mesh.shape[axis], self.hardware
        if n == 1 or name == "identity":
            return 0.0, 0.0
        if name in COMMUNICATES:
            return hardware.collective_latency_s, WIRE[name](n) / self.axis_rates[axis]
        return hardware.kernel_latency_s, 1 / hardware.memory_bytes_per_s

    def best_route(self, src: Layout, dst: Layout, value: TensorInfo) -> tuple[float, tuple[Step, ...]] | None:
        """Cheapest sequence of conversions and its seconds, forward and (where a gradient flows) backward; None without one."""
        best = None
        for fixed, per_byte, route in self.priced_routes(src, dst, value):
            seconds = fixed + per_byte * value.nbytes
            if best is None or seconds < best[0]:
                best = (seconds, route)
        return best

    def priced_routes(self, src: Layout, dst: Layout, value: TensorInfo) -> tuple[tuple[float, float, tuple[Step, ...]], ...]:
        """Every route with its fixed seconds and seconds per byte of the value; they depend on the shape only where pieces nest."""
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

    def parameter_s(self, value: TensorInfo, layout: Layout) -> float:
        """Optimizer step on one parameter."""
        if not value.needs_grad:
            return 0.0
        return OPTIMIZER_PASSES * self.local_bytes(value, layout) / self.hardware.memory_bytes_per_s


def _priced_routes(model: CostModel, src: Layout, dst: Layout, value: TensorInfo) -> tuple[tuple[float, float, tuple[Step, ...]], ...]:
    unit = TensorInfo(value.shape if model.pads(value.shape) else (), torch.uint8, value.needs_grad)  # one byte, unless padding counts
    start = src if value.needs_grad else without_gradient(src)
    priced = []
    for route in routes(src, dst, value.shape, model.mesh.shape, value.needs_grad):
        fixed = per_byte = 0.0
        layout = start
        for step in route:
            whole = model.whole_bytes(step, unit, layout) / unit.nbytes
            for name in (step.row.forward, step.row.backward)[: 2 if value.needs_grad else 1]:
                terms = model.collective_terms(name, step.axis)
                fixed, per_byte = fixed + terms[0], per_byte + terms[1] * whole
            layout = replace_axis(layout, step.axis, step.dst)
        priced.append((fixed, per_byte, route))
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
