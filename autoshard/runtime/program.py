"""The base of emitted programs, and seeded random ops."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpoint_module

from .axes import Axis


def mix(*numbers: int) -> int:
    """A 63-bit seed that differs whenever any of `numbers` does."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run random ops on `device` from `seed`, and leave the default generator as it was."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if on_cpu:
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(device).manual_seed(seed)
        yield


class Program:
    """Base of emitted programs: the tensors that a rank holds, its axes, and the seed of this step.

    tensor: a local parameter or buffer by the model's name. Random ops draw from a seed made of the step, the place in the
    program and the rank's position on the axes that split the value: ranks that hold the same value draw the same
    numbers, ranks that hold different pieces draw different ones.
    """

    SPLITS_BACKWARD = True  # of a pipeline stage: whether its backward may run in two halves; overridden where not

    def __init__(
        self, axes: Sequence[Axis], tensor: Callable[[str], Tensor], device: torch.device, seed: Callable[[], int] = lambda: 0
    ) -> None:
        self.axes = tuple(axes)
        self.tensor = tensor
        self.device = device
        self.seed = seed
        self.prepared: dict[str, Tensor] = {}  # of a pipeline stage: what it computes once per step
        self._constants: dict[str, Tensor] | None = None
        self._is_again = False  # whether a checkpointed region runs for the second time

    def constants(self) -> dict[str, Tensor]:
        """What depends on no input and no parameter; overridden by programs that have any."""
        return {}

    def constant(self, name: str) -> Tensor:
        if self._constants is None:
            with torch.inference_mode(False), torch.no_grad():
                self._constants = self.constants()
        return self._constants[name]

    def forget_constants(self) -> None:
        """Compute constants anew at the next step, after buffers or the device changed."""
        self._constants = None

    @torch.compiler.disable  # the second run must draw with the step's seed, which a graph would bake in
    def checkpoint(self, region: Callable[..., Any], *args: Any) -> Any:
        """Run `region` and keep its arguments alone: backward runs it again, collectives too, and draws the same numbers."""
        seed, runs = self.seed(), 0

        def run(*args: Any) -> Any:
            nonlocal runs
            outer, runs = (self.seed, self._is_again), runs + 1
            self.seed, self._is_again = (lambda: seed), runs > 1
            try:
                return region(*args)
            finally:
                self.seed, self._is_again = outer

        return checkpoint_module.checkpoint(run, *args, use_reentrant=False)

    @torch.compiler.disable  # which branch runs depends on what tensors hold, and all ranks must agree on it
    def decide(self, predicate: Tensor) -> bool:
        """Whether `predicate`, a single bool that every rank has whole, holds on any rank: all take the same branch of a cond.

        Kernels that do not add in a fixed order could round a predicate to both sides of its border, and ranks that went
        different ways would wait for each other's collectives for ever.
        """
        found = predicate.to(torch.int32)
        for axis in self.axes:
            found = axis.maximum(found)
        return bool(found)

    def once(self, name: str) -> Tensor:
        """A buffer that an op of a checkpointed region writes: a copy of it when the region runs again."""
        return self.tensor(name).clone() if self._is_again else self.tensor(name)

    @torch.compiler.disable  # seeds differ at every step: compiled in, each would be a new graph
    def random(self, site: int, axes: Sequence[Axis], op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the random op `op` at place `site` of the program on a value that `axes` split."""
        with seeded(mix(self.seed(), site, *(number for axis in axes for number in (axis.size, axis.rank))), self.device):
            return op(*args, **kwargs)
