"""At which sizes another plan becomes the best.

The search is solved at a few of the sizes that are asked about. Between two whose plans differ, their costs as expressions
(autoshard.symbolic_cost) say where the one overtakes the other, and solving there and just before it confirms the place or
finds a third plan, until plans change only between neighbours. Where the search finds the same plan twice, it is taken to be
the best in between too: that is the one thing assumed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from autoshard.cost_report import price
from autoshard.errors import InputError, PlanError
from autoshard.instantiation import split_sizes
from autoshard.plan_diff import PlanDiff, diff_programs, in_words
from autoshard.program import Program, example_sizes, facts
from autoshard.symbolic import evaluate, positive
from autoshard.symbolic_cost import step_time
from autoshard.text import human_seconds

if TYPE_CHECKING:
    from autoshard.plan import Plan

_PROBES = 5
_MOST_SHOWN = 6


@dataclass(frozen=True)
class Crossover:
    """From `at` on, another plan than the one that is best at `below` is the best.

    kept_s, best_s: predicted step at `at` with the earlier plan (inf where its split dims do not divide) and with the new one.
    """

    size: str
    below: int
    at: int
    kept_s: float
    best_s: float
    diff: PlanDiff

    def __str__(self) -> str:
        why = f"the plan for {self.size} {self.below} splits a dim that does not divide"
        if not math.isinf(self.kept_s):
            why = f"it takes {human_seconds(self.kept_s)}, the new one {human_seconds(self.best_s)}"
        changes = "; ".join(in_words(self.diff.layouts, _MOST_SHOWN)) or "ops alone, no parameter and nothing that a module returns"
        return f"from {self.size} {self.at} on the plan changes ({why}): {changes}"

    def __rich__(self) -> str:
        return str(self).replace("[", r"\[")


@dataclass(frozen=True)
class _Solved:
    """The best plan at one size, and its seconds as a function of the size, inf where its split dims do not divide."""

    program: Program
    seconds: Callable[[int], float]

    @property
    def choices(self) -> tuple:
        """What tells plans apart: how every node is split and lies."""
        return tuple((n.name, facts(n).strategies, facts(n).layouts) for n in self.program.nodes("parameter", "op"))


def crossovers(plan: Plan, size: str, values: Sequence[int]) -> list[Crossover]:
    """Where in `values` (a range, say) of the dynamic size `size` the best plan changes, ascending; other sizes as in the example.

    Raises InputError for a size that was not called dynamic when the plan was made, or values that its trace does not serve,
    PlanError for a plan that was read from a file.
    """
    if plan.resolver is None:
        raise PlanError("this plan was read from a file, which does not hold what it takes to solve again; plan the model anew")
    symbol = plan.program.symbols.get(size)
    if symbol is None:
        known = ", ".join(plan.program.symbols) or "none"
        raise InputError(
            f"{size!r} is no size of this plan that may change (there are: {known}); plan with dynamic={size!r} for dim 0 of every "
            'argument, or dynamic={"argument": {dim: name}}. A model that torch.export cannot trace so has no costs in that size'
        )
    grid = sorted(set(values))
    if not grid or grid[0] < symbol.least or (symbol.most is not None and grid[-1] > symbol.most):
        raise InputError(f"the values of {size} are of {symbol.range}; got {f'{grid[0]} to {grid[-1]}' if grid else 'none'}")
    return list(_Search(plan, size, grid).found())


class _Search:
    def __init__(self, plan: Plan, size: str, grid: Sequence[int]) -> None:
        self.plan, self.size, self.grid = plan, size, grid
        self.known: dict[int, _Solved] = {}

    def at(self, index: int) -> _Solved:
        if index not in self.known:
            assert self.plan.resolver is not None
            program = self.plan.resolver.solve(sizes={self.size: self.grid[index]})
            alike = next((solved for solved in self.known.values() if solved.choices == _Solved(program, float).choices), None)
            self.known[index] = alike or _Solved(program, self._seconds(program))
        return self.known[index]

    def _seconds(self, program: Program) -> Callable[[int], float]:
        others = [name for name in (*program.mesh.axes, *program.symbols) if name != self.size]
        cost = sympy.lambdify(positive(self.size), step_time(program, self.plan.hardware, others), "math")
        splits = [(str(length), ways) for length, _, ways in split_sizes(program)]

        def seconds(value: int) -> float:
            sizes = {**example_sizes(program), self.size: value}
            return math.inf if any(evaluate(text, sizes) % ways for text, ways in splits) else float(cost(value))

        return seconds

    def found(self) -> Iterator[Crossover]:
        last = len(self.grid) - 1
        probes = sorted({round(last * k / _PROBES) for k in range(_PROBES + 1)})
        changes = [index for low, high in itertools.pairwise(probes) for index in self._changes(low, high)]
        current = self.at(0)
        for index in changes:
            new, value = self.at(index), self.grid[index]
            kept_s, best_s = current.seconds(value), new.seconds(value)
            if current.choices == new.choices or abs(kept_s - best_s) <= 1e-9 * best_s:
                continue  # as good: the search may take either
            before, after = (price(self.plan, solved.program) for solved in (current, new))
            diff = diff_programs(current.program, before, new.program, after, f"{self.size} {value}")
            yield Crossover(self.size, self.grid[index - 1], value, kept_s, best_s, diff)
            current = new

    def _changes(self, low: int, high: int) -> list[int]:
        """Indices in (low, high] whose plan is not the one before."""
        a, b = self.at(low), self.at(high)
        if low == high or a.choices == b.choices:
            return []
        if high == low + 1:
            return [high]
        cheaper = (k for k in range(low + 1, high) if b.seconds(self.grid[k]) < a.seconds(self.grid[k]))
        middle = next(cheaper, (low + high) // 2)
        left = max(middle - 1, low)
        return [*self._changes(low, left), *self._changes(left, middle), *self._changes(middle, high)]
