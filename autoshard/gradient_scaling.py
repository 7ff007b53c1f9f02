"""What a torch.amp.GradScaler needs to know of other stages: it skips the step where gradients overflow, so all ranks must skip it.

It looks at the gradients of its own rank. A factor of exactly 1 does not show in what arrives at backward, and a rank whose stages have no
weights to train has nothing to look at, which torch takes for an error. So two methods of GradScaler are watched, once a model with
stages exists; they are called on every rank, as the training loop is the same on all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Told:
    """Flags of the backwards since gradients were looked at."""

    overflowed: list[Tensor] = field(default_factory=list)
    is_read: bool = False


_USED: set[str] = set()
_TOLD = _Told()


def watch() -> None:
    """From now on `is_used` knows, and optimizers without gradients here take what `tell` said."""
    original: Any = torch.amp.GradScaler.scale
    if hasattr(original, "unwatched"):
        return
    unscale: Any = torch.amp.GradScaler._unscale_grads_

    @functools.wraps(original)
    def scale(self: Any, outputs: Any) -> Any:
        if self.is_enabled():
            _USED.add("scale")
        return original(self, outputs)

    @functools.wraps(unscale)
    def unscale_grads(*args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found = unscale(*args, **kwargs)
        _TOLD.is_read = True
        if found or not _TOLD.overflowed:
            return found
        flag = torch.stack(_TOLD.overflowed).any().float()
        return {flag.device: flag}

    scale.unwatched = original  # type: ignore[attr-defined]
    torch.amp.GradScaler.scale = scale  # type: ignore[method-assign]
    torch.amp.GradScaler._unscale_grads_ = unscale_grads  # type: ignore[method-assign]


def tell(overflowed: Tensor) -> None:
    """Whether gradients of any stage overflowed in a backward."""
    if _TOLD.is_read:
        _TOLD.overflowed, _TOLD.is_read = [], False
    _TOLD.overflowed.append(overflowed)


def is_used() -> bool:
    """Whether any loss of this process was scaled by an enabled GradScaler."""
    return bool(_USED)
