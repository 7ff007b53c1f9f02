"""Mixtures of experts in a traced graph: the ops of one become one op, which knows that its experts can be split.

What is recognised is how Hugging Face writes every one of its mixtures: token and choice pairs are sorted by expert, run
through two grouped products with a gated activation between, put back in order, weighted and summed. Op by op this cannot
be split, as the sort needs all tokens. Every detail is compared; what differs in any is left as it is and reported.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autoshard import runtime
from autoshard.program import Facts, Program, arguments, facts, op_name, set_facts

_GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
_RESHAPES = ("aten.reshape.default", "aten.view.default")
_ACTIVATIONS = {"aten.silu.default": "silu", "aten.relu.default": "relu", "aten.gelu.default": "gelu"}


class _Different(Exception):
    """The graph is not what is looked for."""


def fuse_experts(program: Program) -> None:
    """Replace every mixture of experts by a node that calls runtime.experts; the ops that it stood for become dead."""
    for node in program.nodes("op"):
        if op_name(node) != "aten.sum.dim_IntList":
            continue
        try:
            operands, activation = _mixture(node)
        except _Different:
            continue
        source = facts(node).source
        name = f"{source.module.replace('.', '_')}_experts_".lstrip("_")
        with program.graph.inserting_before(node):
            fused = program.graph.create_node("call_function", runtime.experts, operands, {"activation": activation}, name=name)
        set_facts(fused, Facts("op", facts(node).values, source=source, branch=facts(node).branch))
        node.replace_all_uses_with(fused)


def report_experts(program: Program) -> None:
    """Name grouped products that are no part of a mixture that was recognised."""
    for node in program.nodes("op"):
        if op_name(node) in _GROUPED:
            program.note(
                f"the mixture of experts around {node.name} is not written as autoshard knows it ({facts(node).source}): its experts "
                "can be split, its tokens cannot, as they are sorted by expert"
            )


def _need(condition: bool) -> None:
    if not condition:
        raise _Different


def _of(value: Any, *names: str) -> dict[str, Any]:
    """The arguments of an op that must be one of `names`."""
    _need(isinstance(value, fx.Node) and facts(value).role == "op" and op_name(value) in names)
    return arguments(value)


def _piece(value: Any, number: int) -> fx.Node:
    """The op of which `value` is result `number`."""
    _need(isinstance(value, fx.Node) and value.target is operator.getitem and bool(value.args[1] == number))
    return value.args[0]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return facts(node).value.shape


def _indexed(value: Any) -> tuple[fx.Node, fx.Node]:
    """`x` and `rows` of `x[rows]`."""
    index = _of(value, "aten.index.Tensor")
    _need(len(index["indices"]) == 1)
    return index["self"], index["indices"][0]


def _mixture(total: fx.Node) -> tuple[tuple[fx.Node, ...], str]:
    """Hidden states, chosen experts, weights, both expert weights, and the activation, of the mixture that `total` ends."""
    summed = _of(total, "aten.sum.dim_IntList")
    _need(list(summed["dim"]) == [1] and not summed["keepdim"] and summed["dtype"] is None)
    choices = summed["self"]
    restored, inverse = _indexed(_of(choices, *_RESHAPES)["self"])
    permutation = _inverted(inverse)
    product = _of(restored, "aten.mul.Tensor")
    unsqueezed = _of(product["other"], "aten.unsqueeze.default")
    flat_weights, by_expert = _indexed(unsqueezed["self"])
    _need(unsqueezed["dim"] in (-1, 1) and by_expert is permutation)
    weights = _of(flat_weights, *_RESHAPES)["self"]
    ordering = _piece(permutation, 1)
    sort = _of(ordering, "aten.sort.default", "aten.sort.stable")
    _need(sort["dim"] in (-1, 0) and not sort["descending"])
    index = _of(sort["self"], *_RESHAPES)["self"]
    inner, down, ends = _product(product["self"])
    gated = _of(inner, "aten.mul.Tensor")
    activation, gate = _activated(gated["self"])
    halves = _piece(gate, 0)
    _need(halves is _piece(gated["other"], 1))
    chunk = _of(halves, "aten.chunk.default")
    _need(chunk["chunks"] == 2 and chunk["dim"] in (-1, 1))
    taken, gate_up, same_ends = _product(chunk["input"] if "input" in chunk else chunk["self"])
    hidden, origin = _indexed(taken)
    divided = _of(origin, "aten.floor_divide.default")
    _need(same_ends is ends and divided["self"] is permutation)
    _need(_counted(ends, ordering) == _shape(gate_up)[0])
    tokens, count, width = _shape(choices)
    shapes = [_shape(node) for node in (hidden, index, weights, gate_up, down)]
    experts, both = shapes[3][:2]
    wanted = [(tokens, width), (tokens, count), (tokens, count), (experts, both, width), (experts, width, both // 2)]
    _need(divided["other"] == count and shapes == wanted and both % 2 == 0)
    return (hidden, index, weights, gate_up, down), activation


def _inverted(inverse: Any) -> fx.Node:
    """The permutation whose inverse was made by writing 0, 1, 2, ... at its places."""
    put = _of(inverse, "aten.index_put.default")
    _need(len(put["indices"]) == 1 and not put["accumulate"])
    permutation, numbers = put["indices"][0], _of(put["values"], "aten.arange.default")
    length = _shape(permutation)
    _need(len(length) == 1 and numbers["end"] == length[0] and _shape(put["self"]) == length)
    _need(facts(inverse).value.dtype == torch.int64)
    return permutation


def _product(value: Any) -> tuple[Any, fx.Node, Any]:
    """Rows, weights (experts, out, in) and offsets of a grouped product."""
    grouped = list(_of(value, *_GROUPED).values())
    _need(all(given is None for given in grouped[3:]))
    turned = _of(grouped[1], "aten.transpose.int")
    _need(sorted(dim % 3 for dim in (turned["dim0"], turned["dim1"])) == [1, 2])
    return grouped[0], turned["self"], grouped[2]


def _activated(value: Any) -> tuple[str, Any]:
    given = _of(value, *_ACTIVATIONS)
    tanh = given.get("approximate", "none") == "tanh"
    return _ACTIVATIONS[op_name(value)] + "_tanh" * tanh, given["self"]


def _counted(ends: Any, ordering: fx.Node) -> int:
    """The number of experts whose rows `ends` counts, in the order of `ordering`."""
    summed = _of(ends, "aten.cumsum.default")
    counted = _of(summed["self"], "aten.histc.default")
    cast = _of(counted["self"], "aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout")
    _need(cast["dtype"] in (torch.float32, torch.int32) and _piece(cast["self"], 0) is ordering)
    _need(summed["dim"] in (0, -1) and summed["dtype"] == torch.int32)
    _need(counted["min"] == 0 and counted["max"] == counted["bins"] - 1)
    return counted["bins"]
