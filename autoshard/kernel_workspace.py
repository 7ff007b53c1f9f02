"""Workspace: bytes that a kernel takes and gives back inside one op, where they are as large as its operands.

Found by measuring the CPU's kernels with torch's profiler, op by op; whole steps are compared in tests/benchmarks/memory_error.py. On
"cuda" only the copies that matrix products make are counted: what cuDNN takes depends on the algorithm that it picks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autoshard.torch_internals import FakeTensor, convolution_kernel, fake_mode

aten = torch.ops.aten
Described = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
_PRODUCTS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2)}


def described(x: Tensor) -> Described:
    """A tensor without its values."""
    return tuple(x.shape), x.stride(), x.dtype


def fake(x: Described) -> Tensor:
    """A tensor without memory that claims to lie on the CPU, to ask torch which kernel it would choose."""
    shape, strides, dtype = x
    return FakeTensor(_mode(), torch.empty_strided(shape, strides, dtype=dtype, device="meta"), torch.device("cpu"))


@cache
def _mode() -> Any:
    return fake_mode()


def workspace_bytes(op: Any, args: tuple, result: Any, is_cuda: bool) -> int:
    """What the kernel of `op` takes besides its `result`."""
    if op in _PRODUCTS:
        return sum(_copy_bytes(args[k]) for k in _PRODUCTS[op])
    return _ON_CPU[op](args, result) if op in _ON_CPU and not is_cuda else 0


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _copy_bytes(x: Tensor) -> int:
    """The copy that a matrix product makes of an operand whose strides the libraries cannot take."""
    rows, columns = x.stride()[-2:]
    fits = (columns == 1 and rows >= max(1, x.shape[-1])) or (rows == 1 and columns >= max(1, x.shape[-2]))
    return 0 if fits or min(x.shape[-2:]) <= 1 else _size(x)


def _convolution(args: tuple, result: Tensor) -> int:
    return _convolution_bytes(args[0], args[1], result, args[3:9], is_backward=False)


def _convolution_backward(args: tuple, result: Any) -> int:
    return _convolution_bytes(args[1], args[2], args[0], args[4:10], is_backward=True)


def _convolution_bytes(x: Tensor, weight: Tensor, y: Tensor, settings: tuple, is_backward: bool) -> int:
    """Copies in oneDNN's layouts, or columns: the windows of every position side by side."""
    stride, padding, _, is_transposed, _, groups = settings
    kernel = _convolution_kernel(described(x), described(weight), tuple(map(_hashable, settings)))
    if "Mkldnn" in kernel:
        return _size(y) + _size(x) if is_backward else max(_size(x) + _size(weight), _size(y))
    if "Slow" not in kernel or (math.prod(weight.shape[2:]) == 1 and set(stride) == {1} and set(padding) == {0}):
        return 0
    positions = math.prod((x if is_transposed else y).shape[2:])
    columns = x.shape[0] * math.prod(weight.shape[1:]) * positions * x.element_size()
    return columns + (_size(y) if groups > 1 else 0)


def _hashable(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, (list, tuple)) else setting


@cache
def _convolution_kernel(x: Described, weight: Described, settings: tuple) -> str:
    """Name of the kernel that torch chooses on the CPU."""
    given = [list(setting) if isinstance(setting, tuple) else setting for setting in settings]
    return convolution_kernel(fake(x), fake(weight), given)


def _attention(args: tuple, result: Any) -> int:
    rows, columns, per_thread = _attention_block(args[0], args[1])
    return per_thread * rows * (columns + 2 + args[0].shape[-1])


def _attention_backward(args: tuple, result: Any) -> int:
    rows, columns, per_thread = _attention_block(args[1], args[2])
    return per_thread * rows * (2 * columns + 1)


def _attention_block(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Rows and columns of the scores that a thread works on, and bytes of one number on all threads."""
    length = query.shape[-2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    wide = torch.promote_types(query.dtype, torch.float32).itemsize
    return min(rows, length), min(512, key.shape[-2]), torch.get_num_threads() * wide


def _batch_norm_backward(args: tuple, result: Any) -> int:
    return _size(args[1])


def _upsample(args: tuple, result: Tensor) -> int:
    """Copies with channels last."""
    return _size(args[0]) + _size(result) if args[0].dim() == 4 and args[0].shape[1] > 3 else 0


_ON_CPU: dict[Any, Callable[[tuple, Any], int]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.upsample_nearest2d.default: _upsample,
    aten.upsample_bilinear2d.default: _upsample,
}
