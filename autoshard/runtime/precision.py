"""Half types: sums over a split dim are made in float32, as the fused ops make theirs."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def widen(x: Tensor) -> Tensor:
    """`x` in float32 where it has a half type."""
    return x.float() if x.dtype in HALVES else x


def narrow(y: Tensor, dtype: torch.dtype, autocast: tuple[str, ...] = ("cuda",)) -> Tensor:
    """`y` as an op on `dtype` returns it, which autocast makes return float32 on the device types of `autocast`."""
    device = y.device.type
    is_kept = dtype in HALVES and device in autocast and torch.is_autocast_enabled(device)
    return y if is_kept else y.to(dtype)
