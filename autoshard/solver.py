"""The exact solver: one choice per variable, least total cost, optionally under a memory budget.

    variables    x_v in {0 .. |v|-1}                                             v = 0 .. n-1
    objective    min  sum_v cost[v][x_v]  +  sum_s pair[s][x_s]                  seconds; inf forbids
    constraint   sum_v memory[v][x_v]  +  sum_s bytes[s][x_s]  <=  budget        bytes; optional

where a scope s is two or three variables. `prune` drops choices that some optimum does without, `Elimination` removes one
variable at a time; where its tables would be too large it gives a lower bound, and `descend` searches for the assignment.
The budget enters by a multiplier (autoshard.solver_budget).
"""

from __future__ import annotations

import math
from dataclasses import replace

from autoshard.solver_budget import solve_under_budget
from autoshard.solver_descent import Solution, minimise
from autoshard.solver_tables import InfeasibleError, Problem, load, prune

__all__ = ["InfeasibleError", "Problem", "Solution", "solve"]


def solve(
    problem: Problem, memory_budget_bytes: float | None = None, *, max_table_entries: int = 2**26, is_pruned: bool = True
) -> Solution:
    """Return the cheapest assignment; of equally cheap ones the same on every run.

    memory_budget_bytes: most bytes the assignment may take; needs `problem.memory_bytes`.
    max_table_entries: a larger message is never built; the solution is then bounded instead of exact.
    is_pruned: drop dominated choices first; it never changes the objective of an exact solve.

    Raises InfeasibleError when no assignment of finite cost exists (within the budget), or when the table limit kept
    one from being found: the text says which. Raises ValueError when a table has a wrong shape, nan or -inf.
    """
    model = load(problem, memory_budget_bytes is not None)
    if is_pruned:
        model = prune(model)
    best = minimise(model, max_table_entries)
    if memory_budget_bytes is not None and best.memory_bytes > memory_budget_bytes:
        best = solve_under_budget(model, best, memory_budget_bytes, max_table_entries)
    choices = tuple(int(domain[i]) for domain, i in zip(model.domains, best.choices, strict=True))
    return replace(best, choices=choices, memory_bytes=memory_of(problem, choices))


def memory_of(problem: Problem, choices: tuple[int, ...]) -> float:
    """Bytes that an assignment takes; 0 for a problem without memory."""
    if problem.memory_bytes is None:
        return 0.0
    alone = [float(table[i]) for table, i in zip(problem.memory_bytes, choices, strict=True)]
    return math.fsum(alone + [float(table[tuple(choices[v] for v in scope)]) for scope, table in problem.pair_bytes.items()])
