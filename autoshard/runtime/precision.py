"""Half types: sums over a split dim are made in float32, as the fused ops make theirs."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def widen(x: Tensor) -> Tensor:
    """`x` in float32 where it has a half type."""
    return x.float() if x.dtype in HALVES else x


def narrow(y: Tensor, dtype: torch.dtype) -> Tensor:
    """`y` as an op on `dtype` returns it; under autocast the ops that sum in float32 return float32."""
    is_autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
    return y if is_autocast and dtype in HALVES else y.to(dtype)
