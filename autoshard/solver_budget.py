"""The memory budget: a multiplier prices bytes in seconds, and what that leaves over is searched.

    max over lam >= 0 of  min over x of  cost + lam * (bytes - budget)           the Lagrangian dual: a lower bound

Each inner minimum is exact. The assignments that the best multiplier gives are either over the budget or within it; where
layers are alike they differ in all of them at once. `_cross` takes the one up to some variable and the other from there
on, and `descend` ends it: the gap to the bound is then that of about one variable. Small problems are branched on the
variables that those two disagree about, which closes the gap.

Source: Geoffrion, "Lagrangean relaxation for integer programming", 1974.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autoshard.solver_descent import Solution, descend, lift, minimise
from autoshard.solver_tables import InfeasibleError, Model, prune, reaches

_MULTIPLIERS = 40
_BRANCHES, _BRANCHED_TABLES = 8, 100  # parts of the search space that are looked at; of problems with at most so many tables
_ENOUGH = 1e-3  # relative gap at which a search ends


@dataclass(order=True)
class _Part:
    """A part of the search space. bound: nothing in it costs less; choices: something in it that fits; over: what does not fit."""

    bound: float
    number: int
    model: Model = field(compare=False)
    over: Sequence[int] = field(compare=False)
    within: Sequence[int] = field(compare=False)
    choices: list[int] = field(compare=False)


@dataclass
class _Search:
    """One budget; `runs` are all solves, for what they say about table sizes."""

    budget: float
    limit: float
    runs: list[Solution] = field(default_factory=list)
    parts: int = 0

    def relax(self, model: Model, cheap: Solution) -> _Part:
        """Bound a part and find something in it that fits. `cheap`: its optimum without a budget.

        The dual is concave and piecewise linear in the multiplier, so the next one to try is where the lines of the last
        assignments over and within the budget cross: that ends on the maximum, where bisection would only come near.
        """
        self.parts += 1
        if model.bytes_of(cheap.choices) <= self.budget:
            return _Part(cheap.bound_s, self.parts, model, (), (), list(cheap.choices))
        over, within, bound = cheap, _leanest(model, self.budget, self.limit), cheap.bound_s
        self.runs += [over, within]
        for _ in range(_MULTIPLIERS):
            loss = model.total(within.choices) - model.total(over.choices)
            multiplier = loss / (model.bytes_of(over.choices) - model.bytes_of(within.choices))
            if multiplier <= 0.0:
                break
            priced = model.derive(("priced", multiplier), lambda cost, memory, m=multiplier: cost + m * memory)
            run = _pruned_minimum(priced, self.limit)
            self.runs.append(run)
            bound = max(bound, run.bound_s - multiplier * self.budget)
            if reaches(run.objective_s, priced.total(over.choices)):
                break
            over, within = (run, within) if model.bytes_of(run.choices) > self.budget else (over, run)
        disputed = [v for v, (a, b) in enumerate(zip(over.choices, within.choices, strict=True)) if a != b]
        starts = (within.choices, *_cross(model, over.choices, within.choices, self.budget))
        choices = min((descend(model, start, self.budget, disputed) for start in starts), key=model.total)
        return _Part(bound, self.parts, model, over.choices, within.choices, choices)

    def halves(self, part: _Part) -> Iterator[_Part]:
        """The part where the variable whose bytes are most in dispute is as in `over`, and the rest."""
        model, disputed = part.model, [v for v, (a, b) in enumerate(zip(part.over, part.within, strict=True)) if a != b]

        def saved(v: int) -> float:
            memory = model.moves((v,), part.over)[1]
            return abs(float(memory[part.over[v]] - memory[part.within[v]]))

        v = max(disputed, key=saved)
        for is_kept in (True, False):
            table = np.where((np.arange(model.domains[v].size) == part.over[v]) == is_kept, model.pool[model.costs[v,]], math.inf)
            half = replace(model, costs={**model.costs, (v,): model.pool.intern(table)})
            try:
                yield self.relax(half, _pruned_minimum(half, self.limit))
            except InfeasibleError:
                continue


def solve_under_budget(model: Model, cheap: Solution, budget: float, limit: float) -> Solution:
    """Best assignment found within the budget, and a bound. `cheap`: the optimum without a budget. Raises InfeasibleError."""
    search = _Search(budget, limit)
    whole = search.relax(model, cheap)
    best = whole.choices
    if len(model.costs) <= _BRANCHED_TABLES:
        best = descend(model, best, budget)
    cost, waiting = model.total(best), [whole]
    while waiting and waiting[0].over and cost - waiting[0].bound > _ENOUGH * abs(cost):
        if len(model.costs) > _BRANCHED_TABLES or search.parts >= _BRANCHES:
            break
        for half in search.halves(heapq.heappop(waiting)):
            heapq.heappush(waiting, half)
            if (found := half.model.total(half.choices)) < cost:
                best, cost = half.choices, found
    bound = min((part.bound for part in waiting[:1]), default=cost)
    largest, distinct = max(r.largest_table for r in search.runs), sum(r.distinct_eliminations for r in search.runs)
    return Solution(tuple(best), cost, cost if reaches(bound, cost) else bound, model.bytes_of(best), largest, distinct)


def _pruned_minimum(model: Model, limit: float) -> Solution:
    """minimise, of what is left when dominated choices are dropped once more: a multiplier makes many of them.

    Its costs alone decide, so what it says of memory is not used.
    """
    small = prune(replace(model, domains=[np.arange(domain.size) for domain in model.domains], memory={}))
    return lift(minimise(small, limit), small.domains)


def _leanest(model: Model, budget: float, limit: float) -> Solution:
    """The allowed assignment of fewest bytes, of equal ones a cheap one; raises InfeasibleError when that is over the budget."""
    most = sum(float(np.abs(t[np.isfinite(t)]).max(initial=0.0)) for t in (model.pool[table] for table in model.costs.values()))
    weight = 0.25 / max(most, 1e-30)  # all seconds together weigh less than half a byte

    def price(cost: np.ndarray, memory: np.ndarray | float = 0.0) -> np.ndarray:
        return np.where(np.isinf(cost), math.inf, memory + weight * np.where(np.isinf(cost), 0.0, cost))

    lean = _pruned_minimum(model.derive(("bytes", weight), price, price), limit)
    held = model.bytes_of(lean.choices)
    if held > budget:
        note = "" if lean.is_exact else f" found under the table limit, at least {lean.bound_s:,.0f}"
        raise InfeasibleError(f"budget of {budget:,.0f} bytes, least reachable is {held:,.0f} bytes{note}", held)
    return lean


def _cross(model: Model, over: Sequence[int], within: Sequence[int], budget: float) -> Iterator[list[int]]:
    """The cheapest that fits of those that are `over` up to some variable and `within` behind it, and the other way round."""
    for order in (range(len(over)), range(len(over) - 1, -1, -1)):
        choices = list(within)
        seconds, held = model.total(choices), model.bytes_of(choices)
        best, place = seconds, None
        for v in order:
            if over[v] == choices[v]:
                continue
            cost, memory = model.moves((v,), choices)
            before, choices[v] = choices[v], over[v]
            is_finite = math.isfinite(seconds) and math.isfinite(cost[before]) and math.isfinite(cost[over[v]])
            seconds = seconds + float(cost[over[v]] - cost[before]) if is_finite else model.total(choices)
            held += float(memory[over[v]] - memory[before])
            if held <= budget and seconds < best:
                best, place = seconds, v
        if place is not None:
            behind = order.index(place)
            yield [over[v] if order.index(v) <= behind else within[v] for v in range(len(over))]
