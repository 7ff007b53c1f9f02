"""Losses."""

from __future__ import annotations

from autoshard.ops.row import Call, Lowering, Rule, rows


def cross_entropy(call: Call) -> str:
    """Classes on dim 1 (dim 0 of a single sample); targets are class numbers, or probabilities of the input's shape."""
    logits, target = call.inputs[:2]
    batch = "b " if len(logits.shape) > 1 else ""
    given_probabilities = target.dtype.is_floating_point
    wanted = f"{batch}c s*" if given_probabilities else f"{batch}s*"
    weight = ", c" if len(call.inputs) > 2 else ""
    out = f"{batch}s*" if call.get("reduction", 1) == 0 else ""
    text = f"{batch}c s*, {wanted}{weight} -> {out}"
    return text.replace("c", "[c]").replace("b ", "[b] ").replace("s*", "[s*]") if given_probabilities else text


ROWS: dict[str, Rule] = {
    **rows(
        "cross_entropy_loss",
        Rule(
            cross_entropy,
            Lowering("cross_entropy", {"c": "class_axes", "b": "batch_axes", "s": "batch_axes"}, frozenset("c"), frozenset("c")),
        ),
    ),
}
