"""Lookups in tables of rows: one row per index, and bags of rows that are summed, averaged or maximised."""

from __future__ import annotations

from autoshard.errors import RuleError
from autoshard.ops.row import Call, Lowering, Rule, rows, spell


def embedding(call: Call) -> str:
    """Rows looked up; gradients scaled by how often a row occurs need all the indices, sparse ones the whole table."""
    if call.get("scale_grad_by_freq") or call.get("sparse"):
        return "~[v] h, [b*] -> [b*] h"
    return "~v h, b* -> b* h"


def bags(call: Call) -> str:
    """Bags b of k rows each, or of n rows by offsets: those bags stay whole, as their lengths depend on values; so do rows of a maximum."""
    weight, indices = call.inputs[:2]
    has_offsets, is_weighted = call.get("arg2") is not None, call.get("arg3") is not None
    if len(weight.shape) != 2 or len(indices.shape) != 2 - has_offsets:
        raise RuleError("a table has two dims; indices have one where offsets cut it into bags, else two")
    listed, bag, table = ("n", "[o]", "~v h") if has_offsets else ("b k", "b", "~v h")
    if call.get("scale_grad_by_freq") or call.get("sparse"):  # as in embedding
        listed, bag, table = ("[n]", "[o]", "~[v] h") if has_offsets else ("[b] [k]", "[b]", "~[v] h")
    elif call.get("mode", "mean") == "max":  # which row is the largest, only a rank that has all of them can say
        listed, table = listed.replace("n", "[n]").replace("k", "[k]"), "[v] h"
    return spell([table, listed, *["[z]"] * has_offsets, *[f"~{listed}"] * is_weighted], [f"{bag} h"])


_ROWS = frozenset("v")

ROWS: dict[str, Rule] = {
    **rows("embedding", Rule(embedding, Lowering("embedding", {"v": "row_axes"}, ordered=_ROWS, uneven=_ROWS, skips_padding=_ROWS))),
    # What passes put in the place of aten.embedding_bag: see autoshard/embedding_bags.py.
    "embedding_bag": Rule(
        bags,
        Lowering(
            "embedding_bag",
            {"v": "row_axes", "k": "index_axes", "n": "index_axes"},
            ordered=frozenset("vn"),
            uneven=_ROWS,
            skips_padding=_ROWS,
        ),
    ),
}
