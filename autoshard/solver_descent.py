"""One solve without a budget, and local search for where it is no proof."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoshard.elimination import BLOCK_ENTRIES, Elimination, WideError
from autoshard.message_passing import pass_messages
from autoshard.repeats import solve_repeats
from autoshard.solver_tables import InfeasibleError, Model, Pool, prune, reaches, restrict

_LITTLE_WORK = 2**28  # entries that elimination may add up, a few tenths of a second


@dataclass(frozen=True)
class Solution:
    """An assignment and what is known about it.

    choices: per variable, an index into its costs. objective_s: their cost, seconds.
    bound_s: no assignment (within the budget) costs less; equals objective_s when `choices` is proven optimal.
    memory_bytes: bytes of `choices`; 0 for a problem without memory.
    largest_table: entries of the largest message.
    distinct_eliminations: messages that were computed; every other one was equal to one of these.
    """

    choices: tuple[int, ...]
    objective_s: float
    bound_s: float
    memory_bytes: float
    largest_table: int
    distinct_eliminations: int

    @property
    def is_exact(self) -> bool:
        """Is `choices` proven optimal?"""
        return self.bound_s == self.objective_s


def minimise(model: Model, limit: float) -> Solution:
    """Least total of `model`, in its own indices; when a message is over the limit, an assignment and a bound.

    Elimination, where that is little work. Else messages are passed: that nearly always ends with the optimum and its
    proof; where it does not, what it could not drop is eliminated.
    """
    model = replace(model, pool=Pool(model.pool))
    try:
        return _eliminate(model, limit, _LITTLE_WORK)
    except WideError:
        pass
    small = prune(replace(model, domains=[np.arange(domain.size) for domain in model.domains]))
    return lift(_pass_messages(small, limit), small.domains)


def lift(solution: Solution, domains: Sequence[np.ndarray]) -> Solution:
    """A solution in the choices that `domains` are indices of."""
    return replace(solution, choices=tuple(int(domain[i]) for domain, i in zip(domains, solution.choices, strict=True)))


def _pass_messages(model: Model, limit: float) -> Solution:
    passed = solve_repeats(model) or pass_messages(model)
    largest = max(model.pool[table].size for table in model.costs.values())
    bound = passed.value if reaches(passed.bound, passed.value) else passed.bound
    known = Solution(passed.choices, passed.value, bound, model.bytes_of(passed.choices), largest, 0)
    if known.is_exact:
        return known
    try:
        rest = lift(_eliminate(restrict(model, passed.kept), limit, math.inf), passed.kept)
    except InfeasibleError:  # found nothing under the table limit
        if math.isinf(known.objective_s):
            raise
        return known
    best = min(rest, known, key=lambda solution: solution.objective_s)
    bound = max(bound, min(rest.bound_s, best.objective_s))  # what was dropped is not better
    return replace(best, bound_s=best.objective_s if reaches(bound, best.objective_s) else bound)


def _eliminate(model: Model, limit: float, most_work: float) -> Solution:
    run = Elimination(model.pool, len(model.domains), list(model.costs.items()), limit, model.blocks, most_work=most_work)
    choices = _improve(model, run.choices()) if run.is_split else run.choices()
    value = model.total(choices)
    bound = run.bound if run.is_split and not reaches(run.bound, value) else value
    return Solution(tuple(choices), value, bound, model.bytes_of(choices), run.largest_table, len(run.messages))


def _improve(model: Model, choices: list[int]) -> list[int]:
    """A local optimum of finite cost: `inf` is first priced so that every violation outweighs all finite costs."""
    if model.total(choices) == math.inf:
        tables = [model.pool[table] for table in model.costs.values()]
        penalty = 1.0 + 2.0 * sum(float(np.abs(t[np.isfinite(t)]).max(initial=0.0)) for t in tables)
        soften = functools.partial(np.nan_to_num, posinf=penalty)
        choices = descend(model.derive("soft", lambda cost, memory: soften(cost), soften), choices)
        if model.total(choices) == math.inf:
            raise InfeasibleError("found no assignment of finite cost under the table limit; one may exist")
    return descend(model, choices)


def descend(model: Model, choices: Sequence[int], budget: float = math.inf, variables: Sequence[int] | None = None) -> list[int]:
    """Re-optimise one variable, or two that share a small table, within the budget, until no such change helps.

    variables: those that may change; all when not given.
    """
    choices, slack, is_better = list(choices), budget - model.bytes_of(choices), True
    free = range(len(choices)) if variables is None else variables
    among = set(free)
    small = [
        scope
        for scope, table in model.costs.items()
        if len(scope) == 2 and among.issuperset(scope) and model.pool[table].size <= BLOCK_ENTRIES
    ]
    while is_better:
        is_better = False
        for scope in [*((v,) for v in free), *small]:
            cost, memory = model.moves(scope, choices)
            now = tuple(choices[v] for v in scope)
            extra = memory - memory[now]
            best = np.unravel_index(np.argmin(np.where(extra <= slack, cost, math.inf)), cost.shape)
            if not reaches(float(cost[best]), float(cost[now])):
                slack, is_better = slack - float(extra[best]), True
                for v, choice in zip(scope, best, strict=True):
                    choices[v] = int(choice)
    return choices
