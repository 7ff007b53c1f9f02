"""The exact solver: one choice per variable, least total cost, optionally under a memory budget.

    variables    x_v in {0 .. |v|-1}                                             v = 0 .. n-1
    objective    min  sum_v cost[v][x_v]  +  sum_(u,v) pair[u,v][x_u, x_v]       seconds; inf forbids
    constraint   sum_v memory[v][x_v]  <=  budget                                bytes; optional

`_prune` drops choices that some optimum does without. `_Elimination` then removes one variable x at a time (bucket
elimination in the min-plus semiring): the tables that mention x become one table over x's neighbours N,

    message[x_N]  =  min over x of  sum of the tables that mention x             `_min_sum`

and walking back gives every x its argmin. Equal tables in equal positions give equal messages, so tables are interned
(`_Pool`) and identical layers are eliminated once. A message over the size limit is replaced by several smaller ones
(mini-buckets): that is a lower bound, and `_descend` searches for the assignment. The budget enters by a multiplier,

    max over lam >= 0 of  min over x of  cost + lam * (bytes - budget)           `_solve_under_budget`

Source: Dechter, "Bucket elimination: a unifying framework for reasoning", 1999; Dechter and Rish, "Mini-buckets", 2003.
"""

import functools
import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoshard.errors import AutoshardError

_BLOCK_ENTRIES = 2**15  # of a block of `_min_sum`: 256 KiB of float64, which stays in the second-level cache
_PROBE_COLUMNS = 16  # of the dominance test: enough to refute nearly every pair without reading whole rows
_PRUNE_ROUNDS = 8
_MULTIPLIERS = 40
_TOLERANCE = 1e-12  # relative: what rounding may add to a sum of a few thousand costs

Make = Callable[..., np.ndarray]
Scope = tuple[int, ...]
Key = tuple[tuple[int, Scope], ...]  # of a bucket: (table id, position in the scope of each of its dims)


class InfeasibleError(AutoshardError, ValueError):
    """No assignment has a finite cost, or none of finite cost fits in the budget."""


@dataclass(frozen=True)
class Problem:
    """What to minimise.

    costs: per variable, f64[|v|], seconds; inf forbids the choice.
    pairs: (u, v) with u < v to f64[|u|, |v|], seconds; inf forbids the combination.
    memory_bytes: per variable, f64[|v|], whole bytes; None when there is no budget to keep.
    """

    costs: tuple[np.ndarray, ...]
    pairs: Mapping[tuple[int, int], np.ndarray]
    memory_bytes: tuple[np.ndarray, ...] | None = None


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
    model = _load(problem, memory_budget_bytes is not None)
    if is_pruned:
        _prune(model)
    best = _minimise(model, max_table_entries)
    if memory_budget_bytes is not None and best.memory_bytes > memory_budget_bytes:
        best = _solve_under_budget(model, best, memory_budget_bytes, max_table_entries)
    choices = tuple(int(domain[i]) for domain, i in zip(model.domains, best.choices, strict=True))
    memory_bytes = math.fsum(float(table[i]) for table, i in zip(problem.memory_bytes or (), choices, strict=False))
    return replace(best, choices=choices, memory_bytes=memory_bytes)


def _reaches(bound: float, value: float) -> bool:
    return bound >= value - _TOLERANCE * max(abs(value), abs(bound))


class _Pool:
    """Tables interned by content: equal tables have one id, so what is computed from ids is computed once."""

    def __init__(self, parent: "_Pool | None" = None) -> None:
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
class _Model:
    """The problem on interned tables; `domains[v]` are the original indices of the choices of v still in play."""

    pool: _Pool
    domains: list[np.ndarray]
    costs: list[int]
    memory: list[int]  # zeros without a budget
    pairs: dict[tuple[int, int], int]

    @functools.cached_property
    def neighbours(self) -> list[list[int]]:
        neighbours: list[list[int]] = [[] for _ in self.costs]
        for u, v in self.pairs:
            neighbours[u].append(v)
            neighbours[v].append(u)
        return neighbours

    def incident(self, v: int, u: int) -> tuple[int, bool]:
        """Table of the pair {v, u}, and whether `v` is its first dim."""
        return (self.pairs[v, u], True) if v < u else (self.pairs[u, v], False)

    def total(self, choices: Sequence[int]) -> float:
        unary = [float(self.pool[table][i]) for table, i in zip(self.costs, choices, strict=True)]
        return math.fsum(unary + [float(self.pool[t][choices[u], choices[v]]) for (u, v), t in self.pairs.items()])

    def bytes_of(self, choices: Sequence[int]) -> float:
        return math.fsum(float(self.pool[table][i]) for table, i in zip(self.memory, choices, strict=True))

    def moves(self, v: int, choices: Sequence[int], without: Collection[int] = ()) -> np.ndarray:
        """f64[|v|]: cost of each choice of `v` while its neighbours, but those in `without`, are as in `choices`."""
        cost = self.pool[self.costs[v]].copy()
        for u in self.neighbours[v]:
            if u not in without:
                table, is_row = self.incident(v, u)
                cost += self.pool[table][:, choices[u]] if is_row else self.pool[table][choices[u]]
        return cost

    def derive(self, name: Hashable, make_cost: Make, make_pair: Make = lambda pair: pair) -> "_Model":
        """Copy with costs `make_cost(cost, memory)` and pairs `make_pair(pair)`; `name` tells one derivation from another."""
        costs = [self.pool.derive(name, make_cost, *ids) for ids in zip(self.costs, self.memory, strict=True)]
        return replace(self, costs=costs, pairs={scope: self.pool.derive(name, make_pair, t) for scope, t in self.pairs.items()})


def _load(problem: Problem, has_budget: bool) -> _Model:
    pool = _Pool()
    known: dict[int, tuple[np.ndarray, int]] = {}  # by id(table), which stays its own as long as the table is held
    sizes = [len(table) for table in problem.costs]
    memory = problem.memory_bytes if has_budget else tuple(map(np.zeros, sizes))
    if memory is None or len(memory) != len(sizes):
        raise ValueError(f"a memory budget needs one memory table for each of the {len(sizes)} variables")

    def intern(name: str, table: np.ndarray, *shape: int) -> int:
        if table.shape != shape or not all(shape):
            raise ValueError(f"{name} has shape {table.shape}, expected {shape} and no empty dim")
        if id(table) not in known:
            if not table.min() > -math.inf:
                raise ValueError(f"{name} holds nan or -inf")
            known[id(table)] = table, pool.intern(np.asarray(table, dtype=np.float64))
        return known[id(table)][1]

    for u, v in problem.pairs:
        if not 0 <= u < v < len(sizes):
            raise ValueError(f"pair ({u}, {v}) is not 0 <= u < v < {len(sizes)}")
    pairs = {(u, v): intern(f"pairs[{u}, {v}]", problem.pairs[u, v], sizes[u], sizes[v]) for u, v in sorted(problem.pairs)}
    costs = [intern(f"costs[{v}]", table, sizes[v]) for v, table in enumerate(problem.costs)]
    memory_ids = [intern(f"memory_bytes[{v}]", table, sizes[v]) for v, table in enumerate(memory)]
    return _Model(pool, [np.arange(size) for size in sizes], costs, memory_ids, pairs)


def _prune(model: _Model) -> None:
    """Drop choices that are forbidden, or nowhere better than another choice of their variable."""
    changed = set(range(len(model.costs)))
    for _ in range(_PRUNE_ROUNDS):
        todo, changed = sorted(changed), set()
        for v in todo:
            # A table that several neighbours share is compared once: equal columns cannot tell two choices apart.
            incident = sorted({model.incident(v, u) for u in model.neighbours[v]})
            is_row = tuple(first for _, first in incident)
            sources = (model.costs[v], model.memory[v], *(table for table, _ in incident))
            kept_id = model.pool.derive(("kept", is_row), functools.partial(_kept_choices, is_row), *sources)
            kept = model.pool[kept_id]
            if not kept.size:
                raise InfeasibleError(f"every choice of variable {v} has infinite cost")
            if kept.size < model.domains[v].size:
                _restrict(model, v, kept_id)
                changed.update(model.neighbours[v])


def _kept_choices(is_row: Sequence[bool], cost: np.ndarray, memory: np.ndarray, *pairs: np.ndarray) -> np.ndarray:
    oriented = (table if first else table.T for table, first in zip(pairs, is_row, strict=True))
    blocks = [cost[:, None], memory[:, None], *oriented]
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


def _restrict(model: _Model, v: int, kept_id: int) -> None:
    def take(table: int, dim: int = 0) -> int:
        return model.pool.derive(("take", dim), lambda t, kept: t.take(kept, axis=dim), table, kept_id)

    model.domains[v] = model.domains[v][model.pool[kept_id]]
    model.costs[v], model.memory[v] = take(model.costs[v]), take(model.memory[v])
    for u in model.neighbours[v]:
        scope = (min(u, v), max(u, v))
        model.pairs[scope] = take(model.pairs[scope], scope.index(v))


class _Elimination:
    """Bucket elimination over (ascending scope, table id) factors. `bound`: the least total, or below it if `is_split`."""

    def __init__(self, pool: _Pool, count: int, factors: Sequence[tuple[Scope, int]], limit: float) -> None:
        self.bound, self.largest_table, self.is_split = 0.0, 1, False
        self.messages: dict[Key, tuple[int, float]] = {}
        self._pool, self._limit = pool, limit
        self._factors: list[tuple[Scope, int]] = []
        self._factors_of: list[set[int]] = [set() for _ in range(count)]
        self._sizes = [1] * count
        self._buckets: list[tuple[Scope, Key]] = [((), ())] * count
        self._classes: defaultdict[Key, set[int]] = defaultdict(set)  # variables with equal buckets
        self._heap: list[tuple[tuple[bool, float], int, Key]] = []
        self._eliminated: list[tuple[Scope, Key]] = []
        for scope, table in factors:
            self._add(scope, table)
        self._run()

    def _add(self, scope: Scope, table: int) -> None:
        for v, size in zip(scope, self._pool[table].shape, strict=True):
            self._factors_of[v].add(len(self._factors))
            self._sizes[v] = size
        self._factors.append((scope, table))

    def _run(self) -> None:
        for v in range(len(self._buckets)):
            self._refresh(v)
        while self._heap:
            rank, v, key = heapq.heappop(self._heap)
            members = self._classes[key]
            if members and self._rank(key) > rank:  # the class shrank since: each share of the work is larger now
                heapq.heappush(self._heap, (self._rank(key), v, key))
                continue
            for member in sorted(members):
                if member in members:  # else the elimination of a neighbour changed its bucket
                    self._eliminate(member)

    def _refresh(self, v: int) -> None:
        """Recompute the bucket of `v`: its scope, v first, and its key."""
        self._classes[self._buckets[v][1]].discard(v)
        factors = [self._factors[f] for f in self._factors_of[v]]
        scope = (v, *sorted({u for s, _ in factors for u in s} - {v}))
        position = {u: i for i, u in enumerate(scope)}
        key = tuple(sorted((table, tuple(position[u] for u in s)) for s, table in factors))
        self._buckets[v] = scope, key
        self._classes[key].add(v)
        heapq.heappush(self._heap, (self._rank(key), v, key))

    def _rank(self, key: Key) -> tuple[bool, float]:
        """Is the message over the limit; its work, shared among those that need it, but at least its size, which stays."""
        scope, _ = self._buckets[next(iter(self._classes[key]))]
        message, share = self._entries(scope[1:]), self._entries(scope) / len(self._classes[key])
        return message > self._limit, 0.0 if key in self.messages else max(share, message)

    def _entries(self, scope: Collection[int]) -> int:
        return math.prod(self._sizes[v] for v in scope)

    def _eliminate(self, v: int) -> None:
        scope, key = self._buckets[v]
        self._eliminated.append((scope, key))
        self._classes[key].discard(v)
        for factor in tuple(self._factors_of[v]):
            for u in self._factors[factor][0]:
                self._factors_of[u].discard(factor)
        for part_scope, part_key in self._split(scope, key):
            message, least = self._message(part_key)
            self.bound += least
            if len(part_scope) > 1:
                self._add(part_scope[1:], message)
        for u in scope[1:]:
            self._refresh(u)

    def _split(self, scope: Scope, key: Key) -> Iterator[tuple[Scope, Key]]:
        """The bucket itself when its message is within the limit, else mini-buckets whose messages are."""
        if self._entries(scope[1:]) <= self._limit:
            yield scope, key
            return
        self.is_split = True
        parts: list[tuple[set[int], list[tuple[int, Scope]]]] = []
        for table, positions in sorted(key, key=lambda item: (-self._pool[item[0]].size, item)):
            for used, items in parts:
                if self._entries([scope[p] for p in used.union(positions) - {0}]) <= self._limit:
                    used.update(positions)
                    items.append((table, positions))
                    break
            else:  # a table alone always goes: its message is smaller than itself
                parts.append((set(positions), [(table, positions)]))
        for used, items in parts:
            rank = {p: i for i, p in enumerate(sorted(used))}
            part_key = tuple(sorted((table, tuple(rank[p] for p in positions)) for table, positions in items))
            yield tuple(scope[p] for p in rank), part_key

    def _message(self, key: Key) -> tuple[int, float]:
        """Message of a bucket, shifted to a least entry of 0 so that repeated layers meet equal tables; and the shift."""
        if key not in self.messages:
            dims = 1 + max(p for _, positions in key for p in positions)
            message = _min_sum([_align(self._pool[table], positions, dims) for table, positions in key])
            least = float(message.min())
            if least == math.inf:
                raise InfeasibleError("no assignment has a finite cost")
            self.largest_table = max(self.largest_table, message.size)
            self.messages[key] = self._pool.intern(message - least), least
        return self.messages[key]

    def choices(self) -> list[int]:
        """Argmin of every bucket, last eliminated first; the lowest index of equal ones.

        Recomputed for the one row that is needed: tables of argmins would take as much memory as the messages.
        """
        choices = [0] * len(self._buckets)
        for scope, key in reversed(self._eliminated):
            index: list[int | slice] = [slice(None), *(choices[u] for u in scope[1:])]
            rows = [self._pool[table][tuple(index[p] for p in positions)] for table, positions in key]
            choices[scope[0]] = int(np.argmin(functools.reduce(np.add, rows)))
        return choices


def _align(table: np.ndarray, positions: Scope, dims: int) -> np.ndarray:
    """View of `table` with its dims at `positions` of `dims` dims, size 1 elsewhere."""
    sizes = dict(zip(positions, table.shape, strict=True))
    return table.transpose(np.argsort(positions)).reshape([sizes.get(p, 1) for p in range(dims)])


def _min_sum(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Least over dim 0 of the broadcast sum of `tables`, in blocks that stay in cache: the sum is never held whole."""
    tables = sorted(tables, key=lambda t: t.size)  # small sums first; the sort is stable
    size, *kept = np.broadcast_shapes(*(t.shape for t in tables))
    if not kept:
        return functools.reduce(np.add, tables).min(axis=0)
    least = np.full(kept, math.inf)
    rows = max(1, _BLOCK_ENTRIES // math.prod(kept[1:]))
    step = max(1, _BLOCK_ENTRIES // (min(rows, kept[0]) * math.prod(kept[1:])))
    for row in range(0, kept[0], rows):
        parts = [t[:, row : row + rows] if t.shape[1] > 1 else t for t in tables]
        block = least[row : row + rows]
        for start in range(0, size, step):
            total = functools.reduce(np.add, [t[start : start + step] for t in parts])
            np.minimum(block, total[0] if len(total) == 1 else total.min(axis=0), out=block)
    return least


def _minimise(model: _Model, limit: float) -> Solution:
    """Least total of `model`, in its own indices; when a message is over the limit, an assignment and a bound."""
    model = replace(model, pool=_Pool(model.pool))
    factors = [((v,), table) for v, table in enumerate(model.costs)] + list(model.pairs.items())
    run = _Elimination(model.pool, len(model.costs), factors, limit)
    choices = _improve(model, run.choices()) if run.is_split else run.choices()
    value = model.total(choices)
    bound = run.bound if run.is_split and not _reaches(run.bound, value) else value
    return Solution(tuple(choices), value, bound, model.bytes_of(choices), run.largest_table, len(run.messages))


def _improve(model: _Model, choices: list[int]) -> list[int]:
    """A local optimum of finite cost: `inf` is first priced so that every violation outweighs all finite costs."""
    if model.total(choices) == math.inf:
        tables = [model.pool[table] for table in (*model.costs, *model.pairs.values())]
        penalty = 1.0 + 2.0 * sum(float(np.abs(t[np.isfinite(t)]).max(initial=0.0)) for t in tables)
        soften = functools.partial(np.nan_to_num, posinf=penalty)
        choices = _descend(model.derive("soft", lambda cost, memory: soften(cost), soften), choices)
        if model.total(choices) == math.inf:
            raise InfeasibleError("found no assignment of finite cost under the table limit; one may exist")
    return _descend(model, choices)


def _descend(model: _Model, choices: Sequence[int], budget: float = math.inf) -> list[int]:
    """Re-optimise one variable, or two that share a small table, within the budget, until no such change helps."""
    choices, slack, is_better = list(choices), budget - model.bytes_of(choices), True
    small = [scope for scope, table in model.pairs.items() if model.pool[table].size <= _BLOCK_ENTRIES]
    while is_better:
        is_better = False
        for scope in [*((v,) for v in range(len(choices))), *small]:
            cost = functools.reduce(np.add.outer, [model.moves(v, choices, without=scope) for v in scope])
            if len(scope) == 2:
                cost += model.pool[model.pairs[scope]]
            memory = functools.reduce(np.add.outer, [model.pool[model.memory[v]] for v in scope])
            now = tuple(choices[v] for v in scope)
            extra = memory - memory[now]
            best = np.unravel_index(np.argmin(np.where(extra <= slack, cost, math.inf)), cost.shape)
            if not _reaches(cost[best], cost[now]):
                slack, is_better = slack - extra[best], True
                for v, choice in zip(scope, best, strict=True):
                    choices[v] = int(choice)
    return choices


def _solve_under_budget(model: _Model, cheap: Solution, budget: float, limit: float) -> Solution:
    """Best assignment within the budget, bounded by the Lagrangian dual. `cheap`: the optimum without a budget.

    The dual is concave and piecewise linear in the multiplier, so the next one to try is where the lines of the last
    assignments over and within the budget cross: that ends on the maximum, where bisection would only come near.
    """
    over, within, bound = cheap, _leanest(model, budget, limit), cheap.bound_s
    runs = [over, within]
    for _ in range(_MULTIPLIERS):
        loss = model.total(within.choices) - model.total(over.choices)
        multiplier = loss / (over.memory_bytes - within.memory_bytes)
        if multiplier <= 0.0:
            break
        priced = model.derive(("priced", multiplier), lambda cost, memory, m=multiplier: cost + m * memory)
        run = _minimise(priced, limit)
        runs.append(run)
        bound = max(bound, run.bound_s - multiplier * budget)
        if _reaches(run.objective_s, priced.total(over.choices)):
            break
        over, within = (run, within) if run.memory_bytes > budget else (over, run)
    starts = [within.choices, _shrink(model, over.choices, budget)]
    cost, choices = min((model.total(end), end) for end in (_descend(model, start, budget) for start in starts if start))
    largest, distinct = max(r.largest_table for r in runs), sum(r.distinct_eliminations for r in runs)
    return Solution(tuple(choices), cost, cost if _reaches(bound, cost) else bound, model.bytes_of(choices), largest, distinct)


def _leanest(model: _Model, budget: float, limit: float) -> Solution:
    """The allowed assignment of fewest bytes; raises InfeasibleError when that is over the budget."""

    def price(table: np.ndarray, allowed: np.ndarray | float = 0.0) -> np.ndarray:
        return np.where(np.isinf(table), math.inf, allowed)

    lean = _minimise(model.derive("bytes", price, price), limit)
    if lean.objective_s > budget:
        note = "" if lean.is_exact else f" found under the table limit, at least {lean.bound_s:,.0f}"
        raise InfeasibleError(f"budget of {budget:,.0f} bytes, least reachable is {lean.objective_s:,.0f} bytes{note}")
    return lean


def _shrink(model: _Model, choices: Sequence[int], budget: float) -> list[int]:
    """Change one variable at a time, the least seconds per byte saved first, until the budget holds; [] if stuck."""
    choices, stale = list(choices), list(range(len(choices)))
    options: dict[int, tuple[float, int, int]] = {}  # of each variable: its best price, itself, the choice to take
    while model.bytes_of(choices) > budget:
        for v in stale:
            cost, memory = model.moves(v, choices), model.pool[model.memory[v]]
            saved = memory[choices[v]] - memory
            price = np.divide(cost - cost[choices[v]], saved, where=saved > 0.0, out=np.full(len(cost), math.inf))
            options[v] = float(price.min()), v, int(price.argmin())
        least, v, target = min(options.values())
        if least == math.inf:
            return []
        choices[v], stale = target, [v, *model.neighbours[v]]
    return choices
