"""Weights that are gathered again in backward: what autograd keeps of them is the shard.

    @gathers_again
    def forward(self, x):
        w = all_gather_again(self.tensor("w"), dp, 0)      A | B  =>  AB | AB, kept: A | B

Inside a function that `gathers_again` wraps, a tensor that autograd saves and that lies in the memory of a gathered weight
(the weight itself, a view, a transpose) is replaced by the shard and the way from there; backward gathers when it needs the
tensor, once for every op that saved it. The gradient is that of all_gather. What is computed from a gathered weight into
memory of its own (a cast) is kept as it is. Inside a checkpointed region, which drops what it saves by itself, and outside
a wrapped function it is a plain all_gather. `torch.compile` breaks its graph at each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .axes import Axis, Collective, Segments

__all__ = ["all_gather_again", "all_gather_invariant_again", "gathers_again", "shards_kept"]

Make = Callable[[], Tensor]
_gathered: list[dict[int, tuple[StorageWeakRef, Make]]] = []  # of each wrapped function that runs, innermost last


class _Kept(NamedTuple):
    """A saved tensor: how to make its memory again, and where it lies in it."""

    make: Make
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class _Outer(NamedTuple):
    """A saved tensor as hooks around the program keep it."""

    packed: Any
    unpack: Callable[[Any], Tensor]


def gathers_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with weights that all_gather_again makes inside it kept as shards for backward."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with shards_kept():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def shards_kept() -> Iterator[None]:
    """Tensors that autograd saves inside and that lie in a gathered weight are kept as its shard."""
    known: dict[int, tuple[StorageWeakRef, Make]] = {}
    # torch asks the innermost hooks alone: those of torch.utils.checkpoint or save_on_cpu around the program are called from here.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    _gathered.append(known)
    try:
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, known, outer), _unpack):
            yield
    finally:
        _gathered.pop()


def _pack(known: dict[int, tuple[StorageWeakRef, Make]], outer: tuple[Callable, Callable] | None, x: Tensor) -> Any:
    # The address of a storage is not given away while a weak reference to it is held, so it cannot be mistaken for another.
    found = known.get(x.untyped_storage()._cdata) if known and x.layout is torch.strided and not (x.is_conj() or x.is_neg()) else None
    if found is None:
        return x if outer is None else _Outer(outer[0](x), outer[1])
    return _Kept(found[1], tuple(x.shape), x.stride(), int(x.storage_offset()), x.dtype)


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _Outer):
        return kept.unpack(kept.packed)
    if not isinstance(kept, _Kept):
        return kept
    with torch.no_grad():
        whole = kept.make()
    flat = whole if whole.dtype == kept.dtype else whole.view(kept.dtype)  # a view as complex or real numbers
    return flat.as_strided(kept.size, kept.stride, kept.offset)


def all_gather_again(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """S(dim) -> R, gathered once more in backward by every op that saves the result."""
    forward = Collective("all_gather", dim, segments, size=size)
    return _again(x, axis, forward, Collective("reduce_scatter", dim, segments, size=size, is_gradient=True))


def all_gather_invariant_again(x: Tensor, axis: Axis, dim: int, segments: Segments = (), size: int = 0) -> Tensor:
    """S(dim) -> I, gathered once more in backward by every op that saves the result."""
    forward = Collective("all_gather", dim, segments, size=size)
    return _again(x, axis, forward, Collective("slice", dim, segments, size=size, is_gradient=True))


@torch.compiler.disable  # what is kept is decided by where a tensor lies in memory, which a graph does not know
def _again(x: Tensor, axis: Axis, forward: Collective, backward: Collective) -> Tensor:
    result = axis.convert(x, forward, backward)
    if _gathered and torch.is_grad_enabled() and result is not x:
        for whole, make in axis.pieces_again(x, result, forward, _source):
            storage = whole.untyped_storage()
            _gathered[-1][storage._cdata] = StorageWeakRef(storage), make
    return result


def _source(x: Tensor) -> Make:
    """How to have `x` again: it was gathered on another axis before, or it is kept."""
    found = _gathered[-1].get(x.untyped_storage()._cdata)
    if found is not None:
        size, stride, offset, make = tuple(x.shape), x.stride(), int(x.storage_offset()), found[1]
        return lambda: make().as_strided(size, stride, offset)
    shard, leaf = x.detach(), _leaf(x)
    version = leaf._version

    def unchanged() -> Tensor:
        if leaf._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a weight of shape "
                f"{tuple(shard.shape)}, which backward gathers again, was written after forward; step the optimizer after backward"
            )
        return shard

    return unchanged


def _leaf(x: Tensor) -> Tensor:
    """The parameter that `x` is a part of, or x itself: writes to a DTensor count on it alone, not on its local tensor."""
    step = x.grad_fn
    while step is not None and not hasattr(step, "variable"):
        step = step.next_functions[0][0] if step.next_functions else None
    return x if step is None else step.variable
