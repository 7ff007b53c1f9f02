"""Attention."""

from __future__ import annotations

from collections.abc import Sequence

from autoshard.ops.row import Call, Rule, rows


def attention(call: Call) -> str:
    """softmax(q k^T) v: keys stay whole, queries too under a causal mask; grouped queries share their keys' heads."""
    query = "[q]" if call.get("is_causal") else "q"
    heads, grouped = "", ""
    sizes = {}
    if call.get("enable_gqa") and call.inputs[0].shape[-3] != call.inputs[1].shape[-3]:
        heads, grouped = "g ", "(g r) "
        sizes["g"] = call.inputs[1].shape[-3]
        mask = _grouped_mask(call.inputs[3].shape, query) if len(call.inputs) > 3 else f"{query} [k]"
    else:
        mask = f"b* {query} [k]"
    text = f"b* {grouped}{query} [d], b* {heads}[k] [d], ~b* {heads}[k] e, {mask} -> b* {grouped}{query} e"
    return (text, sizes) if sizes else text  # type: ignore[return-value]


def _grouped_mask(shape: Sequence[int], query: str) -> str:
    """A mask per query head is split as the heads are."""
    heads = "" if len(shape) < 3 else "b* 1 " if shape[-3] == 1 else "b* (g r) "
    return f"{heads}{query} [k]"


ROWS: dict[str, Rule] = {
    **rows(
        "scaled_dot_product_attention",
        Rule(attention, is_random=lambda call: bool(call.get("dropout_p")), undrawn=frozenset("e"), bound="matmul"),
    ),
}
