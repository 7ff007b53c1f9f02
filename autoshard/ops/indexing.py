"""Reading and writing by index: gather and scatter, triangles and diagonals.

A dim that is indexed may be split: its lowering reads zeros for, or drops, what lies on other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autoshard.errors import RuleError
from autoshard.ops.row import Call, Limited, Lowering, Rule, TensorInfo, letters, rows, spell

_INDEXED = "uvw"  # factors of the first indexed dims: each is split by an argument of its own; further ones stay whole


def _indexed(call: Call) -> tuple[list[str], list[str], list[str]]:
    """Terms of the indexed tensor; of what `x[indices]` reads, `b*` for the dims of the indices; and one `b*` per index."""
    indices: Sequence[TensorInfo | None] = call.get("indices")
    places = [k for k, index in enumerate(indices) if index is not None]
    if any(index.dtype == torch.bool for index in indices if index is not None):
        raise RuleError("an index is a mask: what it reads depends on its values")
    names = letters(len(call.inputs[0].shape), "r")
    for number, k in enumerate(places):
        names[k] = _INDEXED[number] if number < len(_INDEXED) else f"[{names[k]}]"
    kept = [(k, name) for k, name in enumerate(names) if k not in places]
    is_adjacent = places[-1] - places[0] == len(places) - 1
    before = [name for k, name in kept if is_adjacent and k < places[0]]
    return names, [*before, "b*", *[name for _, name in kept if name not in before]], ["b*"] * len(places)


def index(call: Call) -> str:
    """Advanced indexing: index tensors broadcast together, other dims are untouched."""
    source, read, indices = _indexed(call)
    return spell(["~" + " ".join(source), *indices], [" ".join(read)])


def index_put(call: Call) -> str:
    """Advanced indexing that writes: values broadcast to what is written; added up they may be split, else the last one counts."""
    indices: Sequence[TensorInfo | None] = call.get("indices")
    if any(entry is not None and entry.dtype == torch.bool for entry in indices):
        return _masked_put(call)
    source, written, _ = _indexed(call)
    batch = torch.broadcast_shapes(*(entry.shape for entry in indices if entry is not None))
    behind = len(written) - 1 - written.index("b*")
    values = call.get("values").shape
    if len(values) > len(written) - 1 + len(batch):
        raise RuleError("values have more dims than what is written")
    given = values[: max(0, len(values) - behind)]  # what values have of the indices' dims
    given = (1,) * (len(batch) - len(given)) + tuple(given[len(given) - min(len(given), len(batch)) :])
    is_free = [bool(call.get("accumulate")) and size == other for size, other in zip(batch, given, strict=True)]
    batched = [f"b{k}" if free else f"[b{k}]" for k, free in enumerate(is_free)]

    def aligned(count: int) -> list[str]:
        return batched[len(batch) - count :]

    spelled = [term for name in written for term in (batched if name == "b*" else [name])]
    terms = spelled[len(spelled) - len(values) :]
    listed = [" ".join(aligned(len(entry.shape))) for entry in indices if entry is not None]
    return spell(["+" + " ".join(source), *listed, "+" + " ".join(terms)], [" ".join(source)])


def _masked_put(call: Call) -> str:
    """`x[mask] = value` is pointwise where the value is the same for all that is written."""
    indices, values = call.get("indices"), call.get("values").shape
    mask = indices[0]
    names = letters(len(call.inputs[0].shape))
    rest = len(names) - len(mask.shape)
    if len(indices) > 1 or (len(values) > rest and values[0] != 1):
        whole = [" ".join(f"[{letter}{k}]" for k in range(len(t.shape))) for letter, t in zip("xyzabcdefghi", call.inputs, strict=False)]
        return spell(["+" + whole[0], *whole[1:-1], "+" + whole[-1]], [whole[0]])
    value = " ".join(["1"] * (len(values) > rest) + names[len(names) - min(rest, len(values)) :] * bool(rest and values))
    return spell(["+" + " ".join(names), " ".join(names[: len(mask.shape)]), f"+{value}"], [" ".join(names)])


def _along(call: Call, shapes: Sequence[Sequence[int]]) -> tuple[list[str], int]:
    """Names of dims that all `shapes` agree in (others stay whole), and the dim that is indexed."""
    ndim = len(shapes[0])
    if any(len(shape) != ndim for shape in shapes) or not ndim:
        raise RuleError("tensors of different ranks, or without dims")
    dim = call.get("dim") % ndim
    return [f"d{k}" if len({shape[k] for shape in shapes}) == 1 else f"[d{k}]" for k in range(ndim)], dim


def _put(names: list[str], dim: int, term: str) -> str:
    return " ".join(term if k == dim else name for k, name in enumerate(names))


def _unequal(names: list[str], number: int) -> list[str]:
    """Whole dims under names of their own, since operands differ in their length."""
    return [f"[w{name[2:-1]}x{number}]" if name.startswith("[") else name for name in names]


def index_select(call: Call) -> str:
    """Slices along one dim."""
    ndim = len(call.inputs[0].shape)
    if not ndim or not call.inputs[1].shape:
        raise RuleError("a tensor without dims")
    names, dim = letters(ndim), call.get("dim") % ndim
    return spell(["~" + _put(names, dim, "u"), "i"], [_put(names, dim, "i")])


def gather(call: Call) -> str:
    """Elements along one dim; other dims are split together where lengths agree."""
    names, dim = _along(call, [call.inputs[0].shape, call.inputs[1].shape])
    shorter = _unequal(names, 1)
    return spell(["~" + _put(names, dim, "u"), _put(shorter, dim, "i")], [_put(shorter, dim, "i")])


def take_along_dim(call: Call) -> str:
    """Elements along one dim, other dims broadcast; without a dim all is whole."""
    ndim = len(call.inputs[0].shape)
    if call.get("dim") is None or len(call.inputs[1].shape) != ndim or not ndim:
        return "~[x*], [i*] -> [y*]"
    names, dim = letters(ndim), call.get("dim") % ndim
    return spell(["~" + _put(names, dim, "u"), _put(names, dim, "i")], [_put(names, dim, "i")])


def take(call: Call) -> str:
    """Elements of the flattened tensor, which stays whole."""
    return "~[x*], b* -> b*"


def scatter(call: Call) -> str:
    """Writes along one dim. Sums may split what is written; where the last value counts it stays whole."""
    names, dim = _along(call, [t.shape for t in call.inputs if t.shape or not call.inputs[0].shape])
    adds = call.op == "aten.scatter_add.default" or (call.get("reduce") == "sum" and call.get("include_self", False))
    is_linear = adds or call.op == "aten.scatter.src"
    mark = "+" if is_linear else ""
    term = "i" if adds else "[i]"
    index, source = _unequal(names, 1), _unequal(names, 2)
    sources = [f"{mark}{_put(source, dim, term if len(call.inputs[1].shape) and _same(call, dim) else '[s]')}"] * (len(call.inputs) - 2)
    if adds and sources and not _same(call, dim):
        term = "[i]"
    return spell([mark + _put(names, dim, "u"), _put(index, dim, term), *sources], [_put(names, dim, "u")])


def _same(call: Call, dim: int) -> bool:
    """Whether as many values are given along `dim` as indices."""
    return len(call.inputs) < 3 or call.inputs[1].shape[dim] == call.inputs[2].shape[dim]


def index_add(call: Call) -> str:
    """Adds slices along one dim."""
    return _index_write(call, "i")


def index_copy(call: Call) -> str:
    """Replaces slices along one dim: the last one counts, so they stay whole."""
    return _index_write(call, "[i]")


def _index_write(call: Call, term: str) -> str:
    names, dim = _along(call, [call.inputs[0].shape])
    if not call.inputs[1].shape or len(call.inputs[2].shape) != len(names):
        raise RuleError("an index without dims")
    return spell(["+" + _put(names, dim, "u"), term, "+" + _put(names, dim, term)], [_put(names, dim, "u")])


def index_fill(call: Call) -> str:
    """One value for slices along one dim."""
    names, dim = _along(call, [call.inputs[0].shape])
    target = _put(names, dim, "u")
    index = "[i]" if call.inputs[1].shape else ""
    return spell([target, index], [target]) if len(call.inputs) == 2 else spell(["+" + target, index, "+"], [target])


def masked_scatter(call: Call) -> str:
    """All whole: which number of the source goes where depends on how many places are masked before it, on all ranks."""
    return "+[p*], [p*], +[s*] -> [p*]"


def select_scatter(call: Call) -> str:
    """Writes one slice of a dim, which stays whole."""
    names, dim = _along(call, [call.inputs[0].shape])
    target = _put(names, dim, f"[d{dim}]")
    return spell(["+" + target, "+" + " ".join(n for k, n in enumerate(names) if k != dim)], [target])


def slice_scatter(call: Call) -> str:
    """Writes a range of a dim, which stays whole."""
    names, dim = _along(call, [call.inputs[0].shape])
    target = _put(names, dim, f"[d{dim}]")
    return spell(["+" + target, "+" + _put(names, dim, "[s]")], [target])


def _diagonal_dims(call: Call, ndim: int) -> tuple[int, int]:
    return call.get("dim1", 0) % ndim, call.get("dim2", 1) % ndim


def diagonal(call: Call) -> str:
    """The diagonal of two dims, which stay whole, becomes the last dim."""
    names = letters(len(call.inputs[0].shape))
    pair = _diagonal_dims(call, len(names))
    source = [f"[{n}]" if k in pair else n for k, n in enumerate(names)]
    return spell(["~" + " ".join(source)], [" ".join([*(n for k, n in enumerate(names) if k not in pair), "[o]"])])


def diagonal_scatter(call: Call) -> str:
    """Writes the diagonal of two dims, which stay whole."""
    names = letters(len(call.inputs[0].shape))
    pair = _diagonal_dims(call, len(names))
    target = " ".join(f"[{n}]" if k in pair else n for k, n in enumerate(names))
    return spell(["+" + target, "+" + " ".join([*(n for k, n in enumerate(names) if k not in pair), "[o]"])], [target])


def diag_embed(call: Call) -> str:
    """The last dim becomes the diagonal of two new ones, all whole."""
    ndim = len(call.outputs[0].shape)
    pair = (call.get("dim1", -2) % ndim, call.get("dim2", -1) % ndim)
    names = letters(ndim - 2)
    kept = iter(names)
    out = [f"[y{k}]" if k in pair else next(kept) for k in range(ndim)]
    return spell(["~" + " ".join([*names, "[o]"])], [" ".join(out)])


def triangle(call: Call) -> str:
    """A triangle of the last two dims, moved by where a rank's piece starts."""
    return "~b* r c -> b* r c"


def searchsorted(call: Call) -> str:
    """Positions in sorted rows, which stay whole; every row has values of its own, or one row serves all."""
    row, values = ("[s]", "b*") if len(call.inputs[0].shape) == 1 else ("b* [s]", "b* q")
    return spell([row, values, row][: len(call.inputs)], [values])


def repeat_interleave(call: Call) -> Limited:
    """Every element several times in a row; without a dim the tensor is flattened first."""
    shape, times = call.inputs[0].shape, call.get("repeats")
    names = letters(len(shape))
    sizes = {"r": times, **dict(zip(names, shape, strict=True))}
    dim = call.get("dim")
    out = f"({' '.join([*names, 'r'])})" if dim is None else _put(names, dim % len(shape), f"({names[dim % len(shape)]} r)")
    return spell(["~" + " ".join(names)], [out]), sizes, {"r": 1}


def meshgrid(call: Call) -> str:
    """Every vector along a dim of its own."""
    names = letters(len(call.inputs))
    out = [*names]
    if call.get("indexing") == "xy" and len(out) > 1:
        out[:2] = out[1::-1]
    return spell(["" if not t.shape else n for n, t in zip(names, call.inputs, strict=True)], [" ".join(out)] * len(call.outputs))


_INDEX_AXES = {"u": "first_axes", "v": "second_axes", "w": "third_axes"}
_ORDERED = frozenset(_INDEXED)
_TRIANGLE_AXES = {"r": "row_axes", "c": "column_axes"}


def _split_dim(function: str) -> Lowering:
    """The lowering of an op that indexes one dim, `u`."""
    return Lowering(function, {"u": "index_axes"}, ordered=frozenset("u"))


def one_hot(call: Call) -> str:
    """Classes are counted from the rank's first; how many there are must be said, else it depends on values."""
    if call.get("num_classes", -1) < 0:
        raise RuleError("the number of classes depends on values")
    return "b* -> b* c"


ROWS: dict[str, Rule] = {
    **rows("index.Tensor", Rule(index, Lowering("index", _INDEX_AXES, ordered=_ORDERED))),
    **rows("index_put", Rule(index_put, Lowering("index_put", _INDEX_AXES, ordered=_ORDERED))),
    **rows("index_select", Rule(index_select, _split_dim("index_select"))),
    **rows("gather", Rule(gather, _split_dim("gather"))),
    **rows("take_along_dim", Rule(take_along_dim, _split_dim("take_along_dim"))),
    **rows("take", Rule(take)),
    **rows("scatter.src scatter.value scatter.reduce scatter.value_reduce", Rule(scatter, _split_dim("scatter"))),
    **rows("scatter_add", Rule(scatter, _split_dim("scatter_add"))),
    **rows("scatter_reduce.two", Rule(scatter, _split_dim("scatter_reduce"))),
    **rows("index_add", Rule(index_add, _split_dim("index_add"))),
    **rows("index_copy", Rule(index_copy, _split_dim("index_copy"))),
    **rows("index_fill.int_Scalar index_fill.int_Tensor", Rule(index_fill, _split_dim("index_fill"))),
    **rows("masked_scatter", Rule(masked_scatter)),
    **rows("masked_fill.Tensor", Rule("+p*, p*, + -> p*")),
    **rows("fill.Scalar", Rule("p* -> p*")),
    **rows("fill.Tensor", Rule("p*, -> p*")),
    **rows("select_scatter", Rule(select_scatter)),
    **rows("slice_scatter", Rule(slice_scatter)),
    **rows("diagonal", Rule(diagonal)),
    **rows("diagonal_scatter", Rule(diagonal_scatter)),
    **rows("diag_embed", Rule(diag_embed)),
    **rows("tril", Rule(triangle, Lowering("tril", _TRIANGLE_AXES, ordered=frozenset("rc")))),
    **rows("triu", Rule(triangle, Lowering("triu", _TRIANGLE_AXES, ordered=frozenset("rc")))),
    **rows("one_hot", Rule(one_hot, Lowering("one_hot", {"c": "class_axes"}, ordered=frozenset("c")))),
    **rows("searchsorted.Tensor", Rule(searchsorted)),
    **rows("bucketize.Tensor", Rule("b*, [s] -> b*")),
    **rows("repeat_interleave.self_int", Rule(repeat_interleave)),
    **rows("meshgrid meshgrid.indexing", Rule(meshgrid)),
}
