"""What a cut is judged by, as functions of the costs of its stages: the time of a step, the memory of the fullest rank.

Both are the greatest of many linear functions: a schedule's longest path is the greatest sum over its paths, however long
the actions take; the fullest rank is the greatest sum over ranks and moments. So the line that is greatest at one cut is
nowhere above the objective, and any average of such lines bounds every cut from below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from autoshard.chain import AFTER, BACKWARD, BACKWARD_INPUT, FIELDS, FORWARD, KEPT, ONCE, RESIDENT, SEND, SEND_BACK
from autoshard.pipeline_timeline import KINDS, Order, StageCosts, lags_of, order_of, seconds_by_slot
from autoshard.schedules import Schedule


@dataclass(frozen=True)
class Line:
    """A linear function of the costs of the stages: sum(weights * costs) + constant."""

    weights: np.ndarray  # [stages, FIELDS]
    constant: float = 0.0

    def __call__(self, costs: np.ndarray) -> np.ndarray:
        """[cuts] for costs [cuts, stages, FIELDS]."""
        return np.tensordot(costs, self.weights, axes=2) + self.constant


class Objective(Protocol):
    """The greatest of many lines."""

    def values(self, costs: np.ndarray) -> np.ndarray:
        """[cuts] for costs [cuts, stages, FIELDS]."""

    def line(self, costs: np.ndarray) -> Line:
        """One that is greatest at costs [stages, FIELDS]."""


@dataclass(frozen=True)
class Greatest:
    """The greatest of lines that are all known."""

    lines: Sequence[Line]

    def values(self, costs: np.ndarray) -> np.ndarray:
        return np.max([line(costs) for line in self.lines], axis=0)

    def line(self, costs: np.ndarray) -> Line:
        return max(self.lines, key=lambda line: line(costs[None])[0])


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of `schedule`: of many cuts at once, and with the longest path of one."""

    schedule: Schedule
    stage_ranks: tuple[int, ...]
    latency_s: float
    overhead_s: float

    @cached_property
    def _order(self) -> Order:
        return order_of(self.schedule, self.stage_ranks)

    @cached_property
    def _slots(self) -> tuple[np.ndarray, np.ndarray]:
        """[slots, FIELDS] and [slots]: the seconds of every kind of action of every stage, by costs of that stage, and constant."""
        return self._linear(lambda costs: seconds_by_slot(costs, self.overhead_s))

    @cached_property
    def _lags(self) -> tuple[np.ndarray, np.ndarray]:
        """[lags, FIELDS] and [lags]: seconds from the end of an action to its arrival, by costs of the stage that sends."""
        return self._linear(lambda costs: lags_of(costs, self.stage_ranks, self.latency_s))

    def _linear(self, seconds: Callable[[list[StageCosts]], list[float]]) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and constants of what the simulator makes of costs: what it adds for one second of each field."""

        def at(**fields: float) -> np.ndarray:
            return np.array(seconds([StageCosts(**{"forward_s": 0.0, "backward_s": 0.0, "backward_input_s": 0.0} | fields)] * stages))

        stages = len(self.stage_ranks)
        constants = at()
        weights = np.zeros((len(constants), FIELDS))
        names = {FORWARD: "forward_s", BACKWARD: "backward_s", SEND: "send_s", SEND_BACK: "send_back_s", ONCE: "once_s", AFTER: "after_s"}
        for field, name in names.items():
            weights[:, field] = at(**{name: 1.0}) - constants
        weights[:, BACKWARD_INPUT] = at(backward_s=1.0, backward_input_s=1.0) - at(backward_s=1.0)
        return weights.round(), constants

    @cached_property
    def _steps(self) -> np.ndarray:
        """[1 + actions, 4]: the one before on the rank, what it waits for, its lag, its slot. 0 is the start of the step."""
        free = [0] * len(self.schedule)
        steps = [(0, 0, 0, 0)]
        for number, (rank, need, lag, slot) in enumerate(self._order.steps, start=1):
            steps.append((free[rank], need, lag, slot))
            free[rank] = number
        return np.array(steps)

    @cached_property
    def _levels(self) -> list[np.ndarray]:
        """Actions that do not wait for each other, level by level."""
        depth = [0]
        levels: list[list[int]] = []
        for number, (before, need, _, _) in enumerate(self._steps[1:].tolist(), start=1):
            depth.append(1 + max(depth[before], depth[need]))
            if depth[-1] > len(levels):
                levels.append([])
            levels[depth[-1] - 1].append(number)
        return [np.array(level) for level in levels]

    def _ends(self, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[1 + actions, cuts] when each action ends, and [lags, cuts]."""
        stages = costs.shape[1]
        (slot_weights, slot_constants), (lag_weights, lag_constants) = self._slots, self._lags
        slot_stage = np.repeat(np.arange(stages), len(KINDS))
        seconds = np.einsum("csf,sf->sc", costs[:, slot_stage], slot_weights) + slot_constants[:, None]
        lag_stage = np.concatenate([[0], np.repeat(np.arange(stages), 2)])
        lags = np.einsum("csf,sf->sc", costs[:, lag_stage], lag_weights) + lag_constants[:, None]
        ends = np.zeros((1 + len(self._order.steps), len(costs)))
        for numbers in self._levels:
            before, need, lag, slot = self._steps[numbers].T
            ends[numbers] = np.maximum(ends[before], ends[need] + lags[lag]) + seconds[slot]
        return ends, lags

    def values(self, costs: np.ndarray) -> np.ndarray:
        """[cuts] for costs [cuts, stages, FIELDS]."""
        return self._ends(costs)[0].max(axis=0)

    def line(self, costs: np.ndarray) -> Line:
        """The longest path at costs [stages, FIELDS]."""
        ends, lags = (found[:, 0] for found in self._ends(costs[None]))
        weights, constant = np.zeros_like(costs), 0.0
        (slot_weights, slot_constants), (lag_weights, lag_constants) = self._slots, self._lags
        number = int(ends.argmax())
        while number:
            free, need, lag, slot = self._steps[number].tolist()
            weights[slot // len(KINDS)] += slot_weights[slot]
            constant += slot_constants[slot]
            number = free
            if ends[need] + lags[lag] > ends[free]:
                weights[max(0, lag - 1) // 2] += lag_weights[lag]
                constant += lag_constants[lag]
                number = need
        return Line(weights, float(constant))


def rank_memory(schedule: Schedule, stage_ranks: Sequence[int]) -> list[Line]:
    """Bytes of every rank at its fullest moments: weights, and activations of the microbatches in flight."""
    lines = []
    for stages, rows in order_of(schedule, stage_ranks).in_flight:
        distinct = np.unique(rows, axis=0)
        for row in distinct:
            if not any((other >= row).all() and (other > row).any() for other in distinct):
                weights = np.zeros((len(stage_ranks), FIELDS))
                weights[stages, KEPT] = row
                weights[stages, RESIDENT] = 1.0
                lines.append(Line(weights))
    return lines
