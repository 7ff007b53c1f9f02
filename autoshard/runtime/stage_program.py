"""The emitted program of one pipeline stage as a step runs it, and the gradients of weights that several stages hold.

prepare        once per step: conversions and casts of weights, under autograd
microbatches   read detached copies of what was prepared, on which gradients add up
reduce         one backward through `prepare`, for the gradients of the whole batch; parts of tied weights are added up
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .program import mix


@dataclass
class StageProgram:
    """One stage of this rank. code: its program, an instance of an emitted class.

    received: names of what the stage before passes on. takes, wants: names of what `forward` and `prepare` are called with.
    """

    number: int
    code: Any
    received: tuple[str, ...]
    takes: tuple[str, ...]
    wants: tuple[str, ...]
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # what `prepare` made, and the copy that microbatches read

    def prepare(self, given: Mapping[str, Tensor], seed: Callable[[], int]) -> None:
        """Compute what no microbatch changes. given: whole arguments by name."""
        self.code.seed = seed
        made = self.code.prepare(*(given[name] for name in self.wants)) if hasattr(self.code, "prepare") else {}
        copies = {name: value.detach().requires_grad_(value.requires_grad) for name, value in made.items()}
        self.made = [(made[name], copy) for name, copy in copies.items() if copy.requires_grad]
        self.code.prepared = copies

    def forward(self, values: Sequence[Tensor], given: Mapping[str, Tensor], number: int, seed: Callable[[], int]) -> tuple[Tensor, ...]:
        """The stage on microbatch `number`. values: what is received; given: what this microbatch has of the arguments."""
        known = {**given, **dict(zip(self.received, values, strict=True))}
        self.code.seed = lambda: mix(seed(), number)
        results = self.code.forward(*(known[name] for name in self.takes))
        return tuple(result for result in results if isinstance(result, Tensor))

    def reduce(self) -> None:
        """Backward through what was prepared, once for all microbatches."""
        reached = [(value, copy.grad) for value, copy in self.made if copy.grad is not None]
        torch.autograd.backward([value for value, _ in reached], [grad for _, grad in reached])
        self.made, self.code.prepared = [], {}


def tied_groups(held: Mapping[str, Sequence[int]], stage_ranks: Sequence[int], group: dist.ProcessGroup) -> dict[str, dist.ProcessGroup]:
    """For parameters of this rank that other ranks of `group` hold too: the group of these ranks. held: by parameter its stages."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    found = {}
    for name, stages in held.items():
        ranks = tuple(sorted({stage_ranks[stage] for stage in stages}))
        if len(ranks) > 1 and dist.get_rank(group) in ranks:
            if ranks not in groups:
                groups[ranks] = dist.new_group([dist.get_global_rank(group, rank) for rank in ranks], use_local_synchronization=True)
            found[name] = groups[ranks]
    return found


def add_tied(leaves: Mapping[str, Tensor], tied: Mapping[str, dist.ProcessGroup]) -> None:
    """Add up the gradients of weights that several ranks hold."""
    for name, group in tied.items():
        if name in leaves:
            leaf = leaves[name]
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.contiguous()
            dist.all_reduce(leaf.grad, group=group)
