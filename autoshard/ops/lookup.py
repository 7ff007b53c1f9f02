"""Rows of tables by index."""

from __future__ import annotations

from autoshard.ops.row import Call, Lowering, Rule, rows


def embedding(call: Call) -> str:
    """Rows looked up; gradients scaled by how often a row occurs need all the indices, sparse ones the whole table."""
    if call.get("scale_grad_by_freq") or call.get("sparse"):
        return "~[v] h, [b*] -> [b*] h"
    return "~v h, b* -> b* h"


ROWS: dict[str, Rule] = {
    **rows("embedding", Rule(embedding, Lowering("embedding", {"v": "row_axes"}, ordered=frozenset("v")))),
}
