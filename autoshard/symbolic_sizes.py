"""What a lowering sends, in bytes as expressions: it is run on tensors without memory whose sizes are symbolic.

torch.export's own symbolic integers do the arithmetic. Where the lowering asks for the number itself (a loop over the
ranks of a ring), the size is no symbol any more, and that is an error rather than an expression that holds at one size only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from autoshard.errors import InputError
from autoshard.ops.row import Call
from autoshard.runtime import Collective
from autoshard.symbolic import SizeReader
from autoshard.torch_internals import FakeTensorMode, ShapeEnv, new_symbolic_integer
from autoshard.traffic import MeteredAxis, run_lowering

SymbolicSent = tuple[str, str, sympy.Expr]  # axis, collective, bytes that the axis holds together
_STRANGER = 3  # dynamic sizes are traced at a multiple of the example's, so that no piece has length 1


class SymbolicAxis(MeteredAxis):
    """A MeteredAxis whose size is a symbolic integer."""

    def convert(self, x: torch.Tensor, forward: Collective, backward: Collective) -> torch.Tensor:
        n, dim = self.size, forward.dim
        whole = x.numel() * x.element_size() * (n if forward.name in ("all_gather", "all_to_all", "rotate") else 1)
        self.sent += [(self.name, name, whole) for name in ((forward.name, backward.name) if x.requires_grad else (forward.name,))]
        if forward.size or forward.cut_size:
            raise _Padded
        shape = list(x.shape)
        if forward.name == "all_gather":
            shape[dim] = shape[dim] * n
        elif forward.name in ("reduce_scatter", "slice"):
            shape[dim] = shape[dim] // n
        else:
            return x
        return x.new_empty(shape).requires_grad_(x.requires_grad)


class _Padded(Exception):
    """A dim that does not divide is converted inside a lowering."""


@dataclass(frozen=True)
class SizeTrace:
    """One use of a lowering. axes: sizes as expressions; numbers: in the example, as `examples` of the dynamic sizes."""

    axes: Mapping[str, sympy.Expr]
    numbers: Mapping[str, int]
    examples: Mapping[sympy.Symbol, int]
    where: str

    def sent(self, function: str, call: Call, shapes: Sequence[Sequence[sympy.Expr]], split: Mapping[str, Any]) -> list[SymbolicSent]:
        """What `function` sends for `call` with operands of local `shapes`; split: keyword -> axes. Raises InputError."""
        env = ShapeEnv()
        hints = {symbol: number * _STRANGER for symbol, number in self.examples.items()}
        hints |= {size: self.numbers[axis] for axis, size in self.axes.items() if size.is_Symbol}
        integers = {symbol: new_symbolic_integer(env, str(symbol), hint) for symbol, hint in hints.items()}
        sent: list[Any] = []
        try:
            with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
                operands = [
                    torch.empty([_number(length, integers) for length in shape], dtype=info.dtype, requires_grad=info.needs_grad)
                    for shape, info in zip(shapes, call.inputs, strict=False)
                ]
                sizes = {name: _number(size, integers) for name, size in self.axes.items()}
                axes = {key: tuple(SymbolicAxis(name, sizes[name], sent) for name in names) for key, names in split.items()}
                run_lowering(function, call, operands, axes)
        except _Padded as error:
            raise InputError(f"{self.where} converts a dim that does not divide inside; its cost has no expression") from error
        lost = [str(symbol) for symbol, value in integers.items() if env.replacements.get(value.node.expr, value.node.expr).is_number]
        if lost and sent:  # what sends nothing may ask as it likes: a mean divides by how many ranks there are
            raise InputError(
                f"what {self.where} sends depends on {lost[0]} in a way that no expression says (a ring takes a step per rank); "
                f"keep it a number: symbolic(fixed=({lost[0]!r},))"
            )
        reader = SizeReader({value.node.expr: str(symbol) for symbol, value in integers.items()})
        return [(axis, name, self._exact(whole, reader)) for axis, name, whole in sent]

    def _exact(self, whole: Any, reader: SizeReader) -> sympy.Expr:
        """Bytes without the rounding of divisions, which are exact where pieces are even."""
        expr = sympy.Integer(whole) if isinstance(whole, int) else reader.rebuild(whole.node.expr)
        return expr.replace(sympy.floor, lambda inner: inner)


def _number(length: sympy.Expr, integers: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression as torch's symbolic integer; divisions of sizes among ranks are exact."""
    above, below = sympy.fraction(sympy.together(length))
    if not length.free_symbols:
        return int(length)
    return _product(above, integers) // _product(below, integers)


def _product(expr: sympy.Expr, integers: Mapping[sympy.Symbol, Any]) -> Any:
    return sympy.lambdify(list(integers), expr, modules=[{"floor": lambda x: x, "ceiling": lambda x: x}])(*integers.values())
