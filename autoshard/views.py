"""Writes through views: what a tensor holds after a view of it has got a new value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autoshard.ops.row import TensorInfo
from autoshard.program import arguments, facts, op_name

aten = torch.ops.aten
Make = Callable[[Any, tuple, TensorInfo], fx.Node]

_RESHAPES = """view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int unsqueeze.default squeeze.default
squeeze.dim squeeze.dims view_as.default reshape_as.default"""
_IS_RESHAPE = frozenset(f"aten.{name}" for name in _RESHAPES.split())
_SAME = """alias.default to.dtype to.dtype_layout to.device to.other type_as.default contiguous.default dropout.default
lift_fresh.default"""
_IS_SAME = frozenset(f"aten.{name}" for name in _SAME.split())
_OWN_INVERSE = frozenset({"aten.transpose.int", "aten.t.default", "aten.numpy_T.default"})
_SCATTERS = {
    "aten.select.int": aten.select_scatter.default,
    "aten.slice.Tensor": aten.slice_scatter.default,
    "aten.diagonal.default": aten.diagonal_scatter.default,
}
_SPLITS = frozenset({"aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default"})


def shares_memory(view: fx.Node, base: fx.Node) -> bool:
    """Whether a traced op, which may or may not return a view, did so: a reshape of a transposed tensor is a copy."""
    values = view.meta.get("val")
    first = values[0] if isinstance(values, (tuple, list)) else values
    return _storage(first) == _storage(base.meta.get("val"))


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def write_back(view: fx.Node, base: fx.Node, value: fx.Node, make: Make) -> fx.Node | None:
    """The new value of `base` after the traced `view` of it has become `value`; None where that cannot be said.

    base, value: nodes of the new graph. make(target, args, info) adds a node there.
    """
    info = facts(base).value
    if view.target is operator.getitem:
        return _write_piece(view, base, value, make)
    name, rest = op_name(view), list(arguments(view).values())[1:]
    if name in _IS_SAME:
        return value
    if name in _IS_RESHAPE:
        return make(aten.reshape.default, (value, list(info.shape)), info)
    if name in _OWN_INVERSE:
        return make(view.target, (value, *rest), info)
    if name == "aten.permute.default":
        order = [dim % len(info.shape) for dim in rest[0]]
        return make(aten.permute.default, (value, [order.index(dim) for dim in range(len(order))]), info)
    if name in _SCATTERS:
        return make(_SCATTERS[name], (base, value, *rest), info)
    return None


def _write_piece(view: fx.Node, base: fx.Node, value: fx.Node, make: Make) -> fx.Node | None:
    """Through one result of an op that takes a dim apart."""
    source, number = view.args
    assert isinstance(source, fx.Node)
    dim, info = arguments(source).get("dim", 0), facts(base).value
    assert isinstance(number, int)
    if op_name(source) == "aten.unbind.int":
        return make(aten.select_scatter.default, (base, value, dim, number), info)
    if op_name(source) not in _SPLITS:
        return None
    lengths = [part.shape[dim] for part in facts(source).values[: number + 1]]
    return make(aten.slice_scatter.default, (base, value, dim, sum(lengths[:-1]), sum(lengths)), info)
