"""Autocast as data: which of torch.autocast's regions an op stands in, and how to run code in exactly those."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

DEVICES = ("cpu", "cuda")


class Autocast(NamedTuple):
    """One enabled region: ops on `device` compute in `dtype` where torch says that they may.

    Whether casts of weights are cached is not kept: normalize_graph casts each weight once per region.
    """

    device: str
    dtype: torch.dtype


State = tuple[Autocast, ...]  # of every device on which it is enabled, by name


def ambient() -> State:
    """The regions that the caller stands in."""
    return tuple(Autocast(device, torch.get_autocast_dtype(device)) for device in DEVICES if torch.is_autocast_enabled(device))


def inside(state: State, device: str, dtype: torch.dtype, enabled: bool) -> State:
    """The state in a region that is opened in `state`: the innermost region of a device decides."""
    others = {region.device: region for region in state if region.device != device}
    if enabled:
        others[device] = Autocast(device, dtype)
    return tuple(others[name] for name in sorted(others))


@contextlib.contextmanager
def entered(state: State) -> Iterator[None]:
    """Run the block in the regions of `state` and in no other, whatever the caller stands in."""
    with contextlib.ExitStack() as stack:
        wanted = {region.device for region in state}
        for device in DEVICES:
            if device not in wanted and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for region in state:
            stack.enter_context(torch.autocast(region.device, region.dtype, cache_enabled=False))
        yield
