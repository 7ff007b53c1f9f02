"""Reductions, and ops along one dim. Dims that an op works on are factors d0, d1, ..., the others k0, k1, ..."""

from __future__ import annotations

import math
from collections.abc import Iterable

from autoshard.ops.row import Call, Lowering, Rule, dims_of, letters, rows, spell

DIMS = frozenset("d")


def _names(call: Call, over: Iterable[int], whole: bool = False) -> list[str]:
    """A term for each dim of the first input; those the op works `over` are whole if so."""
    over = set(over)
    return [(f"[d{k}]" if whole else f"d{k}") if k in over else f"k{k}" for k in range(len(call.inputs[0].shape))]


def _along(call: Call, mark: str = "", whole: bool = False) -> str:
    """Every output has the input's shape."""
    names = " ".join(_names(call, dims_of(call, "dim", len(call.inputs[0].shape)), whole))
    return spell([mark + names], [names] * len(call.outputs))


def _reduced(call: Call, mark: str = "", whole: bool = False) -> str:
    """Every output lacks the dims that the op works over, or has length 1 there."""
    over = dims_of(call, "dim", len(call.inputs[0].shape))
    names = _names(call, over, whole)
    kept = ["1" if k in over else name for k, name in enumerate(names) if k not in over or call.get("keepdim")]
    return spell([mark + " ".join(names)], [" ".join(kept)] * len(call.outputs))


def _mark(call: Call) -> str:
    """Sums are linear, but terms must not be rounded to integers first."""
    return "" if call.inputs[0].dtype.is_floating_point and not call.outputs[0].dtype.is_floating_point else "~"


def along_dim(call: Call) -> str:
    """Works along one dim, which a lowering splits; the others are untouched."""
    return _along(call)


def running_sum(call: Call) -> str:
    """Sums along one dim, which a lowering splits; the others are untouched."""
    return _along(call, _mark(call))


def along_whole_dim(call: Call) -> str:
    """Works along one dim, whose order it needs, so that it stays whole; the others are untouched."""
    return _along(call, whole=True)


def sort(call: Call) -> str:
    """Sorts along one dim, which stays whole: any number may go to any rank, so that each would need all; the others are untouched."""
    dim = call.get("dim", 0) % max(len(call.inputs[0].shape), 1)
    names = " ".join(_names(call, [dim], whole=True))
    return spell([names], [names] * len(call.outputs))


def topk(call: Call) -> str:
    """Chooses along one dim, which a lowering splits. Which of equal numbers it is, torch leaves open; integers, often equal: whole."""
    dim = call.get("dim") % max(len(call.inputs[0].shape), 1)
    names = _names(call, [dim], whole=not call.inputs[0].dtype.is_floating_point)
    return spell([" ".join(names)], [" ".join("[t]" if k == dim else name for k, name in enumerate(names))] * 2)


def kth(call: Call) -> str:
    """One number along one dim, which a lowering splits, with equal numbers as in topk."""
    return _reduced(call, whole=not call.inputs[0].dtype.is_floating_point)


def reduction(call: Call) -> str:
    """Sums over dims; terms must not be rounded to integers first."""
    return _reduced(call, _mark(call))


def counted(call: Call) -> str:
    """Adds up over dims what it makes of each number."""
    return _reduced(call)


def settled_reduction(call: Call) -> str:
    """Reduces dims, over which a lowering combines what the pieces give."""
    return _reduced(call, whole=call.inputs[0].dtype.is_complex)


def whole_reduction(call: Call) -> str:
    """Reduces dims that stay whole: the order of all their numbers counts, so that a rank would need most of them."""
    return _reduced(call, whole=True)


def truth(call: Call) -> str:
    """Reduces dims, over which a lowering combines; an empty list of dims reduces none, and all stay whole."""
    if call.op in ("aten.any.dims", "aten.all.dims") and call.get("dim") == []:
        names = " ".join(f"[{name}]" for name in letters(len(call.inputs[0].shape)))
        return spell([names], [names])
    return _reduced(call)


def place(call: Call) -> str:
    """Where an extreme number is; the place among all counts along the first dim alone, so the others stay whole."""
    if call.get("dim") is not None:
        return _reduced(call)
    ndim = len(call.inputs[0].shape)
    names = ["d0", *(f"[{name}]" for name in letters(ndim, "m")[1:])][:ndim]
    return spell([" ".join(names)], ["1 " * len(call.outputs[0].shape)])


def vector_norm(call: Call) -> str:
    """Norm over dims by the pieces' norms; of a negative order, of a matrix, or of complex numbers the dims stay whole."""
    order = call.get("ord", call.get("p", 2))
    order = 2.0 if order in (None, "fro") else order
    dims = call.get("dim")
    is_matrix = call.op == "aten.linalg_norm.default" and call.get("ord") is not None and (dims is None or len(dims) > 1)
    is_matrix = is_matrix and len(call.inputs[0].shape) > 1
    splits = not isinstance(order, str) and (order >= 0 or math.isinf(order)) and not is_matrix
    return _reduced(call, whole=not splits or call.inputs[0].dtype.is_complex)


def histogram(call: Call) -> str:
    """Counts add up; bounds that are read off the numbers keep all whole."""
    is_open = call.get("min") == call.get("max")
    return spell([" ".join(_names(call, range(len(call.inputs[0].shape)), whole=is_open))], ["[h]"])


def distance(call: Call) -> str:
    """Norm of a difference, with broadcasting; of a negative order all stays whole."""
    return "d*, d* -> " if call.get("p") >= 0 else "[d*], [d*] -> "


def pairwise_distance(call: Call) -> str:
    """Norm of differences over the last dim; of a negative order it stays whole."""
    last = "d" if call.get("p") >= 0 else "[d]"
    return f"b* {last}, b* {last} -> b*{' 1' if call.get('keepdim') else ''}"


def cosine_similarity(call: Call) -> str:
    """Sums over one dim, with broadcasting."""
    ndim = len(call.outputs[0].shape) + 1
    dim = call.get("dim") % ndim
    names = [f"d{k}" if k == dim else f"k{k}" for k in range(ndim)]
    operands = [" ".join(names[ndim - len(t.shape) :]) for t in call.inputs]
    return spell(operands, [" ".join(name for k, name in enumerate(names) if k != dim)])


def renorm(call: Call) -> str:
    """Each slice along one dim by itself; the other dims stay whole."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dim") % ndim
    names = " ".join(_names(call, [k for k in range(ndim) if k != dim], whole=True))
    return spell([names], [names])


_SPLIT = {"d": "reduced_axes"}
_ALONG = {"d": "dim_axes"}


def _settled(function: str) -> Lowering:
    return Lowering(function, _SPLIT, DIMS)


ROWS: dict[str, Rule] = {
    **rows("softmax.int _softmax", Rule(along_dim, Lowering("softmax", _ALONG))),
    **rows("log_softmax.int _log_softmax", Rule(along_dim, Lowering("log_softmax", _ALONG))),
    **rows("cumsum", Rule(running_sum, Lowering("cumsum", _ALONG, ordered=DIMS))),
    **rows("_safe_softmax cumprod logcumsumexp cummax cummin", Rule(along_whole_dim)),
    **rows("sort sort.stable argsort argsort.stable msort", Rule(sort)),
    **rows("topk", Rule(topk, Lowering("topk", _ALONG, DIMS, DIMS))),
    **rows("kthvalue", Rule(kth, Lowering("kthvalue", _ALONG, DIMS, DIMS))),
    **rows("sum sum.dim_IntList", Rule(reduction)),
    **rows("nansum count_nonzero count_nonzero.dim_IntList", Rule(counted)),
    **rows("mean mean.dim", Rule(reduction, Lowering("mean", _SPLIT, uneven=DIMS))),
    **rows("nanmean", Rule(counted, Lowering("nanmean", _SPLIT))),
    **rows("var var.dim var.correction", Rule(settled_reduction, _settled("var"))),
    **rows("std std.dim std.correction", Rule(settled_reduction, _settled("std"))),
    **rows("var_mean var_mean.dim var_mean.correction", Rule(settled_reduction, _settled("var_mean"))),
    **rows("std_mean std_mean.dim std_mean.correction", Rule(settled_reduction, _settled("std_mean"))),
    **rows("amax max", Rule(settled_reduction, _settled("amax"))),
    **rows("amin min", Rule(settled_reduction, _settled("amin"))),
    **rows("aminmax", Rule(settled_reduction, _settled("aminmax"))),
    **rows("max.dim", Rule(settled_reduction, Lowering("max_along", _SPLIT, DIMS, DIMS))),
    **rows("min.dim", Rule(settled_reduction, Lowering("min_along", _SPLIT, DIMS, DIMS))),
    **rows("argmax", Rule(place, Lowering("argmax", _SPLIT, DIMS, DIMS))),
    **rows("argmin", Rule(place, Lowering("argmin", _SPLIT, DIMS, DIMS))),
    **rows("logsumexp", Rule(settled_reduction, _settled("logsumexp"))),
    **rows("prod prod.dim_int", Rule(settled_reduction, _settled("prod"))),
    **rows("any any.dim any.dims _is_any_true", Rule(truth, _settled("any_of"))),
    **rows("all all.dim all.dims _is_all_true", Rule(truth, _settled("all_of"))),
    **rows(
        "linalg_vector_norm linalg_norm norm.Scalar norm.ScalarOpt_dim",
        Rule(vector_norm, _settled("vector_norm")),
    ),
    **rows("linalg_matrix_norm.str_ord", Rule(vector_norm, _settled("matrix_norm"))),
    **rows("dist", Rule(distance, _settled("dist"))),
    **rows("pairwise_distance", Rule(pairwise_distance, _settled("pairwise_distance"))),
    **rows("cosine_similarity", Rule(cosine_similarity, Lowering("cosine_similarity", _SPLIT))),
    **rows("histc", Rule(histogram)),
    **rows("trace", Rule("[m] [n] -> ")),
    **rows("renorm", Rule(renorm)),
    **rows(
        "median median.dim nanmedian nanmedian.dim mode quantile.scalar nanquantile.scalar trapezoid.dx",
        Rule(whole_reduction),
    ),
}
