"""Fit a plan into a memory budget: layouts, re-gathered weights and repeated layers from one search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoshard.budget_space import BudgetSpace, What
from autoshard.errors import BudgetError
from autoshard.layers import Layer
from autoshard.search_space import SearchSpace
from autoshard.solver import InfeasibleError, Problem, Solution, solve
from autoshard.text import human_bytes, human_seconds

_RESERVES = 6


@dataclass(frozen=True)
class Fitted:
    """A plan within the budget: the space whose candidates `choice` numbers, and what is kept in bytes, all counted."""

    space: BudgetSpace
    choice: dict[What, int]
    solution: Solution
    kept_bytes: float
    build_s: float

    @property
    def repeated(self) -> list[Layer]:
        """Layers that backward runs again, in order."""
        return [layer for layer in self.space.layers if self.choice[layer] == 1]


def fit(space: SearchSpace, budget_bytes: float) -> Fitted:
    """The fastest plan of at most `budget_bytes` per rank that the search finds, with a proven bound.

    Counted are parameters with gradients and optimizer state, what autograd keeps, and the largest layer that is run
    again, which is whole while backward is in it. Raises BudgetError, which says the smallest budget that works.
    """
    started = time.perf_counter()
    wider = BudgetSpace(space)
    problem = wider.problem()
    build_s = time.perf_counter() - started
    allowed = budget_bytes - wider.fixed_bytes()
    try:
        solution = _search(wider, problem, allowed)
    except InfeasibleError as error:
        if error.least_bytes is None:
            raise
        raise BudgetError(_too_small(wider, problem, budget_bytes, error.least_bytes)) from error
    held = solution.memory_bytes + wider.running_again(problem, solution.choices) + wider.fixed_bytes()
    return Fitted(wider, dict(zip(wider.order, solution.choices, strict=True)), solution, held, build_s)


def _search(space: BudgetSpace, problem: Problem, allowed: float) -> Solution:
    """The best plan that leaves room for what backward holds while it runs a layer again.

    How much that is, only a plan tells. Where the first one leaves too little, it is set aside and the search repeated, and
    plans that run nothing again are searched too. The bound is that of the first search: it holds for all of them.
    """
    first = solve(problem, allowed)
    if first.memory_bytes + space.running_again(problem, first.choices) <= allowed:
        return first
    found: list[Solution] = []
    least: list[float] = []
    for search in (_run_nothing_again, _solve_with_reserve):
        try:
            found.append(search(space, problem, allowed, first))
        except InfeasibleError as error:
            least += [] if error.least_bytes is None else [error.least_bytes]
    if not found:
        raise InfeasibleError("no plan was found that leaves room for the layers it runs again", min(least, default=None))
    best = min(found, key=lambda solution: solution.objective_s)
    return replace(best, bound_s=min(first.bound_s, best.objective_s))


def _run_nothing_again(space: BudgetSpace, problem: Problem, allowed: float, first: Solution) -> Solution:
    """The best plan whose layers all run once."""
    kept = np.array([0.0, math.inf])
    costs = tuple(kept if isinstance(what, Layer) else cost for what, cost in zip(space.order, problem.costs, strict=True))
    return solve(replace(problem, costs=costs), allowed)


def _solve_with_reserve(space: BudgetSpace, problem: Problem, allowed: float, first: Solution) -> Solution:
    """A plan that fits with what its largest layer holds, which grows from the one of `first`."""
    solution, reserve = first, 0.0
    for _ in range(_RESERVES):
        needed = space.running_again(problem, solution.choices)
        if solution.memory_bytes + needed <= allowed:
            return solution
        reserve = max(needed, reserve * 1.02)
        try:
            solution = solve(problem, allowed - reserve)
        except InfeasibleError as error:
            raise InfeasibleError(str(error), None if error.least_bytes is None else error.least_bytes + reserve) from error
    raise InfeasibleError("no plan was found that leaves room for the layers it runs again", solution.memory_bytes + reserve)


def _too_small(space: BudgetSpace, problem: Problem, budget_bytes: float, least_bytes: float) -> str:
    """What to do about a budget that nothing fits."""
    enough = least_bytes
    for _ in range(_RESERVES):
        try:
            lean = _search(space, problem, enough)
            break
        except InfeasibleError as error:
            enough = 1.02 * max(enough, error.least_bytes or 0.0)
    else:
        return f"no plan on {space.program.mesh.whole} fits: budget of {budget_bytes:,.0f} bytes; use more ranks on the axes that split"
    enough += space.fixed_bytes()
    held = _resting(space, problem, lean.choices)
    return (
        f"no plan on {space.program.mesh.whole} fits: budget of {budget_bytes:,.0f} bytes, least reachable is {enough:,.0f} bytes "
        f"({human_bytes(held)} of parameters, gradients and optimizer state), at a predicted step of "
        f"{human_seconds(lean.objective_s)}; use more ranks on the axes that split, or a larger budget"
    )


def _resting(space: BudgetSpace, problem: Problem, choices: Sequence[int]) -> float:
    """Bytes of parameters with their state in an assignment."""
    tables = zip(space.order, problem.memory_bytes or (), choices, strict=True)
    return sum(float(table[k]) for what, table, k in tables if space.is_parameter(what))
