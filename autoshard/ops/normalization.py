"""Normalisation."""

from __future__ import annotations

from autoshard.ops.row import Call, Limited, Lowering, Rule, letters, rows, spell

_MOST_GROUPS = 4  # channels of more groups are not cut within the group: few other ops can read such segments


def last_dims_norm(call: Call) -> str:
    """Normalisation over the last dims; what else it returns has length 1 there."""
    names = letters(len(call.get("normalized_shape")), "n")
    terms, statistics = " ".join(names), " ".join("1" for _ in names)
    return spell([f"b* {terms}", *[terms] * (len(call.inputs) - 1)], [f"b* {terms}", *[f"b* {statistics}"] * (len(call.outputs) - 1)])


def native_layer_norm(call: Call) -> str:
    """last_dims_norm; of half types the normalised dims stay whole, as the dtype of the statistics depends on the device."""
    text = last_dims_norm(call)
    if call.inputs[0].dtype.itemsize >= 4:
        return text
    return " ".join(f"[{term.rstrip(',')}]{',' * term.endswith(',')}" if term.startswith("n") else term for term in text.split())


def batch_norm(call: Call) -> str:
    """Statistics are sums over batch and space, which the lowering makes exact; tracked statistics keep channels whole."""
    channel = "[c]" if call.get("training") and call.get("running_mean") is not None else "c"
    return spell([f"b {channel} s*", *[channel] * (len(call.inputs) - 1)], [f"b {channel} s*"])


def group_norm(call: Call) -> Limited:
    """Samples and groups are apart; channels of a group and space are summed over by the lowering."""
    groups = call.get("num_groups")
    text = spell(["b (g c) s*", *["(g c)"] * (len(call.inputs) - 1)], ["b (g c) s*"])
    return text, {"g": groups}, {"c": 1} if groups > _MOST_GROUPS else {}


def instance_norm(call: Call) -> str:
    """Samples and channels are apart, space is summed over by the lowering; running statistics that are written stay whole."""
    if not call.get("use_input_stats"):
        return spell(["b c t*", *["c"] * (len(call.inputs) - 1)], ["b c t*"])
    if call.get("running_mean") is not None:
        return spell(["[b] [c] [s*]", *["[c]"] * (len(call.inputs) - 1)], ["[b] [c] [s*]"])
    return spell(["b c s*", *["c"] * (len(call.inputs) - 1)], ["b c s*"])


_OVER_DIMS = {"n": "dim_axes"}

ROWS: dict[str, Rule] = {
    **rows("layer_norm", Rule(last_dims_norm, Lowering("layer_norm", _OVER_DIMS))),
    **rows("native_layer_norm", Rule(native_layer_norm, Lowering("native_layer_norm", _OVER_DIMS, frozenset("n")))),
    **rows("rms_norm", Rule(last_dims_norm, Lowering("rms_norm", _OVER_DIMS))),
    **rows("_fused_rms_norm", Rule(last_dims_norm, Lowering("fused_rms_norm", _OVER_DIMS, frozenset("n")))),
    **rows("batch_norm", Rule(batch_norm, Lowering("batch_norm", {"b": "batch_axes", "s": "batch_axes"}, lone_sample=True))),
    **rows("group_norm", Rule(group_norm, Lowering("group_norm", {"g": "group_axes", "c": "dim_axes", "s": "dim_axes"}))),
    **rows("instance_norm", Rule(instance_norm, Lowering("instance_norm", {"s": "dim_axes"}, lone_sample=True))),
}
