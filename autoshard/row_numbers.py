"""Indices that count the rows, `x[torch.arange(len(x)), last]`, spelled as a gather along the dims that are left.

A microbatch has other row numbers than the batch, so such an index cannot be cut with it; a gather takes each row's own entries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autoshard.ops.row import TensorInfo
from autoshard.program import Program, facts, op_name, producer, set_facts

aten = torch.ops.aten
_SAME_NUMBERS = frozenset(
    f"aten.{name}" for name in ("unsqueeze.default", "view.default", "reshape.default", "_to_copy.default", "to.dtype")
)


def spell_row_numbers(program: Program) -> None:
    """Rewrite every index by the number of the row, and at most one index tensor beside it, in the program."""
    for node in program.nodes("op"):
        if op_name(node) == "aten.index.Tensor":
            rows, *others = tuple(node.args[1])  # type: ignore[arg-type]
            if isinstance(rows, fx.Node) and len(others) < 2 and _counts_rows(rows, _value(node.args[0]).shape[0]):  # type: ignore[arg-type]
                _spell(program, node, others)


def _value(node: fx.Node) -> TensorInfo:
    source, index = producer(node)
    return facts(source).values[index]


def _counts_rows(index: fx.Node, length: int) -> bool:
    """Whether an index is 0, 1, .. length - 1 along its first dim."""
    if _value(index).shape not in ((length,), (length, 1)):
        return False
    while op_name(index) in _SAME_NUMBERS:
        index = index.all_input_nodes[0]
    numbers = tuple(index.args)
    return op_name(index).startswith("aten.arange.") and numbers in ((length,), (0, length), (0, length, 1))


def _spell(program: Program, node: fx.Node, others: list[Any]) -> None:
    x, rows = node.args[0], node.args[1][0]  # type: ignore[index]
    assert isinstance(x, fx.Node)
    assert isinstance(rows, fx.Node)
    shape, result = _value(x).shape, facts(node).value

    def add(op: Any, args: tuple, value: TensorInfo, name: str) -> fx.Node:
        with program.graph.inserting_before(node):
            new = program.graph.create_node("call_function", op, args, {}, name=f"{node.name}_{name}")
        set_facts(new, replace(facts(node), values=(value,), autocast=()))
        return new

    if not others:
        if len(_value(rows).shape) > 1:
            return
        new = add(aten.clone.default, (x,), result, "rows")
    else:
        entries = _value(others[0]) if isinstance(others[0], fx.Node) else None
        if entries is None or entries.dtype == torch.bool or len(entries.shape) > 2 or entries.shape[:1] != shape[:1]:
            return
        if len(entries.shape) != len(_value(rows).shape):
            return
        depth = 1 if len(entries.shape) == 1 else entries.shape[1]
        inner, whole = (shape[0], depth, *[1] * (len(shape) - 2)), (shape[0], depth, *shape[2:])
        negative = add(aten.lt.Scalar, (others[0], 0), replace(entries, dtype=torch.bool), "negative")
        shifted = add(aten.add.Scalar, (others[0], shape[1]), entries, "shifted")
        found = add(aten.where.self, (negative, shifted, others[0]), entries, "entry")
        found = add(aten.reshape.default, (found, list(inner)), replace(entries, shape=inner), "entries")
        found = add(aten.expand.default, (found, list(whole)), replace(entries, shape=whole), "places")
        new = add(aten.gather.default, (x, 1, found), replace(result, shape=whole), "gathered")
        if len(entries.shape) == 1:
            new = add(aten.squeeze.dim, (new, 1), result, "rows")
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
