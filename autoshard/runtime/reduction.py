"""Reductions over split dims, and ops along one: `reduced_axes` and `dim_axes` split the dims that an op works on.

What a rank finds in its piece is combined: sums and maxima by all-reduce; what has a place (the first largest number, a
product with zeros in it, a norm) by gathering one number per rank, from which every rank computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, position, ways
from .conversions import all_gather, all_gather_invariant, maximum, sum_over, total, varied
from .precision import HALVES, narrow, widen

__all__ = [
    "all_of",
    "amax",
    "amin",
    "aminmax",
    "any_of",
    "argmax",
    "argmin",
    "cosine_similarity",
    "cumsum",
    "dist",
    "log_softmax",
    "logsumexp",
    "matrix_norm",
    "max_along",
    "mean",
    "min_along",
    "nanmean",
    "pairwise_distance",
    "prod",
    "softmax",
    "std",
    "std_mean",
    "var",
    "var_mean",
    "vector_norm",
]

Dims = int | Sequence[int] | None


def _dims(x: Tensor, dim: Dims) -> list[int]:
    """Dims that an int, a list or None (all) names."""
    return [dim] if isinstance(dim, int) else list(dim or range(x.dim()))


def softmax(x: Tensor, dim: int, dtype: torch.dtype | bool | None = None, *, dim_axes: Sequence[Axis]) -> Tensor:
    """Softmax over a split dim; `dtype` may be the flag half_to_float of the inner op."""
    grown = _shifted(x, dim, dtype, dim_axes).exp()
    return _as_asked(grown / sum_over(grown.sum(dim, keepdim=True), dim_axes), x, dtype)


def log_softmax(x: Tensor, dim: int, dtype: torch.dtype | bool | None = None, *, dim_axes: Sequence[Axis]) -> Tensor:
    """Logarithm of softmax."""
    shifted = _shifted(x, dim, dtype, dim_axes)
    return _as_asked(shifted - sum_over(shifted.exp().sum(dim, keepdim=True), dim_axes).log(), x, dtype)


def _shifted(x: Tensor, dim: int, dtype: torch.dtype | bool | None, axes: Sequence[Axis]) -> Tensor:
    """`x` less its maximum over `dim`, in float32 at least."""
    wide = widen(x if dtype is None or isinstance(dtype, bool) else x.to(dtype))
    return wide - maximum(wide.detach().amax(dim, keepdim=True), axes)


def _as_asked(y: Tensor, x: Tensor, dtype: torch.dtype | bool | None) -> Tensor:
    """`y` in the dtype of the op on `x`; autocast does not reach the inner op, which has a flag in place of a dtype."""
    if isinstance(dtype, bool):
        return y if dtype else y.to(x.dtype)
    return narrow(y, x.dtype) if dtype is None else y.to(dtype)


def logsumexp(x: Tensor, dim: Dims, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Logarithm of the sum of exponentials."""
    dims, wide = _dims(x, dim), widen(x)
    top = maximum(wide.detach().amax(dims, keepdim=True), reduced_axes)
    top = torch.where(top.isinf(), 0, top)
    result = total((wide - top).exp().sum(dims, keepdim=True), reduced_axes).log() + top
    return narrow(result if keepdim else result.squeeze(dims), x.dtype if x.dtype.is_floating_point else result.dtype)


def mean(
    x: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    reduced_axes: Sequence[Axis],
    reduced_sizes: Sequence[int] = (),
) -> Tensor:
    """Mean over dims that are split on `reduced_axes`: the local mean, weighted; the result is P.

    reduced_sizes: per axis the length of a dim that does not divide, 0 for others; `x` is zero at its padding.
    """
    local = x.mean(dtype=dtype) if dim is None else x.mean(_dims(x, dim), keepdim, dtype=dtype)
    count = float(ways(reduced_axes))
    for axis, size in zip(reduced_axes, reduced_sizes, strict=False):
        count *= size / (-(-size // axis.size) * axis.size) if size else 1.0
    return local / count


def nanmean(
    x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, reduced_axes: Sequence[Axis]
) -> Tensor:
    """Mean of what is a number; the result is P."""
    dims = _dims(x, dim)
    count = total((~x.isnan()).sum(dims, keepdim), reduced_axes)
    return x.nansum(dims, keepdim, dtype=dtype) / count


def var(x: Tensor, *args: Any, correction: float | None = None, keepdim: bool = False, reduced_axes: Sequence[Axis]) -> Tensor:
    """Variance; args: the op's own, in any of its forms: `unbiased`; or `dim`, `unbiased`, `keepdim`; or `dim` alone."""
    return _moments(x, args, correction, keepdim, reduced_axes)[0].to(x.dtype)


def var_mean(
    x: Tensor, *args: Any, correction: float | None = None, keepdim: bool = False, reduced_axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """Variance and mean."""
    variance, average = _moments(x, args, correction, keepdim, reduced_axes)
    return variance.to(x.dtype), average.to(x.dtype)


def std(x: Tensor, *args: Any, correction: float | None = None, keepdim: bool = False, reduced_axes: Sequence[Axis]) -> Tensor:
    """Standard deviation, whose gradient is zero where it is zero."""
    return _root(_moments(x, args, correction, keepdim, reduced_axes)[0]).to(x.dtype)


def std_mean(
    x: Tensor, *args: Any, correction: float | None = None, keepdim: bool = False, reduced_axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean."""
    variance, average = _moments(x, args, correction, keepdim, reduced_axes)
    return _root(variance).to(x.dtype), average.to(x.dtype)


def _moments(x: Tensor, args: Sequence[Any], correction: float | None, keepdim: bool, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Variance and mean, in float32 at least."""
    given = (None, *args) if args and isinstance(args[0], bool) else args  # dim, correction or whether unbiased, keepdim
    dims = _dims(x, given[0] if given else None)
    correction = given[1] if len(given) > 1 else 1 if correction is None else correction
    keepdim = given[2] if len(given) > 2 else keepdim
    x = widen(x)
    count = math.prod([x.shape[dim] for dim in dims]) * ways(axes)
    average = total(x.sum(dims, keepdim=True), axes) / count
    centered = x - varied(average, axes)
    variance = total((centered * centered).sum(dims, keepdim=True), axes) / max(count - correction, 0)
    return (variance, average) if keepdim else (variance.squeeze(dims), average.squeeze(dims))


def _root(variance: Tensor) -> Tensor:
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), variance)


def amax(x: Tensor, dim: Dims = None, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Largest number; where several are, on whatever rank, they share the gradient evenly."""
    dims = _dims(x, dim)
    if x.dtype == torch.bool:
        return amax(x.to(torch.uint8), dims, keepdim, reduced_axes=reduced_axes).bool()
    top = maximum(x.detach().amax(dims, keepdim=True), reduced_axes)
    if x.dtype.is_floating_point:
        is_top = (x == top) | x.isnan()  # some backends' maximum leaves out what is no number
        count = total(is_top.sum(dims, keepdim=True), reduced_axes)
        shared = total(torch.where(is_top, x / count, 0).sum(dims, keepdim=True), reduced_axes)
        top = torch.where(top.isfinite(), shared + (top - shared).detach(), shared)  # the number itself, not rounded
    return top if keepdim else top.squeeze(dims)


def amin(x: Tensor, dim: Dims = None, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Smallest number."""
    if x.dtype.is_floating_point:
        return -amax(-x, dim, keepdim, reduced_axes=reduced_axes)
    return ~amax(~x, dim, keepdim, reduced_axes=reduced_axes)  # turns integers around without overflow


def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False, reduced_axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Smallest and largest number."""
    return amin(x, dim, keepdim, reduced_axes=reduced_axes), amax(x, dim, keepdim, reduced_axes=reduced_axes)


def max_along(x: Tensor, dim: int, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Largest number along a dim and where it first is; that one gets the gradient."""
    return _first(torch.max, x, dim, keepdim, reduced_axes)


def min_along(x: Tensor, dim: int, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Smallest number along a dim and where it first is; that one gets the gradient."""
    return _first(torch.min, x, dim, keepdim, reduced_axes)


def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Where the largest number first is; with no dim, counted over all, of which the first may be split."""
    return _place(torch.max, x, dim, keepdim, reduced_axes)


def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Where the smallest number first is; with no dim, counted over all, of which the first may be split."""
    return _place(torch.min, x, dim, keepdim, reduced_axes)


def _place(choose: Callable[..., Any], x: Tensor, dim: int | None, keepdim: bool, axes: Sequence[Axis]) -> Tensor:
    if dim is not None:
        return _first(choose, x.detach(), dim, keepdim, axes)[1]
    place = _first(choose, x.detach().flatten(), 0, False, axes)[1]
    return place.reshape([1] * x.dim()) if keepdim else place


def _first(choose: Callable[..., Any], x: Tensor, dim: int, keepdim: bool, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """What `choose` (torch.max or torch.min) finds along a split dim: pieces lie in order, so the first of the first ones."""
    found = choose(x, dim, keepdim)
    values, places = found[0], found[1] + position(axes) * x.shape[dim]
    for axis in reversed(axes):
        found = choose(all_gather_invariant(values.unsqueeze(0), axis, 0), 0, True)
        places = all_gather_invariant(places.unsqueeze(0), axis, 0).gather(0, found[1]).squeeze(0)
        values = found[0].squeeze(0)
    return values, places


def cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None, dim_axes: Sequence[Axis]) -> Tensor:
    """Running sum along a split dim: the local one, and the sums of the pieces before."""
    wanted = dtype or x.dtype
    local = x.cumsum(dim, dtype=torch.float32 if wanted in HALVES else dtype)
    piece = local.narrow(dim, -1, 1)
    result = local
    for axis in reversed(dim_axes):
        pieces = all_gather(piece.unsqueeze(0), axis, 0)
        is_before = (torch.arange(axis.size, device=x.device) < axis.rank).view(-1, *[1] * x.dim())
        result = result + torch.where(is_before, pieces, 0).sum(0)
        piece = pieces.sum(0)
    if dtype is not None:
        return result.to(dtype)
    return narrow(result, wanted) if wanted in HALVES else result


def vector_norm(
    x: Tensor,
    order: float | None = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    reduced_axes: Sequence[Axis],
) -> Tensor:
    """Norm over split dims: the norm of the pieces' norms, or the extreme absolute number."""
    result = _norm(widen(x if dtype is None else x.to(dtype)), 2.0 if order is None else float(order), _dims(x, dim), keepdim, reduced_axes)
    return narrow(result, x.dtype) if dtype is None else result.to(dtype)


def _norm(x: Tensor, order: float, dims: list[int], keepdim: bool, axes: Sequence[Axis]) -> Tensor:
    if math.isinf(order):
        return (amax if order > 0 else amin)(x.abs(), dims, keepdim, reduced_axes=axes)
    local = torch.linalg.vector_norm(x, order, dims, keepdim)
    if order in (0, 1):
        return total(local, axes)
    for axis in reversed(axes):
        local = torch.linalg.vector_norm(all_gather_invariant(local.unsqueeze(0), axis, 0), order, 0)
    return local


def matrix_norm(
    x: Tensor,
    order: str = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    reduced_axes: Sequence[Axis],
) -> Tensor:
    """Frobenius norm of matrices with split dims."""
    return vector_norm(x, 2, dim, keepdim, dtype=dtype, reduced_axes=reduced_axes)


def dist(x: Tensor, y: Tensor, p: float = 2, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Norm of the difference."""
    apart = widen(x) - widen(y)
    result = _norm(apart, p, _dims(apart, None), False, reduced_axes)
    return narrow(result, torch.promote_types(x.dtype, y.dtype))


def pairwise_distance(
    x: Tensor, y: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False, *, reduced_axes: Sequence[Axis]
) -> Tensor:
    """Norm of the difference over a last dim that is split."""
    result = _norm(widen(x) - widen(y) + eps, p, [-1], keepdim, reduced_axes)
    return narrow(result, torch.promote_types(x.dtype, y.dtype))


def cosine_similarity(x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Product of both over their norms along a split dim; the result is P."""
    both = torch.broadcast_tensors(widen(x), widen(y))
    product = _unit(both[0], dim, eps, reduced_axes) * _unit(both[1], dim, eps, reduced_axes)
    return narrow(product.sum(dim), torch.promote_types(x.dtype, y.dtype))


def _unit(x: Tensor, dim: int, eps: float, axes: Sequence[Axis]) -> Tensor:
    """`x` over its norm, which counts as `eps` at least; the gradient of a small norm passes that bound, as in the op."""
    norm = _norm(x, 2.0, [dim], True, axes)
    return x / varied(norm + (norm.clamp_min(eps) - norm).detach(), axes)


def prod(
    x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, reduced_axes: Sequence[Axis]
) -> Tensor:
    """Product: that of the pieces' products, whose gradient is right where some are zero."""
    wanted = dtype or x.dtype
    wide = torch.float32 if wanted in HALVES else dtype
    local = x.prod(dtype=wide) if dim is None else x.prod(dim, keepdim, dtype=wide)
    for axis in reversed(reduced_axes):
        local = all_gather_invariant(local.unsqueeze(0), axis, 0).prod(0)
    if dtype is not None:
        return local.to(dtype)
    return narrow(local, wanted, ("cuda", "cpu")) if wanted in HALVES else local


def any_of(x: Tensor, dim: Dims = None, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Whether any is true."""
    local = torch.any(x) if dim is None else torch.any(x, _dims(x, dim), keepdim)
    return maximum(local.to(torch.uint8), reduced_axes).to(local.dtype)


def all_of(x: Tensor, dim: Dims = None, keepdim: bool = False, *, reduced_axes: Sequence[Axis]) -> Tensor:
    """Whether all are true."""
    local = torch.all(x) if dim is None else torch.all(x, _dims(x, dim), keepdim)
    return (1 - maximum(1 - local.to(torch.uint8), reduced_axes)).to(local.dtype)
