"""Attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autoshard.ops.row import Call, Lowering, Rule, TensorInfo, rows


def attention(call: Call) -> str:
    """softmax(q k^T) v: heads (grouped queries share their keys'), queries, keys, or both on one axis (a ring).

    Grouped heads are split by group, within each group, or as one (`g&r`): ranks then pick the heads of keys that theirs share.
    Queries are `s` where their position matters. Dropout draws per probability: keys, and queries whose position matters, stay
    whole then. Columns of a mask stay whole; lowerings take those that they need.
    """
    query, key, links = ("s", "k", "; s&k") if call.get("is_causal") else ("q", "k", "; q&k")
    if call.get("dropout_p"):
        query, key, links = "[q]" if call.get("is_causal") else "q", "[k]", ""
    heads, grouped = "", ""
    sizes = {}
    if call.get("enable_gqa") and call.inputs[0].shape[-3] != call.inputs[1].shape[-3]:
        heads, grouped = "g ", "(g r) "
        sizes["g"] = call.inputs[1].shape[-3]
        links += ", g&r" if links else ""
        mask = _grouped_mask(call.inputs[3].shape, query) if len(call.inputs) > 3 else f"{query} [m]"
    else:
        mask = f"b* {query} [m]"
    masked = f", {mask}" if len(call.inputs) > 3 else ""
    text = f"b* {grouped}{query} [d], b* {heads}{key} [d], ~b* {heads}{key} e{masked} -> b* {grouped}{query} e{links}"
    return (text, sizes) if sizes else text  # type: ignore[return-value]


def _grouped_mask(shape: Sequence[int], query: str) -> str:
    """A mask per query head is split as the heads are."""
    heads = "" if len(shape) < 3 else "b* 1 " if shape[-3] == 1 else "b* (g r) "
    return f"{heads}{query} [m]"


def products(sizes: Mapping[str, int], values: Sequence[TensorInfo]) -> int:
    """Multiplications: of queries with keys, and of probabilities with values."""
    return math.prod(size for name, size in sizes.items() if name not in "dem") * (sizes["d"] + sizes["e"])


_RING = "query_axes key_axes"
_AXES = {"s": "query_axes", "k": "key_axes", "s&k": _RING, "q&k": _RING, "g&r": "head_axes"}

ROWS: dict[str, Rule] = {
    **rows(
        "scaled_dot_product_attention",
        Rule(
            attention,
            Lowering(
                "split_attention",
                {"s": "query_axes", "k": "key_axes", "s&k": _RING, "q&k": _RING, "g&r": "head_axes"},
                ordered=frozenset({"s", "k"}),
            ),
            is_random=lambda call: bool(call.get("dropout_p")),
            undrawn=frozenset("e"),
            bound="matmul",
            products=products,
            backward=2.5,  # five products for two, one of which is done again (Dao: FlashAttention-2, 2023)
        ),
    ),
}
