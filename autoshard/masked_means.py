"""Means over labels that count, spelled out: the sum of the losses over their number, which arguments alone make.

`cross_entropy` and `nll_loss` with reduction "mean" divide by the number (or the weights) of the labels that are not ignored. Parts
of a batch have different numbers of those, so a mean of means would be wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autoshard.ops.row import TensorInfo
from autoshard.program import Program, arguments, facts, op_name, producer, set_argument, set_facts

aten = torch.ops.aten
MASKED_LOSSES = frozenset(f"aten.{name}.default" for name in ("cross_entropy_loss", "nll_loss", "nll_loss2d", "nll_loss_nd"))
_MEAN, _SUM = 1, 2


def spell_masked_means(program: Program) -> None:
    """Rewrite every mean over labels in the program as a sum and a division."""
    for node in program.nodes("op"):
        if op_name(node) in MASKED_LOSSES and arguments(node)["reduction"] == _MEAN:
            _spell(program, node)


def _spell(program: Program, node: fx.Node) -> None:
    given = arguments(node)
    target = given["target"]
    source, index = producer(target)
    value = facts(source).values[index]
    total = facts(node).value

    def add(op: Any, args: tuple, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> fx.Node:
        with program.graph.inserting_before(node):
            new = program.graph.create_node("call_function", op, args, {}, name=f"{node.name}_{name}")
        set_facts(new, replace(facts(node), values=(TensorInfo(shape, dtype),), autocast=()))
        return new

    if value.dtype.is_floating_point:  # probabilities: every row counts
        number: Any = math.prod(value.shape) // value.shape[1 if len(value.shape) > 1 else 0]
    else:
        counted = add(aten.ne.Scalar, (target, given["ignore_index"]), value.shape, torch.bool, "counted")
        if isinstance(given["weight"], fx.Node):
            weight = facts(given["weight"]).value
            none = add(aten.zeros_like.default, (target,), value.shape, value.dtype, "none")
            valid = add(aten.where.self, (counted, target, none), value.shape, value.dtype, "valid")
            weights = add(aten.index.Tensor, (given["weight"], [valid]), value.shape, weight.dtype, "weights")
            kept = add(aten.mul.Tensor, (weights, counted), value.shape, weight.dtype, "kept")
            number = add(aten.sum.default, (kept,), (), weight.dtype, "number")
        else:
            number = add(aten.sum.default, (counted,), (), torch.int64, "number")
    set_argument(node, "reduction", _SUM)
    with program.graph.inserting_after(node):
        mean = program.graph.create_node("call_function", aten.div.Tensor, (node, number), {}, name=f"{node.name}_mean")
    set_facts(mean, replace(facts(node), values=(total,), autocast=()))
    node.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)
