"""Reductions, and ops along one dim."""

from __future__ import annotations

from autoshard.ops.row import Call, Lowering, Rule, dims_of, letters, rows, spell


def whole_dim(call: Call) -> str:
    """Works along one dim, or along all; the others are untouched."""
    ndim = len(call.inputs[0].shape)
    if call.get("dim") is None:
        return spell([" ".join(f"[{n}]" for n in letters(ndim))], [" ".join("1" for _ in call.outputs[0].shape)])
    dim = call.get("dim") % max(ndim, 1)
    names = letters(ndim)
    out = [f"[{n}]" if k == dim else n for k, n in enumerate(names)]
    if len(call.outputs[0].shape) < ndim or (call.outputs[0].shape and call.outputs[0].shape[dim] != call.inputs[0].shape[dim]):
        kept = ["1" if k == dim else n for k, n in enumerate(names)]
        return spell([" ".join(out)], [" ".join(n for k, n in enumerate(kept) if call.get("keepdim") or k != dim)])
    return spell([" ".join(out)], [" ".join(out)])


def _reduced(call: Call, mark: str, whole: bool) -> str:
    ndim = len(call.inputs[0].shape)
    over = set(dims_of(call, "dim", ndim))
    names = [f"d{k}" if k in over else f"k{k}" for k in range(ndim)]
    kept = ["1" if k in over else n for k, n in enumerate(names) if k not in over or call.get("keepdim")]
    source = [f"[{n}]" if whole and k in over else n for k, n in enumerate(names)]
    return spell([mark + " ".join(source)], [" ".join(kept)])


def reduction(call: Call) -> str:
    """Sums over dims; terms must not be rounded to integers first."""
    rounds = call.inputs[0].dtype.is_floating_point and not call.outputs[0].dtype.is_floating_point
    return _reduced(call, "" if rounds else "~", False)


def whole_reduction(call: Call) -> str:
    """Reduces dims that stay whole."""
    return _reduced(call, "", True)


ROWS: dict[str, Rule] = {
    **rows("softmax.int log_softmax.int _softmax cumsum argmax", Rule(whole_dim)),
    **rows("sum sum.dim_IntList", Rule(reduction)),
    **rows("mean mean.dim", Rule(reduction, Lowering("mean", {"d": "reduced_axes"}))),
    **rows("amax amin var.correction std.correction", Rule(whole_reduction)),
}
