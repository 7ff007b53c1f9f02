"""Convolution and pooling."""

from __future__ import annotations

from autoshard.ops.row import Call, Rule, letters, rows


def convolution(call: Call) -> str:
    """Whole in space; input channels are contracted; with groups the channels stay whole."""
    space = len(call.inputs[1].shape) - 2
    batch = "b " if len(call.inputs[0].shape) == space + 2 else ""
    i, o = ("i", "o") if call.get("groups", 1) == 1 else ("[i]", "[o]")
    x, w, y = (" ".join(f"[{name}]" for name in letters(space, letter)) for letter in "xwy")
    weight_in = i if call.get("groups", 1) == 1 else "[j]"
    return f"~{batch}{i} {x}, ~{o} {weight_in} {w}, +{o} -> {batch}{o} {y}"


ROWS: dict[str, Rule] = {
    **rows("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding", Rule(convolution, bound="matmul")),
    # Pooling: whole in space.
    **rows("max_pool2d avg_pool2d adaptive_avg_pool2d", Rule("b* [y] [x] -> b* [v] [u]")),
    **rows("max_pool1d avg_pool1d adaptive_avg_pool1d", Rule("b* [x] -> b* [u]")),
}
