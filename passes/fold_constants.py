"""fold_constants: mark what depends on no input and no parameter, and turn a causal mask back into `is_causal`.

A constant stays in the graph as the ops that make it: programs compute it once, before the first step. A boolean mask
that evaluates to the lower triangle and feeds attention is replaced by the flag that fused kernels understand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard import autocast
from autoshard.branches import is_either
from autoshard.program import Program, arguments, facts, is_sized, op_name, set_argument, tensor_operands, writes_statistics

_LARGEST_MASK = 2**28


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
    for node in program.nodes("op"):
        if op_name(node) != "aten.scaled_dot_product_attention.default":
            continue
        bound = arguments(node)
        mask, query, key = bound["attn_mask"], bound["query"], bound["key"]
        square = facts(query).value.shape[-2] == facts(key).value.shape[-2]
        if isinstance(mask, fx.Node) and facts(mask).is_constant and square and not bound["is_causal"] and _is_causal(mask, known):
            set_argument(node, "attn_mask", None)
            set_argument(node, "is_causal", True)


def _is_causal(mask: fx.Node, known: dict[fx.Node, Any]) -> bool:
    info = facts(mask).value
    if info.dtype != torch.bool or info.nbytes > _LARGEST_MASK:
        return False
    value = evaluate(mask, known)
    if value is None:
        return False
    triangle = torch.ones(info.shape[-2:], dtype=torch.bool).tril()
    first = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride()[:-2])]
    return bool((first == triangle).all())


def evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a constant node on the CPU, or None where it depends on a buffer; `known` caches values."""
    order: list[fx.Node] = []
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in known:
            order.append(current)
            pending += current.all_input_nodes
    for current in reversed(order):
        if current in known:
            continue
        args = fx.map_arg((current.args, current.kwargs), lambda operand: known[operand])
        missing = current.op == "placeholder" or any(known[operand] is None for operand in current.all_input_nodes)
        on_cpu = {k: torch.device("cpu") if k == "device" else v for k, v in args[1].items()}
        with autocast.entered(facts(current).autocast):
            known[current] = None if missing else current.target(*args[0], **on_cpu)  # type: ignore[operator]
    return known[node]


def _drop_unused_constants(program: Program) -> None:
    for node in reversed(list(program.graph.nodes)):
        if facts(node).is_constant and not node.users and facts(node).role != "output":
            program.graph.erase_node(node)
