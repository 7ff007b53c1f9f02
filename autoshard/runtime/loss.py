"""Losses over split classes and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, position, ways
from .conversions import maximum, sum_over, total
from .padding import is_padding
from .precision import narrow, widen

# Losses whose mean over split samples is the local mean over the number of pieces: each gets a function of its name below.
AVERAGED = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "l1_loss",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
)
__all__ = ["cross_entropy", "kl_div", "nll_loss", *AVERAGED]

_AUTOCAST = ("cuda", "cpu")  # device types on which autocast makes losses return float32


def _averaged(name: str) -> Callable[..., Tensor]:
    def loss(*args: Any, sample_axes: Sequence[Axis]) -> Tensor:
        return getattr(torch.ops.aten, name).default(*args) / ways(sample_axes)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"Mean of aten.{name} over samples that are split on `sample_axes`: the local mean, weighted; the result is P."
    return loss


globals().update({name: _averaged(name) for name in AVERAGED})


def kl_div(x: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False, sample_axes: Sequence[Axis]) -> Tensor:
    """Mean of aten.kl_div over numbers that are split on `sample_axes`: the local mean, weighted; the result is P."""
    return torch.ops.aten.kl_div.default(x, target, reduction, log_target=log_target) / ways(sample_axes)


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
    class_sizes: Sequence[int] = (),
) -> Tensor:
    """Cross entropy with classes split on `class_axes` and samples split on `batch_axes`, without gathering either.

    logits: (N, C, ...) or (C), target: (N, ...) or () of class numbers, or probabilities of the shape of logits, weight:
    (C). The loss of each sample is whole on every rank of class_axes (I); the sum or mean over samples is a term on
    batch_axes (P). class_sizes: the number of classes where it does not divide; the last rank's classes then end in padding,
    which has no probability and no weight.
    """
    dim, dtype = 1 if logits.dim() > 1 else 0, logits.dtype
    count = sum(class_sizes) or logits.shape[dim] * ways(class_axes)
    along = [-1 if d == dim else 1 for d in range(logits.dim())]
    real = ~is_padding(logits, class_axes, dim, count).view(along) if sum(class_sizes) else None
    logits = logits if real is None else torch.where(real, logits, float("-inf"))
    logits = widen(logits)  # sums over classes, as the fused op makes them
    shifted = logits - maximum(logits.detach().amax(dim, keepdim=True), class_axes)
    if target.dtype.is_floating_point:
        loss = _soft_cross_entropy(shifted, target, weight, label_smoothing, class_axes, count, real)
        loss = loss.sum() if reduction else loss
        loss = loss / (logits.numel() // logits.shape[dim] * ways(batch_axes)) if reduction == 1 else loss
        return narrow(loss, dtype, _AUTOCAST)
    log_z = torch.log(total(shifted.exp().sum(dim), class_axes))
    valid = target != ignore_index
    picked, share = _picked(shifted, target, weight, valid, class_axes, count)
    loss = (log_z - picked) * share
    if label_smoothing:
        each = shifted if real is None else torch.where(real, shifted, 0.0)
        each = each if weight is None else each * weight.view(along)
        own = weight if weight is None or real is None else torch.where(real.flatten(), weight, 0.0)
        shares = count if own is None else total(own.sum(), class_axes)
        everywhere = log_z * shares - total(each.sum(dim), class_axes)  # log_z is I: it must not be used per class
        loss = (1 - label_smoothing) * loss + label_smoothing / count * everywhere
    return narrow(_reduced(loss, share, valid, reduction, batch_axes), dtype, _AUTOCAST)


def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    *,
    class_axes: Sequence[Axis] = (),
    batch_axes: Sequence[Axis] = (),
) -> Tensor:
    """Negative log likelihood of (N, C, ...) or (C), laid out and reduced as in cross_entropy."""
    valid = target != ignore_index
    picked, share = _picked(widen(x), target, weight, valid, class_axes)
    return narrow(_reduced(-picked * share, share, valid, reduction, batch_axes), x.dtype, _AUTOCAST)


def _soft_cross_entropy(
    shifted: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, axes: Sequence[Axis], count: int, real: Tensor | None
) -> Tensor:
    """Loss of each sample (I) for targets that are probabilities; log_z is used per class, so it is R."""
    dim = 1 if shifted.dim() > 1 else 0
    log_likelihood = shifted - torch.log(sum_over(shifted.exp().sum(dim, keepdim=True), axes))
    if smoothing:
        target = target * (1 - smoothing) + smoothing / count
    if real is not None:
        log_likelihood, target = torch.where(real, log_likelihood, 0.0), torch.where(real, target, 0.0)
    share = target if weight is None else target * weight.view([-1 if d == dim else 1 for d in range(shifted.dim())])
    return total(-(log_likelihood * share).sum(dim), axes)


def _picked(x: Tensor, target: Tensor, weight: Tensor | None, valid: Tensor, axes: Sequence[Axis], count: int = 0) -> tuple[Tensor, Tensor]:
    """The number of `x` at the target class and the weight of that class, for each sample: both I."""
    dim = 1 if x.dim() > 1 else 0
    classes = x.shape[dim]
    known = (target >= 0) & (target < (count or classes * ways(axes)))
    torch._assert_async((known | ~valid).all(), "cross entropy target out of range")
    wanted = torch.where(valid, target, 0) - position(axes) * classes
    here = (wanted >= 0) & (wanted < classes)
    index = torch.where(here, wanted, 0)
    picked = total(torch.where(here, x.gather(dim, index.unsqueeze(dim)).squeeze(dim), 0.0), axes)
    if weight is None:
        return picked, torch.ones_like(picked.detach())
    return picked, total(torch.where(here, torch.take(widen(weight), index), 0.0), axes)


def _reduced(loss: Tensor, share: Tensor, valid: Tensor, reduction: int, axes: Sequence[Axis]) -> Tensor:
    """None, mean or sum over samples that are split on `axes`; those that are not valid count for nothing."""
    loss = torch.where(valid, loss, 0.0)
    if reduction == 1:
        return loss.sum() / total(torch.where(valid, share, 0.0).sum().detach(), axes)
    return loss.sum() if reduction == 2 else loss
