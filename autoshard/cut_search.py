"""The cut of a chain with the least objective, and a bound that no cut goes below.

    minimise  f(cut) = max over lines of line(costs of the stages)      subject to  line(costs) <= limit  for the limits

bound       any average of lines is at most f, and is a sum over stages: its least value over all cuts is found by dynamic
            programming over prefixes (`Completion`). The best average is that of a game of cuts against lines, played with a linear
            program over the cuts and lines met so far (`_play`).
windows     a stage from j to k is left out where a line, completed as cheaply as can be, is over its limit or the incumbent.
exactness   branch and bound over the starts in order, each prefix bounded by the lines and averages found (`_branch`).

Source: Land and Doig 1960 (branch and bound); McMahan, Gordon and Blum 2003 (the game); Wentges 1997 (averaging with the best so far).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linprog

from autoshard.chain import FIELDS, SEND, SEND_BACK, Blocks
from autoshard.cut_objectives import Line, Objective

_ROUNDING = 1e-12  # relative; sums of seconds in another order differ by less
_ROUNDS = 60  # of the game
_GAP = 1e-4  # at which the game ends
_WORK = 2e8  # of branch and bound, in entries of arrays that are added up
_PREFIX_WORK, _TRY_WORK, _STAGE_WORK = 1e4, 2e5, 600.0  # for each prefix, each batch of cuts, and each stage of a cut in it
_COMPLETION_WORK = 20.0  # for each stage and cut of a bound's table
_BATCH = 128  # cuts that are tried at once
_LEVELS = 12
_LIMIT_PRICE = 10.0  # of a limit exceeded by its whole, in units of the objective


@dataclass(frozen=True)
class Found:
    """starts: of the stages, as cuts between blocks; None where no cut within the limits was found. bound: no cut has less."""

    starts: tuple[int, ...] | None
    value: float
    bound: float


class Windows:
    """Which stages are worth a look: stage s from cut j ends at `last[s, j]` at the latest."""

    def __init__(self, last: np.ndarray) -> None:
        self.last = np.maximum.accumulate(last, axis=1)  # a later start never has to end earlier

    @cached_property
    def _after(self) -> list[_Spans]:
        cuts = np.arange(self.last.shape[1])
        return [_Spans(cuts + 1, row + 1) for row in self.last]

    @cached_property
    def _before(self) -> list[_Spans]:
        cuts = np.arange(self.last.shape[1])
        return [_Spans(np.searchsorted(row, cuts), cuts) for row in self.last]

    def least_after(self, stage: int, values: np.ndarray) -> np.ndarray:
        """[n + 1] for each start of the stage, the least of `values` [n + 1] over its ends."""
        return self._after[stage].least(values)

    def least_before(self, stage: int, values: np.ndarray) -> np.ndarray:
        """[n + 1] for each end of the stage, the least of `values` [n + 1] over its starts."""
        return self._before[stage].least(values)


class _Spans:
    """Least values over spans [first, stop) of an array; all spans of one length at once, as two of a power of two."""

    def __init__(self, first: np.ndarray, stop: np.ndarray) -> None:
        length = stop - first
        self._levels, width = [], 1
        while width <= length.max(initial=0):
            spans = np.flatnonzero((length >= width) & (length < 2 * width))
            self._levels.append((width, spans, first[spans], stop[spans] - width))
            width *= 2

    def least(self, values: np.ndarray) -> np.ndarray:
        least, table = np.full(len(values), math.inf), values
        for width, spans, first, last in self._levels:
            if width > 1:
                table = np.minimum(table[: -width // 2], table[width // 2 :])
            least[spans] = np.minimum(table[first], table[last])
        return least


class Completion:
    """The least of a line over all ways to cut what is left, relaxed as `Blocks.relaxed_costs`.

    ahead: [stages + 1, n + 1] of the stages from s on, when stage s starts at the cut, with the constant. Infinite where there is no way.
    """

    def __init__(self, blocks: Blocks, line: Line, windows: Windows) -> None:
        self.line, self._windows, stages = line, windows, len(line.weights)
        self._to = line.weights @ blocks.by_end  # [stages, n + 1]
        self._from = line.weights @ blocks.by_start
        self.ahead = np.full((stages + 1, blocks.count + 1), math.inf)
        self.ahead[stages, -1] = line.constant
        for stage in reversed(range(stages)):
            self.ahead[stage] = self._from[stage] + windows.least_after(stage, self._to[stage] + self.ahead[stage + 1])

    @property
    def bound(self) -> float:
        return float(self.ahead[0, 0])

    def starts(self) -> tuple[int, ...]:
        """The cut that attains the bound; only where there is one."""
        starts = [0]
        for stage in range(len(self.ahead) - 2):
            ends = slice(starts[-1] + 1, self._windows.last[stage, starts[-1]] + 1)
            starts.append(ends.start + int(np.argmin(self._to[stage, ends] + self.ahead[stage + 1, ends])))
        return tuple(starts)

    def last_within(self, limit: float) -> np.ndarray:
        """[stages, n + 1] the last end of each stage at which the line can still be within `limit`; before the start where none is."""
        last = np.empty((len(self.ahead) - 1, self.ahead.shape[1]), int)
        behind = np.full(self.ahead.shape[1], math.inf)
        behind[0] = 0.0
        for stage in range(len(last)):
            least_later = np.minimum.accumulate((self._to[stage] + self.ahead[stage + 1])[::-1])[::-1]
            last[stage] = np.searchsorted(least_later, limit - (behind + self._from[stage]), side="right") - 1
            behind = self._to[stage] + self._windows.least_before(stage, behind + self._from[stage])
        return last


class Search:
    """One search; `find` runs it."""

    def __init__(self, blocks: Blocks, stages: int, objective: Objective, limits: Sequence[tuple[Line, float]] = ()) -> None:
        self.blocks, self.stages, self.objective, self.limits = blocks, stages, objective, limits
        self.best: tuple[int, ...] | None = None
        self.value, self.bound = math.inf, -math.inf
        self.lines: list[Line] = []
        self.averages: list[Line] = []
        self.windows = Windows(np.tile(blocks.next_forced, (stages, 1)))
        self._narrow(limits)

    def find(self, seeds: Sequence[tuple[int, ...]] = (), enough: float = -math.inf) -> Found:
        """The least, or the first at most `enough`. seeds: starts to begin with."""
        if self.stages == 1:
            self.bound = float(self._try(np.zeros((1, 1), int))[0])
            return Found(self.best, self.value, self.bound)
        for step in (lambda: self._seed(seeds), self._play, self._descend, self._branch):
            step()
            self.bound = min(self.bound, self.value)
            if self.bound >= self.value * (1 - _ROUNDING) or self.value <= enough:
                break
        return Found(self.best, self.value, self.bound)

    def _try(self, starts: np.ndarray) -> np.ndarray:
        """[cuts] the objective of cuts [cuts, stages], infinite where over a limit; the best is kept."""
        costs = self.blocks.costs(starts)
        values = self.objective.values(costs)
        ends = np.concatenate([starts[:, 1:], np.full((len(starts), 1), self.blocks.count)], axis=1)
        values[(ends > self.blocks.next_forced[starts]).any(axis=1)] = math.inf
        for line, limit in self.limits:
            values[line(costs) > limit] = math.inf
        least = int(values.argmin())
        if values[least] < self.value:
            self.best, self.value = tuple(starts[least].tolist()), float(values[least])
        return values

    def _narrow(self, limits: Sequence[tuple[Line, float]]) -> None:
        """Leave out stages with which a line is over its limit."""
        last = self.windows.last
        for line, limit in limits:
            last = np.minimum(last, Completion(self.blocks, line, self.windows).last_within(limit + _ROUNDING * abs(limit)))
        self.windows = Windows(last)

    # -------------------------------------------------------------------------------------------------------------- incumbents

    def _seed(self, seeds: Sequence[tuple[int, ...]]) -> None:
        """Cuts whose longest stage is short, and the paths that are longest where one stage in turn is longer than the others."""
        if seeds:
            self._try(np.array(seeds))
        even = np.tile(self.blocks.sums[:, -1] / self.stages, (self.stages, 1))
        self._add(self.objective.line(even))
        for stage in range(self.stages):
            uneven = even.copy()
            uneven[stage] *= 1.1
            self._add(self.objective.line(uneven))
        self._shares = np.where(np.isin(np.arange(FIELDS), (SEND, SEND_BACK)), 0.0, self.lines[0].weights.max(axis=0))
        self._work = np.maximum.accumulate(self._shares @ self.blocks.sums)  # [n + 1] what a stage has, by the objective, before a cut
        self._try_levelled(self.lines[0])

    def _add(self, line: Line) -> None:
        if not any(line.constant == known.constant and np.array_equal(line.weights, known.weights) for known in self.lines):
            self.lines.append(line)

    def _try_levelled(self, line: Line) -> None:
        """The cuts least by `line` of those with no stage above a level, for several levels."""
        work = self._work
        least = max(work[-1] / self.stages, float(np.diff(work).max()))
        for longest in least * np.array([1.0, *(1 + np.geomspace(1e-3, 1.0, _LEVELS - 1))]):
            last = np.searchsorted(work, work + longest * (1 + _ROUNDING), side="right") - 1
            levelled = Completion(self.blocks, line, Windows(np.minimum(self.windows.last, last)))
            if levelled.bound < math.inf:
                self._try(np.array([levelled.starts()]))

    def _descend(self) -> None:
        """Move one start at a time, near or to the least traffic further off, while it helps."""
        traffic = (self.blocks.at_end[SEND] + self.blocks.at_start[SEND_BACK])[: self.blocks.count]
        value = math.inf
        while self.best is not None and self.value < value:
            value = self.value
            for stage in range(1, self.stages):
                before, start = self.best[stage - 1 : stage + 1]
                after = (*self.best, self.blocks.count)[stage + 1]
                places = sorted(_worth_a_move(traffic, before + 1, start, after))
                if places:
                    moved = np.tile(self.best, (len(places), 1))
                    moved[:, stage] = places
                    self._try(moved)

    # -------------------------------------------------------------------------------------------------------------- bound

    def _play(self) -> None:
        """Raise the bound: the lines' best average against the cuts met so far, then the cut that is least by it, and so on."""
        if self.best is not None:
            self._narrow([(line, self.value) for line in self.lines])
        first = Completion(self.blocks, self.lines[0], self.windows)
        if first.bound == math.inf:  # no cut is better than the incumbent
            self.bound = math.inf
            return
        cuts = [first.starts(), *([self.best] if self.best else [])]
        best_average, ceiling = None, math.inf
        for _ in range(_ROUNDS):
            costs = self.blocks.relaxed_costs(np.array(cuts))
            game = self._game(costs)
            if game is None:
                break
            average, mixed = game
            ceiling = min(ceiling, float(self.objective.values(mixed[None])[0]))
            if best_average is not None:
                average = Line((average.weights + best_average.weights) / 2, (average.constant + best_average.constant) / 2)
            completion = Completion(self.blocks, average, self.windows)
            if completion.bound > self.bound:
                self.bound, best_average = completion.bound, average
                self.averages.append(average)
            self._add(self.objective.line(mixed))
            cuts.append(completion.starts())
            self._try(np.array([cuts[-1], self._rounded(mixed)]))
            self._add(self.objective.line(self.blocks.relaxed_costs(np.array(cuts[-1:]))[0]))
            if self.bound >= min(ceiling * (1 - _GAP), self.value):
                break
        if best_average is not None:
            self._try_levelled(best_average)

    def _game(self, costs: np.ndarray) -> tuple[Line, np.ndarray] | None:
        """The average of lines whose least over the cuts of costs [cuts, stages, FIELDS] is greatest, and the average of costs.

        None where the numbers are too far apart for the linear program's solver.
        """
        lines = [*self.lines, *(line for line, _ in self.limits)]
        scale = float(self.lines[0](costs).max()) or 1.0
        limits = np.array([limit for _, limit in self.limits])
        per = np.concatenate([np.full(len(self.lines), scale), np.where(limits > 0, limits, 1.0)])
        less = np.concatenate([np.zeros(len(self.lines)), limits])
        weights, constants = np.array([line.weights for line in lines]), np.array([line.constant for line in lines])
        rows = (np.tensordot(weights, costs, axes=([1, 2], [1, 2])) + (constants - less)[:, None]) / per[:, None]
        is_line = np.arange(len(lines)) < len(self.lines)
        # columns: the share of each cut, the value of the game, what is over a limit
        table = np.column_stack([rows, np.where(is_line, -1.0, 0.0), np.where(is_line, 0.0, -1.0)])
        prices = np.array([*[0.0] * len(costs), 1.0, _LIMIT_PRICE])
        shares = np.array([[*[1.0] * len(costs), 0.0, 0.0]])
        bounds = [*[(0.0, None)] * len(costs), (None, None), (0.0, None)]
        solved = linprog(prices, A_ub=table, b_ub=np.zeros(len(rows)), A_eq=shares, b_eq=[1.0], bounds=bounds, method="highs")
        if not solved.success:
            return None
        weight = np.maximum(-solved.ineqlin.marginals, 0.0)
        weight *= scale / per
        weight /= weight[is_line].sum()
        share = np.maximum(solved.x[: len(costs)], 0.0)
        average = Line(np.tensordot(weight, weights, axes=1), float(weight @ (constants - less)))
        return average, np.tensordot(share / share.sum(), costs, axes=1)

    def _rounded(self, mixed: np.ndarray) -> tuple[int, ...]:
        """A cut whose stages compute about as long as those of `mixed` [stages, FIELDS]."""
        work = self._work
        wanted = np.cumsum(mixed[:-1] @ self._shares)
        starts = [0]
        for stage, seconds in enumerate(wanted, start=1):
            after = int(np.searchsorted(work, seconds))
            nearest = after - (after > 0 and seconds - work[after - 1] < work[min(after, self.blocks.count)] - seconds)
            latest = min(self.blocks.count - self.stages + stage, int(self.blocks.next_forced[starts[-1]]))
            starts.append(min(max(starts[-1] + 1, nearest), latest))
        return tuple(starts)

    # -------------------------------------------------------------------------------------------------------------- exactness

    def _branch(self) -> None:
        """Look at every cut that the bounds do not rule out, the most promising prefixes first, while the entries last."""
        table_work = _COMPLETION_WORK * self.stages * self.blocks.count
        judges = [*self.averages[-4:], *self.lines[: 4 * self.stages]][: max(4, int(_WORK / 4 / table_work))]
        completions = [Completion(self.blocks, line, self.windows) for line in (*judges, *(line for line, _ in self.limits))]
        allowed = np.array([limit for _, limit in self.limits])
        weights = np.array([c.line.weights for c in completions])  # [lines, stages, FIELDS]
        ahead = np.array([c.ahead for c in completions])  # [lines, stages + 1, n + 1]
        open_prefixes: list[tuple[float, tuple[int, ...], np.ndarray]] = [
            (max(c.bound for c in completions[: len(judges)]), (0,), np.zeros(len(completions)))
        ]
        whole: list[tuple[float, tuple[int, ...]]] = []
        work = table_work * len(completions)
        while (open_prefixes or whole) and work < _WORK:
            if len(whole) >= _BATCH or not open_prefixes:
                whole = [(bound, starts) for bound, starts in whole if bound < self.value * (1 - _ROUNDING)]
                if whole:
                    self._try(np.array([starts for _, starts in whole]))
                work += _TRY_WORK + _STAGE_WORK * self.stages * len(whole)
                whole = []
                continue
            bound, starts, behind = open_prefixes.pop()
            if bound >= self.value * (1 - _ROUNDING):
                continue
            stage = len(starts) - 1
            ends = slice(starts[-1] + 1, int(self.windows.last[stage, starts[-1]]) + 1)
            sums = behind[:, None] + weights[:, stage] @ self.blocks.costs_from(starts[-1], ends)  # [lines, ends]
            work += _PREFIX_WORK + sums.size
            totals = sums + ahead[:, stage + 1, ends]
            bounds = totals[: len(judges)].max(axis=0, initial=-math.inf)
            is_within = (totals[len(judges) :] <= (allowed + _ROUNDING * abs(allowed))[:, None]).all(axis=0)
            worth = np.flatnonzero((bounds < self.value * (1 - _ROUNDING)) & is_within)
            for k in worth[np.argsort(-bounds[worth], kind="stable")]:
                prefix = (*starts, ends.start + int(k))
                if len(prefix) == self.stages:
                    whole.append((float(bounds[k]), prefix))
                else:
                    open_prefixes.append((float(bounds[k]), prefix, sums[:, k]))
        left = [bound for bound, _, _ in open_prefixes] + [bound for bound, _ in whole]
        self.bound = max(self.bound, min([self.value, *left]))


def _worth_a_move(traffic: np.ndarray, first: int, start: int, stop: int) -> set[int]:
    """Cuts of [first, stop) beside `start`: the nearest on both sides, and those of least traffic at twice the distance, and so on."""
    found = set(range(max(first, start - 8), min(stop, start + 9)))
    distance = 8
    while distance < max(start - first, stop - start):
        for low, high in ((start - 2 * distance, start - distance), (start + distance, start + 2 * distance)):
            low, high = max(first, low), min(stop, high)
            if low < high:
                found.add(low + int(traffic[low:high].argmin()))
        distance *= 2
    return found - {start}
