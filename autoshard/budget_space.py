"""The search under a memory budget: beside every layout, what backward computes or gathers again instead of keeping it.

    variables   those of SearchSpace; a weight's choices twice, kept or gathered again in backward; per layer, whether
                backward runs it again
    seconds     as in SearchSpace; forward once more for what is gathered or run again
    bytes       parameters with their optimizer state, and what autograd keeps (autoshard.kept_bytes)

A table between two variables gains the reader's layer as a third, which has two choices: so the graph stays as thin as it
was, twice as wide. Where a layer runs again, its conversions do too, and of what it reads the smaller side is kept: what
enters it, or what an inward conversion makes of that when it is not larger (autoshard.regions places conversions so).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import fx

from autoshard.candidates import Candidate
from autoshard.kept_bytes import KeptBytes, Value, copies
from autoshard.layers import Layer, find_layers
from autoshard.ops.row import TensorInfo
from autoshard.placements import Layout
from autoshard.program import facts
from autoshard.regions import comes_from_parameter
from autoshard.search_space import SearchSpace
from autoshard.solver import Problem

What = fx.Node | Value | Layer
Terms = tuple[np.ndarray, np.ndarray]  # seconds and bytes of one table


class BudgetSpace:
    """The problem with memory over the candidates of `space`.

    again: whether anything may be gathered or run again; without, the variables are those of `space` and layers none.
    """

    def __init__(self, space: SearchSpace, again: bool = True) -> None:
        self.program, self.again = space.program, again
        self.kept = KeptBytes(space.program, space.costs)
        self.space = copy.copy(space)
        self._doubled: dict[int, list[Candidate]] = {}
        self.space.domains = {node: self._choices(node, domain) for node, domain in space.domains.items()}
        self.layers = find_layers(space.program) if again and space.random is None else []
        self.layer_of = {node: layer for layer in self.layers for node in layer.nodes}
        self.readers = {value: self._layer_of_readers(value) for value in space.supplies}
        self.order = self._order()
        self._index = {what: k for k, what in enumerate(self.order)}

    def _choices(self, node: fx.Node, domain: list[Candidate]) -> list[Candidate]:
        """For what is a weight: each split layout twice."""
        if not self.again or not comes_from_parameter(node) or len(facts(node).values) != 1:
            return domain
        if id(domain) not in self._doubled:
            split = [c for c in domain if any(p.is_split for p in c.outputs[0])]
            self._doubled[id(domain)] = [*domain, *(replace(c, gathers_again=True) for c in split)]
        return self._doubled[id(domain)]

    def _layer_of_readers(self, value: Value) -> Layer | None:
        found = {self.layer_of.get(user) for user, _ in self.space.uses[value]}
        return found.pop() if len(found) == 1 else None

    def _order(self) -> list[What]:
        """Variables in the order of the program, a layer before its nodes."""
        order: dict[What, None] = {}
        for node in self.program.graph.nodes:
            if node in self.layer_of:
                order.setdefault(self.layer_of[node])
            if node in self.space.domains:
                order[node] = None
            order.update({(node, k): None for k in range(len(facts(node).values)) if (node, k) in self.space.supplies})
        return list(order)

    # ---------------------------------------------------------------------------------------------- costs and tables

    def problem(self) -> Problem:
        """The solver's problem; `order` says what each variable stands for."""
        costs = [self._alone(what) for what in self.order]
        memory = [self._alone_bytes(what) for what in self.order]
        pairs: dict[tuple[int, ...], np.ndarray] = {}
        pair_bytes: dict[tuple[int, ...], np.ndarray] = {}

        def add(scope: Sequence[What | None], terms: Terms) -> None:
            """A table over what `scope` names."""
            key, dims = zip(*sorted((self._index[what], dim) for dim, what in enumerate(w for w in scope if w is not None)), strict=True)
            for tables, table in zip((pairs, pair_bytes), terms, strict=True):
                oriented = self._oriented(table, dims)
                tables[key] = tables[key] + oriented if key in tables else oriented

        for node, domain in self.space.domains.items():
            if node in self.layer_of:
                add((node, self.layer_of[node]), self._of_op(node, domain))
        for value, layer in self.readers.items():
            add((value[0], value, layer), self._to_supply(value))
            for other in self._entered(value):
                add((value, other), self._held_for(value))
        for value, users in self.space.uses.items():
            for user, k in users:
                if user in self.space.domains and value not in self.space.fixed:
                    source = value if value in self.space.supplies else value[0]
                    terms = self._from_supply(value, user, k) if value in self.space.supplies else self._between(value, user, k)
                    add((source, user, self.layer_of.get(user)), terms)
        needed = {scope: table for scope, table in pair_bytes.items() if table.any()}
        return Problem(tuple(costs), pairs, tuple(memory), needed, blocks_of(self.space, self.order, self.layers))

    def _oriented(self, table: np.ndarray, dims: Sequence[int]) -> np.ndarray:
        if list(dims) == sorted(dims):
            return table
        return self.space.remember(("oriented", id(table), tuple(dims)), lambda: np.ascontiguousarray(table.transpose(dims)), table)

    def fixed_bytes(self) -> float:
        """What is kept of values that are decided beforehand."""
        fixed, kept = self.space.fixed, self.kept.kept
        nodes = [value for value in fixed if value in kept.values and facts(value[0]).role == "op"]
        return math.fsum(self.kept.local(facts(node).values[k], fixed[node, k]) for node, k in nodes)

    def running_again(self, problem: Problem, choices: Sequence[int]) -> float:
        """Bytes by which backward exceeds what forward kept, in the layer that it runs again where that is most.

        When it comes to a layer, it holds all that the layer would keep, and no longer what was kept behind it.
        """
        held: dict[int, float] = {}
        freed = np.zeros(len(self.order))  # by variable: what goes when backward has passed it
        for scope, table in problem.pair_bytes.items():
            index = [choices[u] for u in scope]
            now = float(table[tuple(index)])
            freed[max(v for v in scope if not isinstance(self.order[v], Layer))] += now
            for v in scope:
                if isinstance(self.order[v], Layer) and choices[v] == 1:
                    index[scope.index(v)] = 0
                    held[v] = held.get(v, 0.0) + float(table[tuple(index)]) - now
        for v, table in enumerate(problem.memory_bytes or ()):
            if not self.is_parameter(self.order[v]):
                freed[v] += float(table[choices[v]])
        behind = freed[::-1].cumsum()[::-1]
        ends = {v: self._index[next(n for n in reversed(self.order[v].nodes) if n in self._index)] for v in held}  # type: ignore[union-attr]
        return max((max(0.0, extra - float(behind[ends[v] + 1 :][:1].sum())) for v, extra in held.items()), default=0.0)

    @staticmethod
    def is_parameter(what: What) -> bool:
        return isinstance(what, fx.Node) and facts(what).role == "parameter"

    def _alone(self, what: What) -> np.ndarray:
        return np.zeros(2) if isinstance(what, Layer) else self.space.unary(what)

    def _alone_bytes(self, what: What) -> np.ndarray:
        if not isinstance(what, fx.Node):
            return np.zeros(2 if isinstance(what, Layer) else len(self.space.supplies[what]))
        domain = self.space.domains[what]
        if self.is_parameter(what):
            return np.array([self.kept.at_rest(what, c.outputs[0]) for c in domain])
        return np.zeros(len(domain)) if what in self.layer_of else self._own_bytes(what, domain)

    def _own_bytes(self, node: fx.Node, domain: list[Candidate]) -> np.ndarray:
        key = ("own", id(domain), self.kept.kept.of_op.get(node), facts(node).values)
        return self.space.remember(key, lambda: np.array([self.kept.of_op(node, c) for c in domain]), domain)

    def _of_op(self, node: fx.Node, domain: list[Candidate]) -> Terms:
        """[candidate, runs again]: forward once more; what the op keeps."""
        own = self._own_bytes(node, domain)

        def make() -> np.ndarray:
            once = self.space.table.forward_s(node, domain)
            return np.stack([np.stack([np.zeros(len(domain)), once], axis=1), np.stack([own, np.zeros(len(domain))], axis=1)])

        both = self.space.remember(("of op", id(domain), id(own)), make, domain, own)
        return self._parts(both)

    def _parts(self, both: np.ndarray) -> Terms:
        first = self.space.remember(("part", id(both), 0), lambda: both[0], both)
        second = self.space.remember(("part", id(both), 1), lambda: both[1], both)
        return first, second

    # -------------------------------------------------------------------------------------------------------- tables

    def _between(self, value: Value, user: fx.Node, k: int) -> Terms:
        """[producer, reader, runs again]: a value with one reader."""
        have, want = [c.outputs[value[1]] for c in self.space.domains[value[0]]], [c.inputs[k] for c in self.space.domains[user]]
        seconds = self.space.convert(value, user, k)
        layer, reads = self.layer_of.get(user), int(self.kept.is_read(user, k))
        return self._moved(value, layer, reads, seconds, have, want)

    def _to_supply(self, value: Value) -> Terms:
        """[producer, supply, readers run again]."""
        ways = self.space.supplies[value]
        have = [c.outputs[value[1]] for c in self.space.domains[value[0]]]
        reads = sum(self.kept.is_read(user, k) for user, k in self.space.uses[value])
        return self._moved(value, self.readers[value], reads, self.space.made(value, ways), have, [way.hub for way in ways])

    def _moved(
        self, value: Value, layer: Layer | None, reads: int, seconds: np.ndarray, have: Sequence[Layout], want: Sequence[Layout]
    ) -> Terms:
        """A value's way to its reader or supply. reads: how many readers keep it; layer: of the readers."""
        node, info = value[0], facts(value[0]).values[value[1]]
        inside = layer is not None and self.layer_of.get(node) is layer
        is_weight, is_counted = comes_from_parameter(node), self.kept.is_counted_before(value)
        is_counted &= inside or layer is None or is_weight
        again = tuple(c.gathers_again for c in self.space.domains[node])
        key = ("moved", id(seconds), info, reads, layer is None, inside, is_weight, is_counted, again)

        def make() -> np.ndarray:
            once = self._forward(have, want, info)
            copied, before, after = copies(have, want), self.kept.column(info, have)[:, None], self.kept.column(info, want)[None, :]
            is_again = np.array(again)[:, None] & copied & (after > before)
            held = np.where(copied, after, 0.0 if is_counted else after) * bool(reads)
            rest = 0.0 if facts(node).role == "parameter" else before * bool(reads)
            kept = seconds + np.where(is_again, once * reads, 0.0), np.where(is_again, rest, held)
            if layer is None:
                return np.stack(kept)
            if inside or is_weight:
                repeated = seconds + once, np.zeros_like(held)
            else:
                grows = after > before
                repeated = seconds + np.where(grows, once, 0.0), np.where(grows, before, after) + np.zeros_like(held)
            return np.stack([np.stack(pair, axis=-1) for pair in zip(kept, repeated, strict=True)])

        return self._parts(self.space.remember(key, make, seconds))

    def _from_supply(self, value: Value, user: fx.Node, k: int) -> Terms:
        """[supply, reader, runs again]: what the reader converts on from the hub."""
        info, layer = facts(value[0]).values[value[1]], self.layer_of.get(user)
        hubs, want = [way.hub for way in self.space.supplies[value]], [c.inputs[k] for c in self.space.domains[user]]
        seconds = self.space.offer(value, user, k)
        inside = layer is not None and (self.layer_of.get(value[0]) is layer or comes_from_parameter(value[0]))
        is_read = self.kept.is_read(user, k)
        key = ("onward", id(seconds), info, is_read, layer is None, inside)

        def make() -> np.ndarray:
            once, copied = self._forward(hubs, want, info), copies(hubs, want)
            before, after = self.kept.column(info, hubs)[:, None], self.kept.column(info, want)[None, :]
            held = np.where(copied, after, 0.0) * is_read
            if layer is None:
                return np.stack([seconds, held])
            runs = np.full(copied.shape, True) if inside else after > before
            repeated = seconds + np.where(runs, once, 0.0), np.where(runs | ~copied, 0.0, after)
            return np.stack([np.stack(pair, axis=-1) for pair in zip((seconds, held), repeated, strict=True)])

        return self._parts(self.space.remember(key, make, seconds))

    def _entered(self, value: Value) -> list[Layer]:
        """Layers that keep a supply when they run again, where nothing else keeps it: it has readers elsewhere too."""
        if self.readers[value] is not None or comes_from_parameter(value[0]):
            return []
        uses = self.space.uses[value]
        if any(self.kept.is_read(user, k) for user, k in uses):
            return []
        found = dict.fromkeys(self.layer_of[user] for user, _ in uses if user in self.layer_of)
        return [layer for layer in found if self.layer_of.get(value[0]) is not layer]

    def _held_for(self, value: Value) -> Terms:
        ways, info = self.space.supplies[value], facts(value[0]).values[value[1]]

        def make() -> np.ndarray:
            held = self.kept.column(info, [way.hub for way in ways])
            return np.stack([np.zeros((len(ways), 2)), np.stack([np.zeros(len(ways)), held], axis=1)])

        return self._parts(self.space.remember(("held", tuple(ways), info), make))

    def _forward(self, have: Sequence[Layout], want: Sequence[Layout], info: TensorInfo) -> np.ndarray:
        """Seconds of the forward direction alone; 0 where there is no way, which the price of both directions says."""
        seconds = self.space.seconds(have, want, replace(info, needs_grad=False))
        return np.where(np.isfinite(seconds), seconds, 0.0)


def blocks_of(space: SearchSpace, order: Sequence[What], layers: Sequence[Layer]) -> tuple[tuple[int, ...], ...]:
    """Numbers of the variables of each layer: its nodes, and the supplies and weights that it alone reads."""
    layer_of: dict[What, Layer] = {node: layer for layer in layers for node in layer.nodes}
    blocks: dict[Layer, list[int]] = {layer: [] for layer in layers}
    for k, what in enumerate(order):
        owner = what if isinstance(what, Layer) else layer_of.get(what)
        if owner is None and not isinstance(what, Layer):
            uses = space.uses.get(what if isinstance(what, tuple) else (what, 0), [])
            readers = {layer_of.get(user) for user, _ in uses}
            owner = readers.pop() if len(readers) == 1 else None
        if owner is not None:
            blocks[owner].append(k)
    return tuple(map(tuple, blocks.values()))


def memory_of_plan(space: SearchSpace, choice: Mapping[fx.Node | Value, int]) -> float:
    """Bytes that a choice for the plain problem keeps when nothing is gathered or run again."""
    chosen = BudgetSpace(space.at(choice), again=False)
    problem = chosen.problem()
    tables = [*(problem.memory_bytes or ()), *problem.pair_bytes.values()]
    return math.fsum(float(table.sum()) for table in tables) + chosen.fixed_bytes()
