"""Losses over split classes and samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axis, position, ways
from .conversions import total

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    class_axes: Sequence[Axis] = (),
    batch_axes: Sequence[Axis] = (),
) -> Tensor:
    """Cross entropy with classes split on `class_axes` and samples split on `batch_axes`, without gathering either.

    logits: (N, C, ...) or (C), target: (N, ...) or () of class numbers, weight: (C). The loss of each sample is whole on
    every rank of class_axes (I); the sum or mean over samples is a term on batch_axes (P).
    """
    dim, dtype = 1 if logits.dim() > 1 else 0, logits.dtype
    classes = logits.shape[dim]
    logits = logits.float() if dtype in (torch.float16, torch.bfloat16) else logits  # sums over classes, as the fused op makes them
    top = logits.detach().amax(dim, keepdim=True)
    for axis in class_axes:
        top = axis.maximum(top)
    shifted = logits - top
    log_z = torch.log(total(shifted.exp().sum(dim), class_axes))
    valid = target != ignore_index
    known = (target >= 0) & (target < classes * ways(class_axes))
    torch._assert_async((known | ~valid).all(), "cross entropy target out of range")
    wanted = torch.where(valid, target, 0) - position(class_axes) * classes
    here = (wanted >= 0) & (wanted < classes)
    index = torch.where(here, wanted, 0)
    share = torch.ones_like(log_z) if weight is None else total(torch.where(here, torch.take(weight, index), 0.0), class_axes)
    picked = total(torch.where(here, shifted.gather(dim, index.unsqueeze(dim)).squeeze(dim), 0.0), class_axes)
    loss = (log_z - picked) * share
    if label_smoothing:
        count = classes * ways(class_axes)
        each = shifted if weight is None else shifted * weight.view([-1 if d == dim else 1 for d in range(logits.dim())])
        shares = count if weight is None else total(weight.sum(), class_axes)
        everywhere = log_z * shares - total(each.sum(dim), class_axes)  # log_z is I: it must not be used per class
        loss = (1 - label_smoothing) * loss + label_smoothing / count * everywhere
    loss = torch.where(valid, loss, 0.0)
    if reduction == 1:
        loss = loss.sum() / total(torch.where(valid, share, 0.0).sum().detach(), batch_axes)
    elif reduction == 2:
        loss = loss.sum()
    is_autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
    return loss if is_autocast else loss.to(dtype)
