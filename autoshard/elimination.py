"""Bucket elimination in the min-plus semiring: one variable at a time, the tables that mention it become one over its neighbours.

    message[x_N]  =  min over x of  sum of the tables that mention x             `_min_sum`

Walking back gives every x its argmin. Equal tables in equal positions give equal messages, so identical layers are
eliminated once. A message over the size limit is replaced by several smaller ones (mini-buckets): that is a lower bound.

Source: Dechter, "Bucket elimination: a unifying framework for reasoning", 1999; Dechter and Rish, "Mini-buckets", 2003.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from autoshard.solver_tables import InfeasibleError, Pool, Scope

BLOCK_ENTRIES = 2**15  # of a block of `_min_sum`: 256 KiB of float64, which stays in the second-level cache

Key = tuple[tuple[int, Scope], ...]  # of a bucket: (table id, position in the scope of each of its dims)


class WideError(Exception):
    """Elimination would take more work than was granted."""


class Elimination:
    """Bucket elimination over (scope, table id) factors. `bound`: the least total, or below it if `is_split`.

    blocks: sets of variables to eliminate first, each by itself; blocks that meet equal tables alike are done once, so that
    a model of many equal layers takes little longer than one of few. kept: variables that are not eliminated.
    most_work: entries to add up at most; raises WideError when it takes more.
    """

    def __init__(
        self,
        pool: Pool,
        count: int,
        factors: Sequence[tuple[Scope, int]],
        limit: float,
        blocks: Sequence[Sequence[int]] = (),
        kept: Collection[int] = (),
        most_work: float = math.inf,
    ) -> None:
        self.bound, self.largest_table, self.is_split = 0.0, 1, False
        self.messages: dict[Key, tuple[int, float]] = {}
        self._pool, self._limit, self._done = pool, limit, set(kept)
        self._most_work, self._work = most_work, 0
        self._known: dict[Key, Elimination] = {}  # by the tables of a block
        self._factors: list[tuple[Scope, int]] = []
        self._factors_of: list[set[int]] = [set() for _ in range(count)]
        self._sizes = [1] * count
        self._buckets: list[tuple[Scope, Key]] = [((), ())] * count
        self._classes: defaultdict[Key, set[int]] = defaultdict(set)  # variables with equal buckets
        self._heap: list[tuple[tuple[bool, float], int, Key]] = []
        self._eliminated: list[tuple[Scope, Key]] = []
        for scope, table in factors:
            self._add(scope, table)
        for block in blocks:
            self._eliminate_block(block)
        self._run()

    def _eliminate_block(self, block: Sequence[int]) -> None:
        """Replace the factors of a block by those that are left of them over its neighbours."""
        touched = sorted({f for v in block for f in self._factors_of[v]})
        inside = set(block)
        border = sorted({u for f in touched for u in self._factors[f][0]} - inside)
        variables = [*block, *border]
        place = {v: k for k, v in enumerate(variables)}
        key = tuple(sorted((table, tuple(place[v] for v in scope)) for scope, table in (self._factors[f] for f in touched)))
        if key not in self._known:
            local = [(scope, table) for table, scope in key]
            part = Elimination(self._pool, len(variables), local, self._limit, (), range(len(block), len(variables)), self._most_work)
            self._known[key] = part
            self.messages.update(part.messages)
            self.largest_table, self.is_split = max(self.largest_table, part.largest_table), self.is_split or part.is_split
        part = self._known[key]
        for f in touched:
            for v in self._factors[f][0]:
                self._factors_of[v].discard(f)
        self.bound += part.bound
        self._eliminated += [(tuple(variables[p] for p in scope), bucket) for scope, bucket in part._eliminated]
        for scope, table in part.left():
            self._add(tuple(variables[p] for p in scope), table)
        self._done |= inside

    def left(self) -> list[tuple[Scope, int]]:
        """Factors over the variables that were kept."""
        return [self._factors[f] for f in sorted({f for factors in self._factors_of for f in factors})]

    def _add(self, scope: Scope, table: int) -> None:
        for v, size in zip(scope, self._pool[table].shape, strict=True):
            self._factors_of[v].add(len(self._factors))
            self._sizes[v] = size
        self._factors.append((scope, table))

    def _run(self) -> None:
        for v in range(len(self._buckets)):
            if v not in self._done:
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
        self._done.add(v)
        for factor in tuple(self._factors_of[v]):
            for u in self._factors[factor][0]:
                self._factors_of[u].discard(factor)
        for part_scope, part_key in self._split(scope, key):
            message, least = self._message(part_key)
            self.bound += least
            if len(part_scope) > 1:
                self._add(part_scope[1:], message)
        for u in scope[1:]:
            if u not in self._done:
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
            self._count(key)
            message = _min_sum([_align(self._pool[table], positions, dims) for table, positions in key])
            least = float(message.min())
            if least == math.inf:
                raise InfeasibleError("no assignment has a finite cost")
            self.largest_table = max(self.largest_table, message.size)
            self.messages[key] = self._pool.intern(message - least), least
        return self.messages[key]

    def _count(self, key: Key) -> None:
        """Entries that are added up for a message. Raises WideError when they are too many in all."""
        sizes = {p: n for table, positions in key for p, n in zip(positions, self._pool[table].shape, strict=True)}
        self._work += math.prod(sizes.values())
        if self._work > self._most_work:
            raise WideError

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
    rows = max(1, BLOCK_ENTRIES // math.prod(kept[1:]))
    step = max(1, BLOCK_ENTRIES // (min(rows, kept[0]) * math.prod(kept[1:])))
    for row in range(0, kept[0], rows):
        parts = [t[:, row : row + rows] if t.shape[1] > 1 else t for t in tables]
        block = least[row : row + rows]
        for start in range(0, size, step):
            total = functools.reduce(np.add, [t[start : start + step] for t in parts])
            np.minimum(block, total[0] if len(total) == 1 else total.min(axis=0), out=block)
    return least
