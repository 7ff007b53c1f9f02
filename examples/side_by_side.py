"""What the examples that train share: the loop, and the end, where the losses must be those of one process."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[dict[str, Any] | Sequence[Any]]) -> list[float]:
    """A step per batch, which is the model's arguments by name or in order. Returns the losses."""
    losses = []
    for batch in batches:
        result = model(**batch) if isinstance(batch, dict) else model(*batch)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def show(sharded: Sequence[float], single: Sequence[float], every: int = 1) -> None:
    """Both losses of every so many steps."""
    for step in range(0, len(single), every):
        print(f"step {step + 1:3}  loss {sharded[step]:.6f}  one process {single[step]:.6f}")


def finish(sharded: Iterable[Sequence[float]], single: Sequence[float], tolerance: float) -> None:
    """Leave the process group. Exits with an error where losses differ by more than `tolerance`."""
    dist.barrier()
    dist.destroy_process_group()
    difference = max(abs(a - b) for losses in sharded for a, b in zip(losses, single, strict=True))
    if not difference < tolerance:
        raise SystemExit(f"the losses differ by {difference:.1e}: this is a defect, please report it")
