"""The solver's problem, and its tables interned by content: equal tables have one id, so what follows from ids is computed once."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autoshard.errors import AutoshardError

_PROBE_COLUMNS = 16  # of the dominance test: enough to refute nearly every pair without reading whole rows
_TOLERANCE = 1e-12  # relative: what rounding may add to a sum of a few thousand costs

Make = Callable[..., np.ndarray]
Scope = tuple[int, ...]


class InfeasibleError(AutoshardError, ValueError):
    """No assignment has a finite cost, or none of finite cost fits in the budget: then `least_bytes` is what the leanest takes."""

    def __init__(self, text: str, least_bytes: float | None = None) -> None:
        super().__init__(text)
        self.least_bytes = least_bytes


@dataclass(frozen=True)
class Problem:
    """What to minimise.

    costs: per variable, f64[|v|], seconds; inf forbids the choice.
    pairs: ascending scope of two or three variables to f64[|u|, |v|(, |w|)], seconds; inf forbids the combination.
    memory_bytes: per variable, f64[|v|]; None when there is no budget to keep.
    pair_bytes: bytes of combinations, by scopes of `pairs`; scopes that are missing take none.
    blocks: disjoint sets of variables that repeat, in order: a hint of what to eliminate together.
    """

    costs: tuple[np.ndarray, ...]
    pairs: Mapping[Scope, np.ndarray]
    memory_bytes: tuple[np.ndarray, ...] | None = None
    pair_bytes: Mapping[Scope, np.ndarray] = field(default_factory=dict)
    blocks: tuple[Scope, ...] = ()


def reaches(bound: float, value: float) -> bool:
    """Whether `bound` is `value` but for rounding, or above it."""
    return bound >= value - _TOLERANCE * max(abs(value), abs(bound))


class Pool:
    """Tables interned by content."""

    def __init__(self, parent: Pool | None = None) -> None:
        """Starts with the tables of `parent`, which does not get those that are added here."""
        self._tables: list[np.ndarray] = list(parent._tables) if parent else []
        self._ids: dict[Hashable, int] = dict(parent._ids) if parent else {}

    def __getitem__(self, table_id: int) -> np.ndarray:
        return self._tables[table_id]

    def intern(self, table: np.ndarray) -> int:
        table = np.ascontiguousarray(table)
        key = (table.shape, table.dtype, hashlib.blake2b(table.data, digest_size=16).digest())
        if key not in self._ids:
            self._ids[key] = len(self._tables)
            self._tables.append(table)
        return self._ids[key]

    def derive(self, name: Hashable, make: Make, *sources: int) -> int:
        """Id of `make(*tables)`; with the same `name` and sources, it is made once."""
        if (name, sources) not in self._ids:
            self._ids[name, sources] = self.intern(make(*(self[s] for s in sources)))
        return self._ids[name, sources]


@dataclass
class Model:
    """The problem on interned tables; `domains[v]` are the original indices of the choices of v still in play.

    costs: seconds by scope, the scope (v,) of every variable among them. memory: bytes by scope, where there are any.
    blocks: of the problem, without what they share with each other. layers: the same, whole.
    """

    pool: Pool
    domains: list[np.ndarray]
    costs: dict[Scope, int]
    memory: dict[Scope, int]
    blocks: tuple[Scope, ...] = ()
    layers: tuple[Scope, ...] = ()

    @functools.cached_property
    def scopes_of(self) -> list[list[Scope]]:
        """Per variable the scopes of `costs` that it is in."""
        found: list[list[Scope]] = [[] for _ in self.domains]
        for scope in self.costs:
            for v in scope:
                found[v].append(scope)
        return found

    def neighbours(self, v: int) -> set[int]:
        return {u for scope in self.scopes_of[v] for u in scope} - {v}

    def total(self, choices: Sequence[int]) -> float:
        return self._sum(self.costs, choices)

    def bytes_of(self, choices: Sequence[int]) -> float:
        return self._sum(self.memory, choices)

    def _sum(self, tables: Mapping[Scope, int], choices: Sequence[int]) -> float:
        return math.fsum(float(self.pool[table][tuple(choices[v] for v in scope)]) for scope, table in tables.items())

    def moves(self, changed: Scope, choices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and bytes that the variables `changed` (one or two) are in, for each of their choices, others as in `choices`."""
        shape = [self.domains[v].size for v in changed]
        seconds, held = np.zeros(shape), np.zeros(shape)
        for scope in dict.fromkeys(scope for v in changed for scope in self.scopes_of[v]):
            index = tuple(slice(None) if u in changed else choices[u] for u in scope)
            part = [n if v in scope else 1 for v, n in zip(changed, shape, strict=True)]
            seconds += self.pool[self.costs[scope]][index].reshape(part)
            if scope in self.memory:
                held += self.pool[self.memory[scope]][index].reshape(part)
        return seconds, held

    def derive(self, name: Hashable, make: Make, without: Make | None = None) -> Model:
        """Copy without memory, costs `make(cost, memory)`; `without(cost)` where there is no memory. `name` tells derivations apart."""
        costs = {}
        for scope, table in self.costs.items():
            if scope in self.memory:
                costs[scope] = self.pool.derive(name, make, table, self.memory[scope])
            else:
                costs[scope] = table if without is None else self.pool.derive(name, without, table)
        return replace(self, costs=costs, memory={})


def load(problem: Problem, has_budget: bool) -> Model:
    """The problem on interned tables. Raises ValueError when a table has a wrong shape, nan or -inf."""
    pool = Pool()
    known: dict[int, tuple[np.ndarray, int]] = {}  # by id(table), which stays its own as long as the table is held
    sizes = [len(table) for table in problem.costs]
    if has_budget and (problem.memory_bytes is None or len(problem.memory_bytes) != len(sizes)):
        raise ValueError(f"a memory budget needs one memory table for each of the {len(sizes)} variables")

    def intern(name: str, table: np.ndarray, *shape: int) -> int:
        if table.shape != shape or not all(shape):
            raise ValueError(f"{name} has shape {table.shape}, expected {shape} and no empty dim")
        if id(table) not in known:
            if not table.min() > -math.inf:
                raise ValueError(f"{name} holds nan or -inf")
            known[id(table)] = table, pool.intern(np.asarray(table, dtype=np.float64))
        return known[id(table)][1]

    for scope in problem.pairs:
        if not all(0 <= u < v < len(sizes) for u, v in itertools.pairwise(scope)) or len(scope) < 2:
            raise ValueError(f"pair {scope} is not 0 <= u < v < {len(sizes)}")
    if not problem.pair_bytes.keys() <= problem.pairs.keys():
        raise ValueError(f"pair_bytes has scopes that pairs does not: {sorted(problem.pair_bytes.keys() - problem.pairs.keys())[:3]}")
    costs: dict[Scope, int] = {(v,): intern(f"costs[{v}]", table, sizes[v]) for v, table in enumerate(problem.costs)}
    memory: dict[Scope, int] = {}
    for scope in sorted(problem.pairs):
        shape = [sizes[v] for v in scope]
        costs[scope] = intern(f"pairs[{', '.join(map(str, scope))}]", problem.pairs[scope], *shape)
        if has_budget and scope in problem.pair_bytes:
            memory[scope] = intern(f"pair_bytes[{', '.join(map(str, scope))}]", problem.pair_bytes[scope], *shape)
    for v, table in enumerate(problem.memory_bytes or () if has_budget else ()):
        memory[v,] = intern(f"memory_bytes[{v}]", table, sizes[v])
    memory = {scope: t for scope, t in memory.items() if pool[t].any()}
    return Model(pool, [np.arange(size) for size in sizes], costs, memory, _inner(problem), problem.blocks)


def _inner(problem: Problem) -> tuple[Scope, ...]:
    """Blocks without the variables through which one meets another: of two that share a table, the earlier one."""
    block_of = {v: k for k, block in enumerate(problem.blocks) for v in block}
    pairs = ((u, v) for scope in problem.pairs for u, v in itertools.combinations(scope, 2) if u in block_of and v in block_of)
    shared = {u for u, v in pairs if block_of[u] != block_of[v]}
    return tuple(inner for block in problem.blocks if (inner := tuple(v for v in block if v not in shared)))


def prune(model: Model) -> Model:
    """`model` without choices that are forbidden, or nowhere better than another choice of their variable."""
    model = replace(model, domains=list(model.domains), costs=dict(model.costs), memory=dict(model.memory))
    changed = set(range(len(model.domains)))
    while changed:  # choices only get fewer
        todo, changed = sorted(changed), set()
        for v in todo:
            # A table that several neighbours share is compared once: equal columns cannot tell two choices apart.
            incident = sorted(set(_incident(model, v)))
            dims = tuple(dim for _, dim in incident)
            kept_id = model.pool.derive(("kept", dims), functools.partial(_kept_choices, dims), *(table for table, _ in incident))
            kept = model.pool[kept_id]
            if not kept.size:
                raise InfeasibleError(f"every choice of variable {v} has infinite cost")
            if kept.size < model.domains[v].size:
                _restrict(model, v, kept_id)
                changed |= model.neighbours(v)
    return model


def _incident(model: Model, v: int) -> Iterator[tuple[int, int]]:
    """Tables that mention `v`, and which of their dims it is."""
    for scope in model.scopes_of[v]:
        yield model.costs[scope], scope.index(v)
        if scope in model.memory:
            yield model.memory[scope], scope.index(v)


def _kept_choices(dims: Sequence[int], *tables: np.ndarray) -> np.ndarray:
    blocks = [np.moveaxis(table, dim, 0).reshape(table.shape[dim], -1) for table, dim in zip(tables, dims, strict=True)]
    allowed = np.flatnonzero(np.all([np.isfinite(block).any(axis=1) for block in blocks], axis=0))
    return allowed[_undominated(np.hstack(blocks)[allowed])]


def _undominated(rows: np.ndarray) -> np.ndarray:
    """Indices of rows that are not >= another row in every column; of equal rows the first. rows: [choice, column]"""
    is_kept = np.ones(len(rows), dtype=bool)
    may_dominate = np.ones((len(rows), len(rows)), dtype=bool)  # [dominated, dominating]
    for column in rows[:, :: max(1, rows.shape[1] // _PROBE_COLUMNS)].T:
        may_dominate &= column[:, None] >= column[None, :]
    # Small rows first: they drop the most. Equal rows have equal sums, so the first of them is met first.
    for row in np.argsort(rows.sum(axis=1), kind="stable"):
        rivals = np.flatnonzero(may_dominate[:, row] & is_kept) if is_kept[row] else ()
        if len(rivals) > 1:
            is_kept[rivals[(rows[rivals] >= rows[row]).all(axis=1)]] = False
            is_kept[row] = True
    return np.flatnonzero(is_kept)


def restrict(model: Model, kept: Sequence[np.ndarray]) -> Model:
    """`model` with only the choices `kept[v]` of every variable."""
    model = replace(model, domains=list(model.domains), costs=dict(model.costs), memory=dict(model.memory))
    for v, choices in enumerate(kept):
        if len(choices) < model.domains[v].size:
            _restrict(model, v, model.pool.intern(choices))
    return model


def _restrict(model: Model, v: int, kept_id: int) -> None:
    def take(table: int, dim: int) -> int:
        return model.pool.derive(("take", dim), lambda t, kept: t.take(kept, axis=dim), table, kept_id)

    model.domains[v] = model.domains[v][model.pool[kept_id]]
    for scope in model.scopes_of[v]:
        for tables in (model.costs, model.memory):
            if scope in tables:
                tables[scope] = take(tables[scope], scope.index(v))
