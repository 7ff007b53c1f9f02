"""Message passing: a lower bound and an assignment in time linear in the tables, where eliminating variables would take too much.

Every table may hand part of itself to its variables and back, which changes no total (a reparametrisation):

    least total  >=  sum over v of min (cost[v] + what v was handed)  +  sum over s of min (table[s] - what s handed out)

Sweeps over the variables in a fixed order, forth and back, raise the right side: a variable takes from the tables that it
shares with earlier variables all that they can give (their min-marginals), and divides what it has among those that it
shares with later ones. That is a block ascent on the dual of the linear relaxation. An assignment is read off greedily;
where its total reaches the bound, both are exact. Where not, a choice whose own bound is above the total of the best
assignment found is in no better assignment, and can be dropped.

Source: Kolmogorov, "A new look at reweighted message passing", TPAMI 2015 (SRMP; on pairs it is TRW-S, TPAMI 2006).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from autoshard.solver_tables import Model, Scope, reaches

_SWEEPS = 96  # forth and back; checked after 2, 4, 8, ...
_LEAST_PROGRESS = 0.02  # of the gap, between two checks: less, and further sweeps are not worth their time


@dataclass(frozen=True)
class Passed:
    """choices: the best assignment met; value: its total (inf where none of finite cost was met); bound: no total is less.

    kept: per variable, indices of the choices that a better assignment, or one as good, may have.
    handed: by scope what its table handed to each of its variables, in the order of the scope.
    """

    choices: tuple[int, ...]
    value: float
    bound: float
    kept: tuple[np.ndarray, ...]
    handed: Mapping[Scope, Sequence[np.ndarray]] = field(default_factory=dict)


class _Table(NamedTuple):
    """A table of two variables or more, in the order of sweeping forth, and what it handed to each of them."""

    scope: Scope
    entries: np.ndarray
    handed: list[np.ndarray]


def pass_messages(model: Model) -> Passed:
    """Bound and assignment of a model whose every choice is in some combination of finite cost (solver_tables.prune sees to it)."""
    return _Sweeps(model).run()


class _Sweeps:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.order = _breadth_first(model)
        rank = {v: k for k, v in enumerate(self.order)}
        self.beliefs = [model.pool[model.costs[v,]].copy() for v in range(len(model.domains))]  # cost and what was handed in
        self.tables_of: list[list[tuple[_Table, int]]] = [[] for _ in model.domains]
        self.tables: list[_Table] = []
        turned: dict[tuple[int, Scope], np.ndarray] = {}
        for scope, table in model.costs.items():
            if len(scope) > 1:
                dims = tuple(sorted(range(len(scope)), key=lambda k: rank[scope[k]]))
                if (table, dims) not in turned:  # of equal layers once
                    turned[table, dims] = np.ascontiguousarray(model.pool[table].transpose(dims))
                entries = turned[table, dims]
                made = _Table(tuple(scope[k] for k in dims), entries, [np.zeros(n) for n in entries.shape])
                self.tables.append(made)
                for k, v in enumerate(made.scope):
                    self.tables_of[v].append((made, k))

    def run(self) -> Passed:
        choices, value, bound, before = (0,) * len(self.order), math.inf, -math.inf, math.inf
        for sweep in range(1, _SWEEPS + 1):
            for is_forth in (True, False):
                for v in self.order if is_forth else reversed(self.order):
                    self._visit(v, is_forth)
            if sweep & (sweep - 1) and sweep != _SWEEPS:
                continue
            bound = max(bound, self._bound())
            found = self._assignment()
            if (total := self.model.total(found)) < value:
                choices, value = tuple(found), total
            gap = value - bound
            if reaches(bound, value) or gap > (1.0 - _LEAST_PROGRESS) * before:
                break
            before = gap if math.isfinite(gap) else before
        handed = {}
        for table in self.tables:
            of_variable = dict(zip(table.scope, table.handed, strict=True))
            handed[tuple(sorted(table.scope))] = [of_variable[v] for v in sorted(table.scope)]
        return Passed(choices, value, bound, self._kept(value - self._bound()), handed)

    def _visit(self, v: int, is_forth: bool) -> None:
        tables = self.tables_of[v]
        # going forth the last variable of a table gives nothing back, going back the first one
        last = [len(table.scope) - 1 if is_forth else 0 for table, _ in tables]
        taking = [(table, k) for table, k in tables if k != (0 if is_forth else len(table.scope) - 1)]
        giving = [pair for pair, end in zip(tables, last, strict=True) if pair[1] != end]
        for table, k in taking:
            least = _min_marginal(table, k)
            self.beliefs[v] += least
            table.handed[k] += least
        if giving:
            share = self.beliefs[v] / max(len(giving), len(taking))
            for table, k in giving:
                table.handed[k] -= share
                self.beliefs[v] -= share

    def _bound(self) -> float:
        return math.fsum([float(b.min()) for b in self.beliefs] + [float(_rest(table).min()) for table in self.tables])

    def _assignment(self) -> list[int]:
        """The best choice of one variable after another, given those before it."""
        choices = [-1] * len(self.order)
        for v in self.order:
            own = self.beliefs[v].copy()
            for table, k in self.tables_of[v]:
                if all(choices[u] >= 0 or u == v for u in table.scope):
                    index = tuple(slice(None) if u == v else choices[u] for u in table.scope)
                    own += table.entries[index] - table.handed[k]
            choices[v] = int(own.argmin())
        return choices

    def _kept(self, gap: float) -> tuple[np.ndarray, ...]:
        handed = (handed for table in self.tables for handed in table.handed)
        slack = gap * (1.0 + 1e-9) + 1e-12 * max(map(_largest, (*self.beliefs, *handed)))  # what was handed on was rounded
        kept = []
        for v, belief in enumerate(self.beliefs):
            above = belief - belief.min()
            for table, k in self.tables_of[v]:
                least = _min_marginal(table, k)
                above = above + (least - least.min())
            kept.append(np.flatnonzero(above <= slack))
        return tuple(kept)


def _largest(numbers: np.ndarray) -> float:
    return float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))


def _rest(table: _Table) -> np.ndarray:
    """What a table has left when it handed out what it did."""
    rest = table.entries
    for k, handed in enumerate(table.handed):
        rest = rest - handed.reshape([-1 if k == dim else 1 for dim in range(rest.ndim)])
    return rest


def _min_marginal(table: _Table, k: int) -> np.ndarray:
    """Least of the rest for each choice of the k-th variable."""
    rest = table.entries
    for other, handed in enumerate(table.handed):
        if other != k:
            rest = rest - handed.reshape([-1 if other == dim else 1 for dim in range(rest.ndim)])
    return rest.min(axis=tuple(dim for dim in range(rest.ndim) if dim != k)) - table.handed[k]


def _breadth_first(model: Model) -> list[int]:
    """All variables, each near its neighbours."""
    order: list[int] = []
    seen: set[int] = set()
    for start in range(len(model.domains)):
        waiting = deque([start] if start not in seen else [])
        seen.add(start)
        while waiting:
            v = waiting.popleft()
            order.append(v)
            for u in sorted(model.neighbours(v) - seen):
                seen.add(u)
                waiting.append(u)
    return order
