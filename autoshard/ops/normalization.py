"""Normalisation."""

from __future__ import annotations

from autoshard.ops.row import Call, Lowering, Rule, letters, rows, spell


def last_dims_norm(call: Call) -> str:
    """Normalisation over the last dims; what else it returns has length 1 there."""
    names = letters(len(call.get("normalized_shape")), "n")
    whole = " ".join(f"[{name}]" for name in names)
    statistics = " ".join("1" for _ in names)
    return spell([f"b* {whole}", *[whole] * (len(call.inputs) - 1)], [f"b* {whole}", *[f"b* {statistics}"] * (len(call.outputs) - 1)])


def batch_norm(call: Call) -> str:
    """Statistics are sums over batch and space, which the lowering makes exact; tracked statistics keep channels whole."""
    channel = "[c]" if call.get("training") and call.get("running_mean") is not None else "c"
    return spell([f"b {channel} s*", *[channel] * (len(call.inputs) - 1)], [f"b {channel} s*"])


ROWS: dict[str, Rule] = {
    **rows("layer_norm native_layer_norm rms_norm", Rule(last_dims_norm)),
    **rows("batch_norm", Rule(batch_norm, Lowering("batch_norm", {"b": "batch_axes", "s": "batch_axes"}))),
}
