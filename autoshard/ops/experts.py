"""Mixtures of experts: the whole of one, which passes recognise, and products of sorted rows with weights by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoshard.errors import RuleError
from autoshard.ops.row import Call, Limited, Lowering, Rule, TensorInfo


def experts(call: Call) -> Limited:
    """Tokens t, choices k, experts e, inner width f (its gates g before its values); tokens and experts on one axis exchange rows."""
    inner = call.inputs[4].shape[2]
    text = "t [h], t [k], ~t [k], e (g f) [h], ~e o f -> t o; t&e"
    return text, {"g": 2, "f": inner}, {"g": 1}


def experts_products(sizes: Mapping[str, int], values: Sequence[TensorInfo]) -> float:
    """Multiplications of a mixture: every choice of every token goes through one expert."""
    choices, gate_up, down = values[1].shape, values[3].shape, values[4].shape
    return choices[0] * choices[1] * (gate_up[1] * gate_up[2] + down[1] * down[2])


def grouped_mm(call: Call) -> Limited:
    """Sorted rows through the weights of their experts. torch's own kernel wants local rows that are multiples of 16 bytes."""
    if [len(t.shape) for t in call.inputs] != [2, 3, 1]:
        raise RuleError("rows, weights by expert and their offsets are what can be split")
    _, wide, out = call.inputs[1].shape
    limits = {}
    if call.op == "aten._grouped_mm.default":
        aligned = 16 // call.inputs[0].dtype.itemsize
        limits = {name: max(1, (size // aligned) & -(size // aligned)) for name, size in (("h", wide), ("f", out))}
    return "~[s] h, ~e h f, [z] -> [s] f", {}, limits


def grouped_products(sizes: Mapping[str, int], values: Sequence[TensorInfo]) -> float:
    """Multiplications of a grouped product: every row goes through one weight."""
    return values[0].shape[0] * values[1].shape[1] * values[1].shape[2]


_GROUPED = Rule(grouped_mm, Lowering("grouped_mm", {"e": "expert_axes"}, ordered=frozenset("e")), bound="matmul", products=grouped_products)

ROWS: dict[str, Rule] = {
    "experts": Rule(
        experts,
        Lowering("experts", {"e": "expert_axes", "t&e": "expert_axes exchange_axes"}, ordered=frozenset("e")),
        bound="matmul",
        products=experts_products,
    ),
    "transformers.grouped_mm_fallback.default": _GROUPED,
    "aten._grouped_mm.default": _GROUPED,
}
