"""What ops do on a device with memory and would not do without: the kernels they choose, what those take meanwhile, and autograd's
additions in place, which it leaves out while a dispatch mode looks on.

Two layers. `Kernels` stands before autograd and exchanges whole ops, as attention, that a device would run as one kernel and tensors
without memory as many. `Ops` stands behind autograd and runs single ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard import runtime
from autoshard.kernel_workspace import Described, described, fake, workspace_bytes
from autoshard.runtime import Collective, attention
from autoshard.torch_internals import holders, outside_modes, pytree, running_gradient

aten = torch.ops.aten
_ATTENTION = (aten.scaled_dot_product_attention.default, F.scaled_dot_product_attention)
_BLOCKS = {attention._block: 3, attention._block_gradient: 4}  # tensors of the scores' size that live at once
# Formulas of gradients that write into zeros they have just made, unless a dispatch mode looks on.
_IN_PLACE = {
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.index_put.default: aten.index_put_.default,
}


class BalancedAxis(runtime.Axis):
    """An axis on which as many rows come as go, where that depends on values."""

    def exchange(self, x: Tensor, sent: Tensor, received: Tensor) -> Tensor:
        return self.convert(x, Collective("rotate", 1), Collective("rotate", -1))


class Kernels(TorchFunctionMode):
    """While it is entered, attention and dropout on tensors without memory take and keep what the kernels of `device` do.

    Attention: the fused kernel where torch would choose it, which it decides by device; on "cuda" always but for float64 and for masks
    that have a gradient. Dropout on "cuda" keeps one byte per number. take: told of workspace.
    """

    def __init__(self, device: str, take: Callable[[int], None]) -> None:
        super().__init__()
        self.is_cuda, self.take = device == "cuda", take

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func in _ATTENTION:
            return self._attention(*args, **given)
        if func is aten.dropout.default and self.is_cuda and args[2] and 0 < args[1] < 1:
            return aten.native_dropout.default(args[0], args[1], True)[0]
        result = func(*args, **given)
        if func in _BLOCKS and args[0].is_meta:
            self.take(_BLOCKS[func] * _scores_bytes(args[0], args[1]))
        return result

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.is_cuda:
            is_fused = query.dtype != torch.float64 and query.dim() == 4 and not (attn_mask is not None and attn_mask.requires_grad)
            dropout_p = 0.0 if is_fused else dropout_p  # the kernel draws anew in backward
        else:
            mask = None if attn_mask is None else (described(attn_mask), attn_mask.requires_grad)
            is_fused = _is_fused_on_cpu(described(query), described(key), described(value), mask, dropout_p, is_causal, enable_gqa)
        if not is_fused or not query.is_meta:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask.logical_not(), -torch.inf, torch.zeros((), dtype=query.dtype, device=query.device))
        given = (query, key, value, dropout_p, is_causal)
        return aten._scaled_dot_product_flash_attention_for_cpu.default(*given, attn_mask=attn_mask, scale=scale)[0]


@cache
def _is_fused_on_cpu(
    query: Described,
    key: Described,
    value: Described,
    mask: tuple[Described, bool] | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether torch runs attention on the CPU as one kernel: it is asked, with fakes."""
    with torch.enable_grad(), outside_modes():
        q, k, v = (fake(x).requires_grad_() for x in (query, key, value))
        bias = fake(mask[0]).requires_grad_(mask[1]) if mask else None
        result = F.scaled_dot_product_attention(q, k, v, bias, dropout_p, is_causal, enable_gqa=enable_gqa)
    return "FlashAttention" in type(result.grad_fn).__name__


def _scores_bytes(query: Tensor, key: Tensor) -> int:
    """Bytes of the scores of one block of keys, in float32 or wider, of so many rows as run at a time."""
    across = math.prod(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])) * key.shape[-2]
    rows = min(query.shape[-2], max(1, attention._MOST_SCORES // max(1, across)))
    return rows * across * torch.promote_types(query.dtype, torch.float32).itemsize


class Ops:
    """Runs single ops for the recorder, and says which bytes a kernel of `device` takes and gives back."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.alone = _holders_of_a_lone_gradient()
        self._results: dict[Any, tuple[Described, ...] | None] = {}  # of calls seen; None: results share memory with operands

    def __call__(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, int]:
        if func is aten._local_scalar_dense.default:
            return 1, 0  # the number of a step, and the like: no memory depends on it
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0], 0  # as it does; without memory it would make a tensor
        if func is aten.add.Tensor and self._is_accumulation(*args[:2]):
            return args[0].add_(args[1]), 0
        if func in _IN_PLACE and running_gradient():
            return _IN_PLACE[func](*args, **kwargs), 0
        result = self._call(func, args, kwargs)
        return result, workspace_bytes(func, args, result, self.is_cuda)

    def _call(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """`func(*args)`; where an equal call was seen, tensors like its results, which saves most of the time."""
        if not _makes_tensors(func):
            return func(*args, **kwargs)
        key = (func, _frozen(args), _frozen(tuple(kwargs.items())))
        known = self._results.get(key)
        if known is not None:
            made = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in known]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        made = [result] if isinstance(result, Tensor) else list(result)
        given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if all(type(x) is Tensor and x.is_meta and x.untyped_storage()._cdata not in given for x in made):
            self._results[key] = tuple(map(described, made))
        return result

    def _is_accumulation(self, x: Any, y: Any) -> bool:
        """Whether autograd adds up two gradients of one value, of which it alone holds the first: without onlookers it adds in place.

        Gradients of parameters are DTensors, which it never adds in place.
        """
        running = running_gradient()
        if not running or "_AtRest" in running or not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return False
        if x.shape != y.shape or x.dtype != y.dtype or not aten.is_non_overlapping_and_dense.default(x):
            return False
        return all(mine <= alone for mine, alone in zip(holders(x), self.alone, strict=True))


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether the op says that it changes nothing and that all of its results are new tensors."""
    returns = func._schema.returns
    return not func._schema.is_mutable and bool(returns) and all(str(x.type) == "Tensor" and x.alias_info is None for x in returns)


def _frozen(value: Any) -> Any:
    """An argument as a dictionary's key."""
    if isinstance(value, Tensor):
        return described(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return (type(value), value)  # 1, 1.0 and True are equal and mean different calls


@cache
def _holders_of_a_lone_gradient() -> tuple[int, int]:
    """Holders of a gradient and of its storage, as counted in a dispatch mode, where autograd alone holds it: torch's versions differ."""
    found: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is aten.add.Tensor:
                found.append(holders(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad():
        x = torch.empty(2, device="meta", requires_grad=True) * 2
        y = x.sin() - x.cos()
        with Look():
            y.backward(torch.empty_like(y))
    return found[0]
