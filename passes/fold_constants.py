"""fold_constants: mark what depends on no input and no parameter, and turn a causal mask back into `is_causal`.

A constant stays in the graph as the ops that make it: programs compute it once, before the first step. A boolean mask
that evaluates to the lower triangle and feeds attention is replaced by the flag that fused kernels understand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard import autocast
from autoshard.branches import is_either
from autoshard.program import Program, arguments, facts, is_sized, op_name, set_argument, tensor_operands, writes_statistics

_MOST_ENTRIES = 2**28  # of a constant that is computed: a causal mask of 16,384 positions
_FEW_ENTRIES = 2**24  # of a constant that is searched for repeats
_ALSO_POINTWISE = ("aten.__and__.Tensor", "aten.__or__.Tensor", "aten.__xor__.Tensor")  # torch does not tag these
_MASK_BLOCK = 2**20  # entries of a mask that are compared at once


@dataclass(frozen=True)
class FoldConstants:
    """Mark constant nodes; rewrite `attn_mask=<lower triangle>` to `is_causal=True`."""

    def __call__(self, program: Program) -> Program:
        written = {node.args[0] for node in program.nodes("update")}
        for node in program.nodes("op"):
            if writes_statistics(node):
                written |= set(node.args[3:5])
        for node in program.nodes("buffer"):
            facts(node).is_constant = node not in written and not facts(node).needs_grad
        for node in program.nodes("op", "projection"):
            fixed = all(facts(operand).is_constant for operand in tensor_operands(node))
            fixed = fixed and not is_either(node) and not is_sized(node)  # a table would be that of the example's sizes
            facts(node).is_constant = fixed and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
            facts(node).branch = () if facts(node).is_constant else facts(node).branch
        _restore_causal(program)
        _drop_unused_constants(program)
        return program


def _restore_causal(program: Program) -> None:
    known: dict[fx.Node, Any] = {}
    verdicts: dict[fx.Node, bool] = {}  # one mask serves every layer
    for node in program.nodes("op"):
        if op_name(node) != "aten.scaled_dot_product_attention.default":
            continue
        bound = arguments(node)
        mask, query, key = bound["attn_mask"], bound["query"], bound["key"]
        square = facts(query).value.shape[-2] == facts(key).value.shape[-2]
        if not isinstance(mask, fx.Node) or not facts(mask).is_constant or not square or bound["is_causal"]:
            continue
        if mask not in verdicts:
            verdicts[mask] = _is_causal(mask, known)
        if verdicts[mask]:
            set_argument(node, "attn_mask", None)
            set_argument(node, "is_causal", True)


def _is_causal(mask: fx.Node, known: dict[fx.Node, Any]) -> bool:
    info = facts(mask).value
    if info.dtype != torch.bool or info.shape[-2] != info.shape[-1]:
        return False
    value = evaluate(mask, known)
    if value is None:
        return False
    distinct = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride()[:-2])]
    length = info.shape[-1]
    rows = _MASK_BLOCK // length + 1
    for start in range(0, length, rows):  # in blocks: a whole triangle beside the mask would double the memory
        block = distinct[..., start : start + rows, :]
        if not bool((block == torch.ones(block.shape[-2:], dtype=torch.bool).tril(start)).all()):
            return False
    return True


def evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a constant node on the CPU; `known` caches values.

    None where it depends on a buffer, or is larger than what is worth computing. Dims along which a value does not change have
    stride 0, so that a mask that is the same for every sequence of a batch is computed for one.
    """
    order: list[fx.Node] = []
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in known:
            order.append(current)
            pending += current.all_input_nodes
    for current in reversed(order):
        if current not in known:
            missing = current.op == "placeholder" or any(known[operand] is None for operand in current.all_input_nodes)
            known[current] = None if missing else _compute(current, known)
    return known[node]


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of one node, from those of its operands; None where it is too large."""
    operands = [known[operand] for operand in node.all_input_nodes]
    values, shape = known, facts(node).value.shape if facts(node).values else ()
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node) in _ALSO_POINTWISE
    if is_pointwise and operands and all(isinstance(x, torch.Tensor) for x in operands):
        values = {operand: _distinct(x) for operand, x in zip(node.all_input_nodes, operands, strict=True)}
    sizes = shape if values is known else torch.broadcast_shapes(*(x.shape for x in values.values()))
    if math.prod(sizes) > _MOST_ENTRIES and not getattr(node.target, "is_view", False):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand])
    on_cpu = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
    with autocast.entered(facts(node).autocast):
        found = node.target(*args, **on_cpu)  # type: ignore[operator]
    if not isinstance(found, torch.Tensor):
        return found
    return _fold_repeats(found).expand(shape) if is_pointwise else _fold_repeats(found)


def _distinct(value: torch.Tensor) -> torch.Tensor:
    """`value` with length 1 in dims of stride 0."""
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]


def _fold_repeats(value: torch.Tensor) -> torch.Tensor:
    """`value` with stride 0 in the dims along which it does not change; large ones are left as they are."""
    distinct = _distinct(value)
    if not 1 < distinct.numel() <= _FEW_ENTRIES:
        return value
    for dim in range(distinct.dim()):
        first, last = distinct.narrow(dim, 0, 1), distinct.narrow(dim, -1, 1)
        if torch.equal(first, last) and bool((distinct == first).all()):  # the last slice alone refutes most
            distinct = first
    return distinct.expand(value.shape)


def _drop_unused_constants(program: Program) -> None:
    for node in reversed(list(program.graph.nodes)):
        if facts(node).is_constant and not node.users and facts(node).role != "output":
            program.graph.erase_node(node)
