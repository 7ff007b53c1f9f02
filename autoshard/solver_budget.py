"""The memory budget: a multiplier prices bytes in seconds, and what that leaves over is searched.

    max over lam >= 0 of  min over x of  cost + lam * (bytes - budget)           the Lagrangian dual: a lower bound

Each inner minimum is exact. The assignments that the best multiplier gives are either over the budget or within it; where
layers are alike they differ in all of them at once. `_cross` takes the one up to some variable and the other from there
on, and `descend` ends it: the gap to the bound is then that of about one variable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from autoshard.solver_descent import Solution, descend, minimise
from autoshard.solver_tables import InfeasibleError, Model, prune, reaches

_MULTIPLIERS = 40


def solve_under_budget(model: Model, cheap: Solution, budget: float, limit: float) -> Solution:
    """Best assignment found within the budget, bounded by the Lagrangian dual. `cheap`: the optimum without a budget.

    The dual is concave and piecewise linear in the multiplier, so the next one to try is where the lines of the last
    assignments over and within the budget cross: that ends on the maximum, where bisection would only come near.
    Raises InfeasibleError when nothing fits.
    """
    over, within, bound = cheap, _leanest(model, budget, limit), cheap.bound_s
    runs = [over, within]
    for _ in range(_MULTIPLIERS):
        loss = model.total(within.choices) - model.total(over.choices)
        multiplier = loss / (model.bytes_of(over.choices) - model.bytes_of(within.choices))
        if multiplier <= 0.0:
            break
        priced = model.derive(("priced", multiplier), lambda cost, memory, m=multiplier: cost + m * memory)
        run = _pruned_minimum(priced, limit)
        runs.append(run)
        bound = max(bound, run.bound_s - multiplier * budget)
        if reaches(run.objective_s, priced.total(over.choices)):
            break
        over, within = (run, within) if model.bytes_of(run.choices) > budget else (over, run)
    start = min([list(within.choices), *_cross(model, over.choices, within.choices, budget)], key=model.total)
    disputed = [v for v, (a, b) in enumerate(zip(over.choices, within.choices, strict=True)) if a != b]
    choices = descend(model, start, budget, disputed)
    cost = model.total(choices)
    largest, distinct = max(r.largest_table for r in runs), sum(r.distinct_eliminations for r in runs)
    return Solution(tuple(choices), cost, cost if reaches(bound, cost) else bound, model.bytes_of(choices), largest, distinct)


def _pruned_minimum(model: Model, limit: float) -> Solution:
    """minimise, of what is left when dominated choices are dropped once more: a multiplier makes many of them."""
    small = prune(replace(model, domains=[np.arange(domain.size) for domain in model.domains]))
    run = minimise(small, limit)
    return replace(run, choices=tuple(int(domain[i]) for domain, i in zip(small.domains, run.choices, strict=True)))


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
            infinite = not (math.isfinite(seconds) and math.isfinite(cost[choices[v]]) and math.isfinite(cost[over[v]]))
            held += float(memory[over[v]] - memory[choices[v]])
            before, choices[v] = choices[v], over[v]
            seconds = model.total(choices) if infinite else seconds + float(cost[over[v]] - cost[before])
            if held <= budget and seconds < best:
                best, place = seconds, v
        if place is not None:
            crossed = list(within)
            for v in order:
                crossed[v] = over[v]
                if v == place:
                    break
            yield crossed
