"""The timeline of a pipeline: when every action of a schedule runs, predicted from what its stages cost.

    start = max(the rank is free, what the action needs has arrived)        end = start + seconds of the action + overhead_s
    arrival = end of the same microbatch's F (or B or I) on the other stage + seconds on the link + latency_s, or end on one rank

A rank runs its list in order; whoever sends is not held up. The order in which starts can be computed is the same for all costs, so
it is found once per schedule, and a search over cuts pays for one pass over plain numbers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from autoshard.errors import PlanError
from autoshard.schedules import Action, Kind, Schedule

EventKind = Kind | Literal["once", "after"]
"""An action's kind, or a stage's work once per step: before its first action or after its last backward."""
KINDS: tuple[EventKind, ...] = (*get_args(Kind), "once", "after")
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
Label = tuple[int, int, EventKind, int]
"""Rank, stage, kind, microbatch; `once` and `after` are of microbatch -1."""
HALF = -1.0


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of one stage for one microbatch. Raises PlanError for a number that cannot be one."""

    forward_s: float
    backward_s: float  # whole backward; I takes backward_input_s, W the rest
    backward_input_s: float = HALF  # left out: half of backward_s
    send_s: float = 0.0  # of what goes to the next stage, on the link
    send_back_s: float = 0.0  # of the gradients that go to the stage before
    kept_bytes: float = 0.0  # kept for backward by every microbatch in flight
    once_s: float = 0.0  # once a step, before the stage's first action (gathering weights)
    after_s: float = 0.0  # once a step, after the stage's last backward (reducing gradients)

    def __post_init__(self) -> None:
        if self.backward_input_s == HALF:
            object.__setattr__(self, "backward_input_s", self.backward_s / 2)
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise PlanError(f"{field.name} of a stage is {getattr(self, field.name)}: give a finite number that is not negative")
        if self.backward_input_s > self.backward_s:
            raise PlanError(f"backward_input_s {self.backward_input_s} is a part of backward_s {self.backward_s}: give no more than that")


@dataclass(frozen=True)
class PipelineEvent:
    """One action as it ran on a pipeline rank; seconds from the start of the step. `once` and `after` are of microbatch -1."""

    rank: int
    stage: int
    kind: EventKind
    microbatch: int
    start_s: float
    end_s: float

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}" if self.microbatch >= 0 else f"{self.stage} {self.kind}"


@dataclass(frozen=True, repr=False)
class PipelineTimeline:
    """One predicted step of a pipeline.

    busy_s: by rank, seconds of its actions, `once` and `after` among them. in_flight: by rank, for how many microbatches and
    stages it keeps activations at one time at most, each from its F up to the end of its B or W; peak_bytes: what they take at most,
    without the buffers of messages and what an action takes while it runs (plan.memory counts all).
    """

    total_s: float
    busy_s: tuple[float, ...]
    in_flight: tuple[int, ...]
    peak_bytes: tuple[float, ...]
    _order: Order
    _starts: tuple[float, ...]
    _ends: tuple[float, ...]

    @cached_property
    def events(self) -> tuple[PipelineEvent, ...]:
        """Everything that takes a rank's time, by rank and start."""
        found = [
            PipelineEvent(rank, stage, kind, microbatch, start, end)
            for (rank, stage, kind, microbatch), start, end in zip(self._order.labels, self._starts, self._ends, strict=True)
            if microbatch >= 0 or end > start
        ]
        return tuple(sorted(found, key=lambda event: event.rank))

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they stand idle, 0 to 1."""
        whole = self.total_s * len(self.busy_s)
        return max(0.0, 1 - sum(self.busy_s) / whole) if whole else 0.0

    def to_chrome_trace(self, path: str | Path, measured: Iterable[PipelineEvent] | None = None) -> Path:
        """Write a trace that chrome://tracing and ui.perfetto.dev open: a row per rank, with what was measured in a row below each."""
        laid = {0: list(self.events)} | ({} if measured is None else {1: list(measured)})
        named: list[dict[str, Any]] = []
        shown: list[dict[str, Any]] = []
        for below, events in laid.items():
            for rank in range(len(self.busy_s)):
                row = {"ph": "M", "pid": 0, "tid": 2 * rank + below}
                named.append(row | {"name": "thread_name", "args": {"name": f"rank {rank}{' measured' * below}"}})
                named.append(row | {"name": "thread_sort_index", "args": {"sort_index": 2 * rank + below}})
            shown += [
                {"ph": "X", "pid": 0, "tid": 2 * e.rank + below, "name": str(e), "cat": e.kind}
                | {"args": {"stage": e.stage, "microbatch": e.microbatch}, "ts": e.start_s * 1e6, "dur": (e.end_s - e.start_s) * 1e6}
                for e in events
            ]
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": [*named, *shown], "displayTimeUnit": "ms"}))
        return path

    def __repr__(self) -> str:
        in_flight = " ".join(map(str, self.in_flight))
        return f"PipelineTimeline({self.total_s * 1e3:.3f} ms, {len(self.busy_s)} ranks, {self.bubble:.1%} bubble, in flight {in_flight})"


def simulate(
    schedule: Schedule, costs: Sequence[StageCosts], stage_ranks: Sequence[int], latency_s: float = 0.0, overhead_s: float = 0.0
) -> PipelineTimeline:
    """One step of `schedule`, whose lists have passed `schedules.check_schedule`.

    latency_s: of every hop between ranks, beside the stages' send_s. overhead_s: of the host, for every action. On stage 0 torch
    leaves the whole backward to W, where a schedule splits it, and I does nothing; so it is here. Raises PlanError where the costs
    are not of the schedule's stages, and where the lists deadlock.
    """
    if len(costs) != len(stage_ranks):
        raise PlanError(f"there are costs of {len(costs)} stages and ranks of {len(stage_ranks)}: give both for every stage")
    order = order_of(schedule, stage_ranks)
    seconds = seconds_by_slot(costs, overhead_s)
    lags = lags_of(costs, stage_ranks, latency_s)
    free = [0.0] * len(schedule)
    starts: list[float] = []
    ends = [0.0]  # of the step's start, and then of each action
    for rank, need, lag, slot in order.steps:
        start, arrival = free[rank], ends[need] + lags[lag]
        if arrival > start:
            start = arrival
        starts.append(start)
        free[rank] = end = start + seconds[slot]
        ends.append(end)
    kept = np.array([stage.kept_bytes for stage in costs])
    return PipelineTimeline(
        total_s=max(free),
        busy_s=tuple(sum(seconds[slot] * count for slot, count in slots.items()) for slots in order.slots),
        in_flight=tuple(int(rows.sum(axis=1).max()) for _, rows in order.in_flight),
        peak_bytes=tuple(float((rows @ kept[stages]).max()) for stages, rows in order.in_flight),
        _order=order,
        _starts=tuple(starts),
        _ends=tuple(ends[1:]),
    )


def seconds_by_slot(costs: Sequence[StageCosts], overhead_s: float) -> list[float]:
    """Of every stage, in the order of KINDS."""
    found: list[float] = []
    for stage, cost in enumerate(costs):
        inputs = cost.backward_input_s if stage else 0.0
        actions = (cost.forward_s, cost.backward_s, inputs, cost.backward_s - inputs)
        found += [*(seconds + overhead_s for seconds in actions), cost.once_s, cost.after_s]
    return found


def lags_of(costs: Sequence[StageCosts], stage_ranks: Sequence[int], latency_s: float) -> list[float]:
    """Seconds from the end of an action to its arrival: [0.0, then of every stage what it sends on, what it sends back]."""
    lags = [0.0]
    for stage, cost in enumerate(costs):
        on = stage + 1 < len(costs) and stage_ranks[stage] != stage_ranks[stage + 1]
        back = stage > 0 and stage_ranks[stage] != stage_ranks[stage - 1]
        lags += [cost.send_s + latency_s if on else 0.0, cost.send_back_s + latency_s if back else 0.0]
    return lags


# ------------------------------------------------------------------------------------------------------ what no cost changes


@dataclass(frozen=True, eq=False)
class Order:
    """What a schedule says whatever its stages cost.

    steps: actions in an order in which each comes after all it waits for: rank, which end it waits for (0: the step's start), how
    long that takes to arrive (an index of `lags_of`), its own seconds (an index of `seconds_by_slot`). slots: by rank,
    how often each index of seconds occurs. in_flight: by rank, its stages, and how many microbatches of each it keeps at every
    action, [actions + 1, stages].
    """

    steps: list[tuple[int, int, int, int]]
    labels: list[Label]
    slots: list[Counter[int]]
    in_flight: list[tuple[list[int], np.ndarray]]


def order_of(schedule: Schedule, stage_ranks: Sequence[int]) -> Order:
    """The order of a schedule's actions, found once for each schedule. Raises PlanError where it deadlocks."""
    return _order_of(_Same(schedule), tuple(stage_ranks))


class _Same:
    """A schedule as a key that compares by identity: to hash the actions takes longer than to simulate them."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __hash__(self) -> int:
        return id(self.schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.schedule is other.schedule


@lru_cache(maxsize=64)
def _order_of(same: _Same, stage_ranks: tuple[int, ...]) -> Order:
    schedule, last = same.schedule, len(stage_ranks) - 1
    lists = [_with_once_and_after(rank, actions, stage_ranks) for rank, actions in enumerate(schedule)]
    order = Order([], [], [Counter(_slot(label) for label in labels) for labels in lists], [_kept_rows(actions) for actions in schedule])
    forward: dict[tuple[int, int], int] = {}  # (stage, microbatch): which end that is
    backward: dict[tuple[int, int], int] = {}
    position, left = [0] * len(lists), sum(map(len, lists))
    while left:
        before = left
        for rank, labels in enumerate(lists):
            while position[rank] < len(labels):
                label = labels[position[rank]]
                _, stage, kind, microbatch = label
                key = (stage, microbatch)
                need: int | None = 0
                lag = 0
                if kind == "F" and stage:
                    need, lag = forward.get((stage - 1, microbatch)), 2 * stage - 1
                elif kind == "W":
                    need = 0 if key in backward else None
                elif kind in ("B", "I"):  # the forward of the same stage is ahead in the same list, or the list is stuck
                    need = None if key not in forward else 0
                    if need is not None and stage < last:
                        need, lag = backward.get((stage + 1, microbatch)), 2 * stage + 4
                if need is None:
                    break
                order.steps.append((rank, need, lag, _slot(label)))
                order.labels.append(label)
                if kind == "F":
                    forward[key] = len(order.steps)
                elif kind != "W":
                    backward[key] = len(order.steps)
                position[rank] += 1
                left -= 1
        if left == before:
            heads = (labels[done] for labels, done in zip(lists, position, strict=True) if done < len(labels))
            stuck = ", ".join(f"{stage}{kind}{microbatch}" for _, stage, kind, microbatch in heads)
            raise PlanError(f"the schedule deadlocks before {stuck}: schedules.check_schedule says why")
    return order


def _slot(label: Label) -> int:
    return len(KINDS) * label[1] + _NUMBER[label[2]]


def _with_once_and_after(rank: int, actions: Sequence[Action], stage_ranks: Sequence[int]) -> list[Label]:
    """A rank's list with `once` ahead of each stage's first action and `after` behind its last backward."""
    labels: list[Label] = [(rank, action.stage, action.kind, action.microbatch) for action in actions]
    for stage in {label[1] for label in labels}:
        if not (0 <= stage < len(stage_ranks) and stage_ranks[stage] == rank):
            raise PlanError(f"rank {rank} runs stage {stage}, which is not its own: schedules.check_schedule says which action")
        numbers = [number for number, label in enumerate(labels) if label[1] == stage]
        if labels[numbers[-1]][2] != "F":
            labels.insert(numbers[-1] + 1, (rank, stage, "after", -1))
        labels.insert(numbers[0], (rank, stage, "once", -1))
    return labels


def _kept_rows(actions: Sequence[Action]) -> tuple[list[int], np.ndarray]:
    """The stages of a rank, and of each how many microbatches it keeps at every action; forwards alone keep nothing for later."""
    stages = sorted({action.stage for action in actions})
    is_training = any(action.kind != "F" for action in actions)
    column = {stage: number for number, stage in enumerate(stages)}
    changes = np.zeros((len(actions) + 1, len(stages)), dtype=np.int64)
    for number, action in enumerate(actions):
        if action.kind == "F":
            changes[number, column[action.stage]] += 1
            changes[number + 1, column[action.stage]] -= not is_training
        elif action.kind != "I":
            changes[number + 1, column[action.stage]] -= 1
    return stages, np.cumsum(changes, axis=0)
