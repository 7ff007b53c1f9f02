"""Mixtures of experts whose experts are split: every rank runs its own, on tokens that it has or that are sent to it.

How many rows an expert gets depends on the values of tensors, on each rank differently; what must look at them runs rank by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .axes import Axis, position, ways
from .conversions import all_to_all

__all__ = ["experts", "grouped_mm"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _by_rank(function: Callable) -> Callable:
    """Run `function` on the tensors of one rank at a time."""

    @wraps(function)
    def run(*args: Any) -> Any:
        return handle_torch_function(run, args, *args) if has_torch_function(args) else function(*args)

    return run


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    expert_axes: Sequence[Axis] = (),
    exchange_axes: Sequence[Axis] = (),
) -> Tensor:
    """Every token through the experts that it chose, summed with its weights.

    hidden: (tokens, width). index, weights: (tokens, choices). gate_up: (experts, 2 * inner, width), down: (experts, width,
    inner). Experts are split on `expert_axes`; on those of them that are `exchange_axes` tokens are split too, and rows
    travel to the ranks of their experts and back. On the others each rank has all tokens and the result is P.

    Source: Lepikhin et al., GShard, 2020, section 3.2.
    """
    block = gate_up.shape[0] * ways(expert_axes)
    ids = index.reshape(-1)
    rows, origin = hidden, _positions(ids) // index.shape[1]
    trips: list[tuple[Axis, Tensor, Tensor, Tensor, Tensor]] = []
    exchanging = {axis.name for axis in exchange_axes}
    for axis in expert_axes:
        block = block // axis.size
        if axis.name in exchanging:
            order, sent = _sorted_by_expert(ids, block * axis.size), _count(ids, block * axis.size).view(axis.size, block)
            received = all_to_all(sent, axis, 0, (), 0, ())
            trips.append((axis, order, ids, sent.sum(1), received.sum(1)))
            rows = axis.exchange(rows[origin[order]], sent.sum(1), received.sum(1))
            ids = _ids_of(received, ids)
            origin = _positions(ids)
        else:
            local = ids - axis.rank * block
            ids = torch.where((local >= 0) & (local < block), local, block)  # `block` marks rows of other ranks' experts
    y = _run_experts(rows, origin, ids, gate_up, down, activation)
    for axis, order, before, sent, received in reversed(trips):
        y = _spread(axis.exchange(y, received, sent), order, before)
    return (y * weights.reshape(-1, 1)).view(index.shape[0], index.shape[1], -1).sum(1)


def _positions(x: Tensor) -> Tensor:
    """0, 1, 2, ... along a vector."""
    return torch.ones_like(x).cumsum(0) - 1


@_by_rank
def _sorted_by_expert(ids: Tensor, count: int) -> Tensor:
    """Positions of the rows of the first `count` experts, in the order of their experts."""
    order = ids.argsort(stable=True)
    return order if ids.is_meta else order[: int((ids < count).sum())]


@_by_rank
def _count(ids: Tensor, count: int) -> Tensor:
    """How many rows each of `count` experts gets."""
    return torch.zeros(count + 1, dtype=torch.int64, device=ids.device).index_add(0, ids, torch.ones_like(ids))[:count]


@_by_rank
def _ids_of(received: Tensor, like: Tensor) -> Tensor:
    """The expert of every received row; rows come by peer, of each peer by expert."""
    if received.is_meta:  # as many as were sent
        return like
    peers, block = received.shape
    return torch.arange(block, device=received.device).repeat(peers).repeat_interleave(received.flatten())


@_by_rank
def _spread(y: Tensor, order: Tensor, ids: Tensor) -> Tensor:
    """Rows back where they were taken from; zeros elsewhere."""
    return y.new_zeros(ids.shape[0], y.shape[1]).index_copy(0, order, y)


@_by_rank
def _run_experts(rows: Tensor, origin: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """The local experts on their rows, rows[origin[k]] for ids[k]; zeros for rows of others."""
    if rows.is_meta:
        return _feed_forward(rows[origin], lambda x, weight: F.linear(x, weight[0]), gate_up, down, activation)
    count = gate_up.shape[0]
    order, ends = _sorted_by_expert(ids, count), _count(ids, count).cumsum(0)
    return _spread(_feed_forward(rows[origin[order]], lambda x, w: _grouped(x, w, ends), gate_up, down, activation), order, ids)


def _feed_forward(x: Tensor, linear: Callable[[Tensor, Tensor], Tensor], gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(_ACTIVATIONS[activation](gate) * up, down)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[0] through weight[0], (out, in), up to ends[1] through weight[1], and so on to the last row."""
    if x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0:  # the kernel wants rows of 16 bytes
        return F.grouped_mm(x.contiguous(), weight.transpose(-2, -1), offs=ends.to(torch.int32))
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(piece, w) for piece, w in zip(x.split(sizes), weight.unbind(0), strict=True)])


def grouped_mm(
    x: Tensor, weight: Tensor, ends: Tensor, bias: None = None, out_dtype: torch.dtype | None = None, *, expert_axes: Sequence[Axis]
) -> Tensor:
    """Rows of x through the weights, (experts, in, out), of their experts, which are split: rows of others give zeros, the result is P.

    ends: for every expert of all ranks, the row after its last one.
    """
    return _grouped_part(x, weight, ends, position(expert_axes), out_dtype)


@_by_rank
def _grouped_part(x: Tensor, weight: Tensor, ends: Tensor, place: Any, out_dtype: torch.dtype | None) -> Tensor:
    if x.is_meta:
        return x @ weight[0]
    count = weight.shape[0]
    bounds = [0, *ends.tolist()]
    first = int(place) * count
    cuts = bounds[first : first + count + 1]
    pieces = x[cuts[0] : cuts[-1]].split([b - a for a, b in pairwise(cuts)])
    found = torch.cat([piece @ w for piece, w in zip(pieces, weight.unbind(0), strict=True)])
    return F.pad(found, (0, 0, cuts[0], x.shape[0] - cuts[-1])).to(out_dtype or x.dtype)
