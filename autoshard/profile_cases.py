"""What a profile times on one device: matrix products, attention, convolution and memory-bound ops, over sizes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One call. shapes: of its tensor arguments, which all need gradients. family: cases that differ in size alone, in order."""

    kind: str
    family: str
    what: str
    dtype: torch.dtype
    function: Function
    shapes: tuple[tuple[int, ...], ...]
    flops: float

    def operands(self, device: str) -> list[Tensor]:
        """Random tensors."""
        return [torch.randn(shape, device=device, dtype=self.dtype).div_(math.sqrt(shape[-1])).requires_grad_() for shape in self.shapes]

    def moved_bytes(self, result: Tensor) -> float:
        """Bytes of inputs and output, as the cost model counts them."""
        return float((sum(math.prod(shape) for shape in self.shapes) + result.numel()) * self.dtype.itemsize)


def cases(device_type: str) -> list[Case]:
    """All of them, families together, sizes ascending."""
    on_gpu = device_type == "cuda"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu else ()))
    found: list[Case] = []
    for dtype in dtypes:
        found += _matmuls((512, 1024, 2048, 4096, 8192) if on_gpu else (64, 128, 256, 512, 1024), dtype)
    for dtype in (torch.float32, torch.bfloat16):
        found += _attentions((512, 2048, 8192) if on_gpu else (64, 256, 1024), dtype)
        found += _convolutions((64, 256, 512) if on_gpu else (16, 32, 64), dtype)
        found += _memory([2**k for k in ((20, 23, 26, 28) if on_gpu else (12, 16, 20, 22))], dtype)
    return found


def _matmuls(sizes: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    for n in sizes:
        yield Case("matmul", f"linear {dtype}", f"linear {n}x{n}x{n}", dtype, F.linear, ((n, n), (n, n)), 2.0 * n**3)
        yield Case("matmul", f"flat linear {dtype}", f"linear {n // 4}x{n}x{n}", dtype, F.linear, ((n // 4, n), (n, n)), n**3 / 2)


def _attentions(lengths: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    heads, width = 8, 64
    for n in lengths:
        shapes = ((1, heads, n, width),) * 3
        flops = 2.0 * 2 * heads * n * n * width
        yield Case("attention", f"attention {dtype}", f"attention of {n}", dtype, F.scaled_dot_product_attention, shapes, flops)


def _convolutions(channels: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    batch, side = 4, 28

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    for c in channels:
        shapes, flops = ((batch, c, side, side), (c, c, 3, 3)), 2.0 * batch * side * side * c * c * 9
        yield Case("convolution", f"conv2d {dtype}", f"conv2d 3x3 of {c}", dtype, convolve, shapes, flops)


def _memory(lengths: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    functions: dict[str, tuple[Function, int]] = {"copy": (torch.clone, 1), "multiply": (torch.mul, 2), "sum": (torch.sum, 1)}
    for name, (function, many) in functions.items():
        for n in lengths:
            shapes = ((n // 256, 256),) * many
            yield Case("memory", f"{name} {dtype}", f"{name} of {n}", dtype, function, shapes, 0.0)
