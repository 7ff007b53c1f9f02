"""Short names of dtypes."""

from __future__ import annotations

import torch

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def short_dtype(dtype: torch.dtype) -> str:
    """`f32`, `i64`; torch's own name where there is none."""
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a short name, or of its own."""
    return next((dtype for dtype, short in SHORT.items() if short == name), None) or getattr(torch, name)
