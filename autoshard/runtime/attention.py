"""Attention over split sequences: queries under a causal mask, keys, and both on one axis (ring attention).

softmax(q k^T) v is computed block by block of keys. Each block gives a result and the logarithm of the sum of its exponentials, by
which results are merged. Nothing of a block is kept: backward computes its probabilities again from the logarithm of the whole sum,
and where keys go round the ring they go round again, their gradients with them. Source: Liu et al., Ring Attention with Blockwise
Transformers (2023); Dao et al., FlashAttention (2022), for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .axes import Axis, position, ways
from .conversions import rotate, sum_over

__all__ = ["split_attention"]

_MOST_SCORES = 2**26  # of one block, in memory at a time


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_axes: Sequence[Axis] = (),
    key_axes: Sequence[Axis] = (),
    head_axes: Sequence[Axis] = (),
) -> Tensor:
    """Attention with queries split on `query_axes`, keys and values on `key_axes`; the mask holds this rank's rows and every column.

    On axes of both, keys and values go round the ring, and the result is split as the queries are. On axes of `key_axes` alone the
    result is P: each rank's keys give a term. Queries alone are masked by their position: kernels without masks cannot be used then.
    On `head_axes` heads of queries alone are split: keys and values hold all of theirs, of which a rank needs those that its own share.
    """
    if head_axes:
        key, value = _shared_heads(query, key, head_axes), _shared_heads(query, value, head_axes)
    if not key_axes and not (query_axes and is_causal):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if not key_axes:
        length = query.shape[-2]
        rows = torch.arange(length, device=query.device).unsqueeze(1) + position(query_axes) * length
        seen = rows >= torch.arange(key.shape[-2], device=query.device)
        return F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=enable_gqa)
    kind = "cpu" if query.device.type == "meta" else query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    groups = key.shape[-3] if enable_gqa and key.shape[-3] != query.shape[-3] else 0
    if groups:
        query, key, value = query.unflatten(-3, (groups, -1)), key.unsqueeze(-3), value.unsqueeze(-3)
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.unsqueeze(-3) if attn_mask.shape[-3] == 1 else attn_mask.unflatten(-3, (groups, -1))
    names = {axis.name for axis in query_axes}
    ring, apart = [axis for axis in key_axes if axis.name in names], [axis for axis in key_axes if axis.name not in names]
    setting = _Setting(is_causal, query.shape[-1] ** -0.5 if scale is None else scale, query_axes, key_axes, ring, apart)
    with torch.autocast(kind, enabled=False):
        result = key_axes[0].apply(_Attention, query, key, value, attn_mask, setting)
    return result.flatten(-4, -3) if groups else result


def _shared_heads(query: Tensor, x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The heads of keys or values that this rank's heads of queries share, each as often as equal shares of those take."""
    heads = query.shape[-3]
    size = heads * ways(axes) // x.shape[-3]  # of a group
    alike = math.gcd(heads, size)  # neighbours that surely share one
    first = torch.arange(0, heads, alike, device=query.device) + position(axes) * heads
    return x.index_select(x.dim() - 3, first // size)


class _Setting(NamedTuple):
    is_causal: bool
    scale: float
    query_axes: Sequence[Axis]
    key_axes: Sequence[Axis]
    ring: Sequence[Axis]  # of both
    apart: Sequence[Axis]  # of keys alone

    def first_key(self, steps: Sequence[int], length: int) -> int:
        """Position of the first key of the block that a rank holds after so many steps on each axis of the ring."""
        taken = {axis.name: step for axis, step in zip(self.ring, steps, strict=True)}
        number = 0
        for axis in self.key_axes:
            number = number * axis.size + (axis.rank - taken.get(axis.name, 0)) % axis.size
        return number * length


class _Attention(torch.autograd.Function):
    """The whole of it with its own backward; Axis.apply lets the simulator run it on all ranks at once."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, setting: _Setting) -> Tensor:
        row = position(setting.query_axes) * query.shape[-2]
        found: list[tuple[Tensor, Tensor]] = []

        def visit(steps: tuple[int, ...], key: Tensor, value: Tensor) -> None:
            block = _block(query, key, value, mask, setting.is_causal, setting.scale, row, setting.first_key(steps, key.shape[-2]))
            found[:] = [_merge(found[0], (block[0], block[1])) if found else (block[0], block[1])]

        _go_round(setting.ring, (), key, value, visit)
        out, log_total = found[0]
        if setting.apart:
            out, log_total = _merge_over(out, log_total, setting.apart)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, out, log_total)
        ctx.setting = setting
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, log_total = ctx.saved_tensors
        setting = ctx.setting
        row = position(setting.query_axes) * query.shape[-2]
        grad = grad.to(log_total.dtype)
        share = sum_over((grad * out).sum(-1, keepdim=True), setting.apart)
        totals: list[Any] = []

        def visit(steps: tuple[int, ...], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            column = setting.first_key(steps, key.shape[-2])
            saved = (grad, log_total, share, ctx.needs_input_grad[3])
            block = _block_gradient(query, key, value, mask, setting.is_causal, setting.scale, row, column, *saved)
            totals[:] = [totals[0] + block[0], totals[1] + block[3]] if totals else [block[0], block[3]]
            return block[1], block[2]

        of_key, of_value = _return_home(setting.ring, (), key, value, visit)
        of_mask = totals[1].to(mask.dtype) if ctx.needs_input_grad[3] else None
        return totals[0].to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_mask, None


def _go_round(ring: Sequence[Axis], steps: tuple[int, ...], key: Tensor, value: Tensor, visit: Callable[..., None]) -> None:
    """Visit every block of keys and values that the ranks of `ring` hold, this rank's own first."""
    if not ring:
        visit(steps, key, value)
        return
    for step in range(ring[0].size):
        if step:
            key, value = rotate(key, ring[0], 1), rotate(value, ring[0], 1)
        _go_round(ring[1:], (*steps, step), key, value, visit)


def _return_home(
    ring: Sequence[Axis], steps: tuple[int, ...], key: Tensor, value: Tensor, visit: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """As _go_round; the gradients of keys and values go with them, until all have come back to their own rank."""
    if not ring:
        return visit(steps, key, value)
    totals: tuple[Tensor, Tensor] | None = None
    for step in range(ring[0].size):
        if step:
            key, value = rotate(key, ring[0], 1), rotate(value, ring[0], 1)
        found = _return_home(ring[1:], (*steps, step), key, value, visit)
        totals = found if totals is None else (totals[0] + found[0], totals[1] + found[1])
        totals = rotate(totals[0], ring[0], 1), rotate(totals[1], ring[0], 1)
    assert totals is not None
    return totals


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two blocks, from their results and the logarithms of their sums."""
    if a[0].is_meta:
        return a  # tensors without memory are there to find out what is sent
    log_total = torch.logaddexp(a[1], b[1])
    return a[0] * _weight(a[1], log_total) + b[0] * _weight(b[1], log_total), log_total


def _merge_over(out: Tensor, log_sum: Tensor, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """This rank's term of attention over the keys of all ranks of `axes`, and the logarithm of the whole sum."""
    top = log_sum
    for axis in axes:
        top = axis.maximum(top)
    log_total = sum_over(_weight(log_sum, top), axes).log() + top
    return out * _weight(log_sum, log_total), log_total


def _weight(log_part: Tensor, log_total: Tensor) -> Tensor:
    """The share of a part in a total; nothing of nothing is nothing: rows of which no key is seen are zero, as the op makes them."""
    return torch.exp(log_part - _finite(log_total))


def _finite(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).min)


def _block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, row: int, column: int
) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys and the logarithm of its sum; `row` and `column` are the positions of its corner."""
    if has_torch_function((query,)):
        return handle_torch_function(_block, (query,), query, key, value, mask, is_causal, scale, row, column)
    if _is_unseen(query, is_causal, int(row), int(column)):
        batch, wide = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros((*batch, query.shape[-2], value.shape[-1]), dtype=wide)
        return out, torch.full_like(out[..., :1], -torch.inf)
    outs, logs = [], []
    for rows in _chunks(query, key):
        scores = _scores(query[..., rows, :], key, mask, is_causal, scale, int(row), int(column), rows)
        top = _finite(scores.amax(-1, keepdim=True))
        shares = torch.exp(scores - top)
        total = shares.sum(-1, keepdim=True)
        outs.append(shares @ value.to(shares.dtype) / total.clamp(min=1.0))  # at least 1, but where no key is seen
        logs.append(total.log() + top)
    return torch.cat(outs, -2), torch.cat(logs, -2)


def _block_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    row: int,
    column: int,
    grad: Tensor,
    log_total: Tensor,
    share: Tensor,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one block of keys adds to the gradients of queries, keys, values and the mask (a zero where it wants none)."""
    if has_torch_function((query,)):
        given = (query, key, value, mask, is_causal, scale, row, column, grad, log_total, share, wants_mask)
        return handle_torch_function(_block_gradient, (query,), *given)
    wide = grad.dtype
    of_queries = []
    of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    of_mask = torch.zeros_like(mask, dtype=wide) if mask is not None and wants_mask else grad.new_zeros(())
    if _is_unseen(query, is_causal, int(row), int(column)):
        return torch.zeros_like(query, dtype=wide), of_key, of_value, of_mask
    for rows in _chunks(query, key):
        piece, upstream = query[..., rows, :], grad[..., rows, :]
        scores = _scores(piece, key, mask, is_causal, scale, int(row), int(column), rows)
        shares = torch.exp(scores - _finite(log_total[..., rows, :]))
        of_value += (shares.mT @ upstream).sum_to_size(value.shape)
        of_scores = shares * (upstream @ value.to(wide).mT - share[..., rows, :])
        of_queries.append((of_scores @ key.to(wide) * scale).sum_to_size(piece.shape))
        of_key += (of_scores.mT @ piece.to(wide) * scale).sum_to_size(key.shape)
        if wants_mask:
            part = _of_block(of_mask, rows, int(column), key.shape[-2])
            part += of_scores.sum_to_size(part.shape)
    return torch.cat(of_queries, -2), of_key, of_value, of_mask


def _is_unseen(query: Tensor, is_causal: bool, row: int, column: int) -> bool:
    """Whether all keys of a block come after all queries, or tensors have no memory: they are there to find out what is sent."""
    return query.is_meta or (is_causal and column >= row + query.shape[-2])


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    """Rows of the queries, so many at a time that their scores fit."""
    across = math.prod(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])) * key.shape[-2]
    count, step = query.shape[-2], max(1, _MOST_SCORES // max(1, across))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, row: int, column: int, rows: slice) -> Tensor:
    """Masked scores of some rows of a block, in float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * scale
    if mask is not None:
        part = _of_block(mask, rows, column, key.shape[-2])
        scores = scores.masked_fill(~part, -torch.inf) if mask.dtype == torch.bool else scores + part
    if is_causal:
        at = torch.arange(rows.start, rows.stop, device=query.device).unsqueeze(1) + row
        scores = scores.masked_fill(at < torch.arange(key.shape[-2], device=query.device) + column, -torch.inf)
    return scores


def _of_block(mask: Tensor, rows: slice, column: int, length: int) -> Tensor:
    """The part of a mask on some rows and on `length` columns from `column`; where it has one row or column, that."""
    columns = slice(column, column + length) if mask.shape[-1] > 1 else slice(None)
    return mask[..., rows if mask.shape[-2] > 1 else slice(None), columns]
