"""Convolution, pooling and resampling.

A dim of space can be split when its result is the input's length divided (convolution, pooling) or multiplied (transposed
convolution, upsampling) by the stride: then every rank's window reaches equally far beyond its piece, and neighbours lend those rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autoshard.ops.row import Call, Limited, Lowering, Rule, Sized, TensorInfo, rows, spell

_SPACE = ("d", "h", "w")
_AXES = {f"{letter}_in&{letter}_out": f"{name}_axes" for letter, name in zip(_SPACE, ("depth", "height", "width"), strict=True)}
_ORDERED = frozenset(_AXES)


def _each(value: Sequence[int] | int, space: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * space if len(values) == 1 else values


def _space(call: Call, space: int, reaches: Sequence[int | None]) -> tuple[str, str, str, dict[str, int]]:
    """Dims of space of input and output, links of those that can be split, and the most pieces of each.

    reaches: rows that a piece borrows from one neighbour at most, None where the dim stays whole.
    """
    letters = _SPACE[3 - space :]
    links = [f"{letter}_in&{letter}_out" for letter in letters]
    lengths = call.inputs[0].shape[-space:]
    limits = {link: length // max(reach, 1) for link, length, reach in zip(links, lengths, reaches, strict=True) if reach is not None}
    source, result = (" ".join(f"[{letter}_{end}]" for letter in letters) for end in ("in", "out"))
    return source, result, "; " + ", ".join(limits) if limits else "", limits


def _reaches(call: Call, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int], dilation: Sequence[int]) -> list[int | None]:
    """Rows that the windows of a piece read of a neighbour; None unless the result is exactly `stride` times shorter."""
    space = len(kernel)
    lengths = zip(call.inputs[0].shape[-space:], call.outputs[0].shape[-space:], strict=True)
    return [
        max(pad, spread * (size - 1) + 1 - step - pad) if length == step * result else None
        for (length, result), size, step, pad, spread in zip(lengths, kernel, stride, before, dilation, strict=True)
    ]


def convolution(call: Call) -> Limited:
    """Input channels are contracted, within each group; space is split with its halo."""
    kernel = call.inputs[1].shape[2:]
    space = len(kernel)
    stride, dilation = _each(call.get("stride"), space), _each(call.get("dilation"), space)
    padding = call.get("padding")
    if isinstance(padding, str):
        before = [d * (k - 1) // 2 if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    else:
        before = _each(padding, space)
    source, result, links, limits = _space(call, space, _reaches(call, kernel, stride, before, dilation))
    return _convolution(call, source, result, links, limits, "o", "i")


def transposed_convolution(call: Call) -> Limited:
    """Input channels are contracted, within each group; space is split with its halo."""
    kernel = call.inputs[1].shape[2:]
    space = len(kernel)
    stride, padding, dilation = (_each(call.get(name), space) for name in ("stride", "padding", "dilation"))
    reaches: list[int | None] = []
    for k, (length, result) in enumerate(zip(call.inputs[0].shape[-space:], call.outputs[0].shape[-space:], strict=True)):
        reach = dilation[k] * (kernel[k] - 1)
        reaches.append(max((reach - padding[k]) // stride[k], -(-padding[k] // stride[k])) if result == length * stride[k] else None)
    return _convolution(call, *_space(call, space, reaches), "i", "o")


def products(sizes: Mapping[str, int], values: Sequence[TensorInfo]) -> float:
    """Multiplications of a convolution: every result reads one window of its group's channels."""
    weight, result = values[1].shape, values[-1].shape
    return math.prod(result) * math.prod(weight[1:])


def transposed_products(sizes: Mapping[str, int], values: Sequence[TensorInfo]) -> float:
    """Multiplications of a transposed convolution: every input is spread over one window of its group's results."""
    given, weight = values[0].shape, values[1].shape
    return math.prod(given) * math.prod(weight[1:])


def _convolution(call: Call, source: str, result: str, links: str, limits: dict[str, int], rows_of_weight: str, columns: str) -> Limited:
    groups = call.get("groups", 1)
    batch = "b " if len(call.inputs[0].shape) == len(call.inputs[1].shape) else ""
    kernel = " ".join(f"[k{k}]" for k in range(len(call.inputs[1].shape) - 2))
    i, o, first = ("(g i)", "(g o)", f"(g {rows_of_weight})") if groups > 1 else ("i", "o", rows_of_weight)
    text = f"~{batch}{i} {source}, ~{first} {columns} {kernel}, +{o} -> {batch}{o} {result}{links}"
    return text, {"g": groups} if groups > 1 else {}, limits


def max_pooling(call: Call) -> Limited:
    """Windows over space, split with their halo."""
    return _pooling(call, "", True)


def avg_pooling(call: Call) -> Limited:
    """Windows over space, split with their halo; where padding does not count, or windows may be cut short, padded space is whole."""
    return _pooling(call, "~", not call.get("ceil_mode"))


def _pooling(call: Call, mark: str, is_regular: bool) -> Limited:
    space = len(call.get("kernel_size")) if not isinstance(call.get("kernel_size"), int) else 1
    kernel = _each(call.get("kernel_size"), space)
    stride = _each(call.get("stride"), space) if call.get("stride") else kernel
    padding, dilation = _each(call.get("padding"), space), _each(call.get("dilation", 1), space)
    reaches = _reaches(call, kernel, stride, padding, dilation)
    counts = call.get("count_include_pad", True)
    allowed = [reach if is_regular and (counts or not pad) else None for reach, pad in zip(reaches, padding, strict=True)]
    source, result, links, limits = _space(call, space, allowed)
    return f"{mark}b* {source} -> b* {result}{links}", {}, limits


def adaptive_pooling(call: Call) -> Limited:
    """Windows that divide a dim need no halo; a dim that ends as one row is a mean. Others stay whole: their windows overlap unevenly."""
    space = len(call.get("output_size"))
    lengths = list(zip(call.inputs[0].shape[-space:], call.outputs[0].shape[-space:], strict=True))
    reaches = [0 if result > 1 and length % result == 0 else None for length, result in lengths]
    source, result, links, limits = _space(call, space, reaches)
    for letter, (_, size) in zip(_SPACE[3 - space :], lengths, strict=True):
        if size == 1:
            source, result = source.replace(f"[{letter}_in]", f"{letter}_in"), result.replace(f"[{letter}_out]", "1")
    return f"~b* {source} -> b* {result}{links}", {}, limits


def pooling_with_places(call: Call) -> str:
    """Whole in space: the second result counts places in the whole image, which pieces would have to count anew."""
    space = int(call.op.partition("pool")[2][0])
    source, result = (" ".join(f"[{letter}{k}]" for k in range(space)) for letter in "xy")
    return spell([f"b* {source}"], [f"b* {result}"] * 2)


def nearest(call: Call) -> Limited:
    """Rows repeated: a dim that grows by a whole factor is split."""
    return _resampling(call, 0)


def bilinear(call: Call) -> Limited:
    """Rows between rows: a dim that grows by a whole factor is split with a halo of one row, unless corners are aligned."""
    return _resampling(call, None if call.get("align_corners") else 1)


def _resampling(call: Call, reach: int | None) -> Limited:
    space = len(call.inputs[0].shape) - 2
    lengths = zip(call.inputs[0].shape[2:], call.outputs[0].shape[2:], strict=True)
    factors = [result // length if length and result % length == 0 else 0 for length, result in lengths]
    exact = all(factors) and [*(call.get("scale_factors") or factors)] == factors
    source, result, links, limits = _space(call, space, [reach if exact else None] * space)
    return f"~b c {source} -> b c {result}{links}", {}, limits


def resampling(call: Call) -> str:
    """Whole in space."""
    source, result = (" ".join(f"[{letter}{k}]" for k in range(len(call.inputs[0].shape) - 2)) for letter in "xy")
    return spell([f"~b c {source}"], [f"b c {result}"])


def pixel_shuffle(call: Call) -> Sized:
    """Channels become pixels: `c y x -> c (h y) (w x)`."""
    factor = call.get("upscale_factor")
    return "~b* (c [y] [x]) h w -> b* c (h [y]) (w [x])", {"y": factor, "x": factor}


def pixel_unshuffle(call: Call) -> Sized:
    """Pixels become channels."""
    factor = call.get("downscale_factor")
    return "~b* c (h [y]) (w [x]) -> b* (c [y] [x]) h w", {"y": factor, "x": factor}


def columns(call: Call) -> Sized:
    """Each column of the result is a window, channels first; space stays whole."""
    height, width = call.get("kernel_size")
    return "~b* c [y] [x] -> b* (c [k]) [l]", {"k": height * width}


def channel_shuffle(call: Call) -> Sized:
    """Groups and channels change places."""
    space = " ".join(f"s{k}" for k in range(len(call.inputs[0].shape) - 2))
    return f"~b ([g] c) {space} -> b (c [g]) {space}", {"g": call.get("groups")}


_IN = {f"{link.partition('&')[0]}": keyword for link, keyword in _AXES.items()}
ROWS: dict[str, Rule] = {
    **rows(
        "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding",
        Rule(convolution, Lowering("conv", {**_AXES, "g": "group_axes"}, ordered=_ORDERED), bound="matmul", products=products),
    ),
    **rows(
        "conv_transpose1d conv_transpose2d.input conv_transpose3d.input",
        Rule(
            transposed_convolution,
            Lowering("conv_transpose", {**_AXES, "g": "group_axes"}, ordered=_ORDERED),
            bound="matmul",
            products=transposed_products,
        ),
    ),
    **rows("max_pool1d max_pool2d max_pool3d", Rule(max_pooling, Lowering("max_pool", _AXES, ordered=_ORDERED))),
    **rows("avg_pool1d avg_pool2d avg_pool3d", Rule(avg_pooling, Lowering("avg_pool", _AXES, ordered=_ORDERED))),
    **rows(
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
        Rule(adaptive_pooling, Lowering("adaptive_avg_pool", {**_AXES, **_IN}, ordered=_ORDERED)),
    ),
    **rows(" ".join(f"adaptive_max_pool{n}d max_pool{n}d_with_indices" for n in (1, 2, 3)), Rule(pooling_with_places)),
    **rows(
        "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec",
        Rule(nearest, Lowering("upsample_nearest", _AXES, ordered=_ORDERED)),
    ),
    **rows("upsample_bilinear2d.vec", Rule(bilinear, Lowering("upsample_bilinear2d", _AXES, ordered=_ORDERED))),
    **rows("upsample_linear1d.vec upsample_bicubic2d.vec upsample_trilinear3d.vec _upsample_bilinear2d_aa.vec", Rule(resampling)),
    **rows("_upsample_bicubic2d_aa.vec", Rule(resampling)),
    **rows("pixel_shuffle", Rule(pixel_shuffle)),
    **rows("pixel_unshuffle", Rule(pixel_unshuffle)),
    **rows("channel_shuffle", Rule(channel_shuffle)),
    **rows("im2col", Rule(columns)),
    **rows("grid_sampler_2d grid_sampler", Rule("b c [y] [x], b [v] [u] [t] -> b c [v] [u]")),
    **rows("reflection_pad1d replication_pad1d", Rule("~b* [x] -> b* [u]")),
    **rows("reflection_pad2d replication_pad2d", Rule("~b* [y] [x] -> b* [v] [u]")),
    **rows("reflection_pad3d replication_pad3d", Rule("~b* [z] [y] [x] -> b* [w] [v] [u]")),
}
