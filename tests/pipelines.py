"""Chains of stages for the tests of pipelines, schedules for them, and the single process that they are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoshard.runtime.pipeline_engine import EngineStage, PipelineEngine
from autoshard.schedules import Action, Kind, Schedule

WIDTH, ROWS = 4, 3

# ------------------------------------------------------------------------------------------------------------ schedules


def gpipe(stage_ranks: Sequence[int], microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    every = list(itertools.product(range(microbatches), range(len(stage_ranks))))
    order = [Action(s, "F", m) for m, s in every] + [Action(s, "B", m) for m, s in sorted(every, key=lambda at: (at[0], -at[1]))]
    return tuple(tuple(action for action in order if stage_ranks[action.stage] == rank) for rank in range(max(stage_ranks) + 1))


def one_f_one_b(stage_ranks: Sequence[int], microbatches: int, split: bool = False) -> Schedule:
    """Backward as soon as it can be, at most as many microbatches in flight as there are stages behind: 1F1B for any map."""
    last, done = len(stage_ranks) - 1, set[Action]()
    kinds: list[Kind] = ["I", "F", "W"] if split else ["B", "F"]
    left = [Action(s, kind, m) for kind in kinds for m in range(microbatches) for s in range(last, -1, -1)]
    lists: list[list[Action]] = [[] for _ in range(max(stage_ranks) + 1)]

    def is_ready(action: Action) -> bool:
        s, m = action.stage, action.microbatch
        if action.kind == "F":
            in_flight = sum(a.kind == "F" and a.stage == s for a in done) - sum(a.kind in "BI" and a.stage == s for a in done)
            return in_flight <= last - s and (s == 0 or Action(s - 1, "F", m) in done) and (m == 0 or Action(s, "F", m - 1) in done)
        if action.kind == "W":
            return Action(s, "I", m) in done
        return Action(s, "F", m) in done and (s == last or Action(s + 1, action.kind, m) in done)

    while left:
        now = []
        for rank, own in enumerate(lists):
            chosen = next((a for a in left if stage_ranks[a.stage] == rank and is_ready(a)), None)
            if chosen is not None:
                own.append(chosen)
                now.append(chosen)
        assert now, "the schedule does not advance"
        done.update(now)
        left = [action for action in left if action not in done]
    return tuple(map(tuple, lists))


# --------------------------------------------------------------------------------------------------------------- models


class Start(nn.Module):
    """The first stage: reads the microbatch's own inputs. Values: hidden, ids, mask, scale, skip, unused, empty."""

    def __init__(self, inputs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inputs = inputs
        self.table = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, number: int) -> tuple[Tensor, ...]:
        x, ids = self.inputs[number]
        hidden = (x + self.table[ids]).t()  # its memory is not in order
        return hidden, ids, ids > 4, x.abs().max(), self.table[ids].exp()[:, 1:3], hidden * 2, x[:0]


class Middle(nn.Module):
    """Adds to the hidden state by what it received; passes the others on as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, number: int, hidden: Tensor, ids: Tensor, mask: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        change = torch.tanh(self.linear(hidden.t())) * scale + self.table[ids] * mask[:, None]
        return hidden + change.t(), ids, mask, scale, *rest


class Bare(nn.Module):
    """A stage without parameters."""

    def forward(self, number: int, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return torch.sin(hidden), *rest


class End(nn.Module):
    """The last stage: other results, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(
        self, number: int, hidden: Tensor, ids: Tensor, mask: Tensor, scale: Tensor, skip: Tensor, *_: Tensor
    ) -> tuple[Tensor, ...]:
        scores = self.head(hidden.t()) * skip
        return scores, ids, (scores * scores).sum() / scale


class Inputs(nn.Module):
    """A first stage that only hands on inputs: nothing of it needs a gradient."""

    def __init__(self, inputs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inputs = inputs

    def forward(self, number: int) -> tuple[Tensor, ...]:
        x, ids = self.inputs[number]
        return x.t(), ids, ids > 4, x.abs().max(), x[:, 1:3]


class Twice(nn.Module):
    """Two weights, each used twice, interleaved; and a value that comes from a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(
        self, number: int, hidden: Tensor, ids: Tensor, mask: Tensor, scale: Tensor, skip: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        mixed = torch.tanh(self.b @ torch.tanh(self.a @ torch.tanh(self.b @ torch.tanh(self.a @ hidden))))
        return mixed, ids, mask, scale, (self.a * self.b)[:ROWS, :2].exp(), *rest


def inputs_of(microbatches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shapes = range(microbatches)
    return [(torch.randn(ROWS, WIDTH, generator=generator), torch.randint(0, 10, (ROWS,), generator=generator)) for _ in shapes]


def chain(kinds: str, microbatches: int) -> list[nn.Module]:
    """The stages that the letters of `kinds` name, the same on every rank."""
    torch.manual_seed(0)
    make: dict[str, Callable[[], nn.Module]] = {
        "s": lambda: Start(inputs_of(microbatches)),
        "i": lambda: Inputs(inputs_of(microbatches)),
        "m": Middle,
        "b": Bare,
        "t": Twice,
        "e": End,
    }
    return [make[kind]() for kind in kinds]


def metas_of(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta", requires_grad=v.requires_grad and v.is_floating_point())
        for v in values
    )


def single_process(stages: Sequence[nn.Module], microbatches: int) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Runs all stages here, forward and backward: the metas between stages, and the results."""
    results: list[tuple[Tensor, ...]] = []
    for number in range(microbatches):
        values: tuple[Tensor, ...] = ()
        metas = []
        for stage in stages:
            values = stage(number, *values)
            metas.append(metas_of(values))
        values[-1].backward()
        results.append(tuple(value.detach() for value in values))
    return metas, results


def engine_of(
    stages: Sequence[nn.Module], metas: Sequence[tuple[Tensor, ...]], stage_ranks: Sequence[int], microbatches: int, group: Any = None
) -> PipelineEngine:
    def forward_of(stage: nn.Module) -> Callable[[tuple[Tensor, ...], int], tuple[Tensor, ...]]:
        return lambda values, number: stage(number, *values)

    own = [index for index, rank in enumerate(stage_ranks) if rank == dist.get_rank(group)]
    plans = [EngineStage(index, forward_of(stages[index]), metas[index - 1] if index else (), metas[index]) for index in own]
    return PipelineEngine(plans, stage_ranks, microbatches, group or dist.group.WORLD, torch.device("cpu"))


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def assert_gradients(
    stages: Sequence[nn.Module], reference: Sequence[nn.Module], stage_ranks: Sequence[int], times: int = 1, group: Any = None
) -> None:
    for stage, alone, rank in zip(stages, reference, stage_ranks, strict=True):
        for own, other in zip(stage.parameters(), alone.parameters(), strict=True):
            if rank != dist.get_rank(group) or other.grad is None:
                assert own.grad is None
            else:
                assert_same(own.grad, other.grad * times)


def schedule_of(name: str, stage_ranks: Sequence[int], microbatches: int) -> Schedule:
    return gpipe(stage_ranks, microbatches) if name == "gpipe" else one_f_one_b(stage_ranks, microbatches, name == "split")


class Failing(torch.autograd.Function):
    """Identity; raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("no gradient today")


class Wrecked(nn.Module):
    """A stage that fails at one microbatch, once it is told how."""

    def __init__(self, stage: nn.Module, number: int) -> None:
        super().__init__()
        self.stage, self.number, self.how = stage, number, ""

    def forward(self, number: int, *values: Tensor) -> tuple[Tensor, ...]:
        if self.how and number == self.number:
            if self.how == "backward":
                return self.stage(number, Failing.apply(values[0]), *values[1:])
            if self.how == "fewer":
                return self.stage(number, *values)[:-1]
            if self.how == "smaller":
                hidden, *rest = self.stage(number, *values)
                return hidden[:1], *rest
            if self.how == "unplanned":
                hidden, ids, mask, scale, *rest = self.stage(number, *values)
                return hidden, ids, mask, scale + hidden.sum(), *rest
            raise ValueError("a bad batch")
        return self.stage(number, *values)
