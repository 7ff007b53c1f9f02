"""What a row of the op table says, and the call that it is read for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from autoshard.equations import Equation, bind


def is_differentiable(dtype: torch.dtype) -> bool:
    """Whether values of this dtype can have a gradient."""
    return dtype.is_floating_point or dtype.is_complex


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a tensor, and whether a gradient flows to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool = False

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """One use of an op: its arguments by schema name (tensors as TensorInfo), and its tensor operands in schema order."""

    op: str
    arguments: Mapping[str, Any]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


Sized = tuple[str, Mapping[str, int]]
Limited = tuple[str, Mapping[str, int], Mapping[str, int]]  # also the most pieces of some factors: see Equation.limits
Builder = Callable[[Call], "str | Sized | Limited"]


@dataclass(frozen=True)
class Lowering:
    """`function` of autoshard.runtime replaces the op where a factor named in `axes` is split.

    It takes the op's own arguments and, per entry of `axes` (factor without its number -> keyword, or several), the mesh axes
    that split the factor. Factors in `settled` leave outputs that lack them I rather than P: the lowering sums inside.
    `ordered` factors cannot be split in segments: the lowering counts positions from the rank's number.
    `uneven` factors may be padded: the lowering then takes a keyword `*_sizes` beside its `*_axes`, the global length per axis
    (0 where it divides). Operands that it is linear in are zero at padding, unless it `skips_padding` of that factor by itself.
    `lone_sample`: it replaces the op also where a rank holds one sample, without axes: torch's own gradient is wrong there.
    """

    function: str
    axes: Mapping[str, str]
    settled: frozenset[str] = frozenset()
    ordered: frozenset[str] = frozenset()
    uneven: frozenset[str] = frozenset()
    skips_padding: frozenset[str] = frozenset()
    lone_sample: bool = False


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    equation: str | Builder
    lowering: Lowering | None = None
    shape: str | None = None  # argument that holds the output's shape
    piece: str | None = None  # argument that holds sizes along the dim that the op splits
    is_random: Callable[[Call], bool] = lambda call: False
    undrawn: frozenset[str] = frozenset()  # factors that the random numbers do not depend on
    bound: Literal["matmul", "memory"] = "memory"
    # multiplications of a call that is matmul bound, from the sizes of its factors and its operands and results
    products: Callable[[Mapping[str, int], Sequence[TensorInfo]], float] = lambda sizes, values: math.prod(sizes.values())
    backward: float | None = None  # seconds of all gradients per second forward, where it is not one for each operand

    def bind(self, call: Call) -> Equation:
        """The equation bound to the shapes of `call`. Raises RuleError when it does not fit."""
        text = self.equation if isinstance(self.equation, str) else self.equation(call)
        text, sizes, limits = (*text, {}, {})[:3] if isinstance(text, tuple) else (text, {}, {})
        equation = bind(text, [t.shape for t in call.inputs], [t.shape for t in call.outputs], sizes)
        termless = frozenset(k for k, t in enumerate((*call.inputs, *call.outputs)) if not _has_terms(t.dtype))
        if self.lowering is not None:
            lowered = frozenset(self.lowering.axes)
            equation = replace(equation, ordered=self.lowering.ordered, settled=self.lowering.settled)
            equation = replace(equation, lowered=lowered, uneven=self.lowering.uneven)
        return replace(equation, termless=termless, limits=limits)


def _has_terms(dtype: torch.dtype) -> bool:
    """A bool is no sum, and sums of small integers wrap around, which a later conversion to a wider type would see."""
    return is_differentiable(dtype) or dtype.itemsize >= 4


def rows(names: str, rule: Rule) -> dict[str, Rule]:
    """The same row for several ATen ops: `relu` is aten.relu.default, `add.Tensor` is aten.add.Tensor."""
    return {f"aten.{name}" if "." in name else f"aten.{name}.default": rule for name in names.split()}


def letters(count: int, letter: str = "d") -> list[str]:
    return [f"{letter}{k}" for k in range(count)]


def spell(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    return f"{', '.join(inputs) or 'z*'} -> {', '.join(outputs)}"  # an only operand without dims cannot be written as nothing


def dims_of(call: Call, argument: str, ndim: int) -> list[int]:
    """Dims that an int, a list or None (all) names, counted from the front."""
    given = call.get(argument)
    listed = list(range(ndim)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    return sorted(dim % max(ndim, 1) for dim in listed)
