"""Whether a torch.amp.GradScaler is at work: it skips the step where gradients of this rank overflow, so other stages must skip it too.

A factor of exactly 1 does not show in what arrives at backward. So `GradScaler.scale` is watched, once a model with stages exists; it is
called on every rank, as the training loop is the same on all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_USED: set[str] = set()


def watch() -> None:
    """From now on `is_used` knows."""
    original: Any = torch.amp.GradScaler.scale
    if hasattr(original, "unwatched"):
        return

    @functools.wraps(original)
    def scale(self: Any, outputs: Any) -> Any:
        if self.is_enabled():
            _USED.add("scale")
        return original(self, outputs)

    scale.unwatched = original  # type: ignore[attr-defined]
    torch.amp.GradScaler.scale = scale  # type: ignore[method-assign]


def is_used() -> bool:
    """Whether any loss of this process was scaled by an enabled GradScaler."""
    return bool(_USED)
