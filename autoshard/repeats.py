"""Equal layers in a row, of which a few are solved for all.

    short     the model without most of the layers of each run; across the gap the rest is joined as neighbours in the run are
    image     variable and scope of the model -> those of the short one that they are copies of
    dual      every table hands to its variables what its image hands to theirs (autoshard.message_passing)
    primal    every variable chooses as its image does

Whatever tables hand out, it gives a lower bound of the whole model. Where that reaches the total of the assignment, both are
exact, in time nearly independent of how many layers there are. They meet as a rule: after a sweep back, what is handed out in a
run stands for all that lies behind, and from layer to layer that changes by a constant alone (the turnpike of dynamic
programming). Where they do not, nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoshard.message_passing import Passed, pass_messages
from autoshard.solver_tables import Model, Scope, reaches

_LONGEST_PERIOD = 8  # layers after which a run repeats
_KEPT = 2  # periods of a run in the short model: one on either side of the gap


@dataclass(frozen=True)
class Gap:
    """Blocks `start` to `stop` (not included) are left out; they go on as the `period` blocks before them do."""

    start: int
    stop: int
    period: int

    def image(self, block: int) -> int:
        if not self.start <= block < self.stop:
            return block
        return self.start - self.period + (block - self.start) % self.period


@dataclass(frozen=True)
class Shortened:
    """A short model, and what every variable and scope of the whole one is a copy of."""

    model: Model
    variables: tuple[int, ...]
    scopes: Mapping[Scope, Scope]


def solve_repeats(model: Model) -> Passed | None:
    """The optimum of a model with runs of equal blocks, proven; None where there are none, or no proof is found this way."""
    short = shorten(model)
    if short is None:
        return None
    passed = pass_messages(short.model)
    if not reaches(passed.bound, passed.value):
        return None
    choices = tuple(passed.choices[v] for v in short.variables)
    value, bound = model.total(choices), _bound(model, short, passed.handed)
    kept = tuple(np.array([choice]) for choice in choices)
    return Passed(choices, value, bound, kept) if reaches(bound, value) else None


def shorten(model: Model) -> Shortened | None:
    """The model without most of its equal layers; None where no run of blocks is long enough."""
    place = {v: (number, k) for number, block in enumerate(model.layers) for k, v in enumerate(block)}
    gaps = _gaps(_signatures(model, place))
    if not gaps:
        return None
    gap_of = {block: gap for gap in gaps for block in range(gap.start, gap.stop)}
    stays = [v not in place or place[v][0] not in gap_of for v in range(len(model.domains))]
    number = {v: k for k, v in enumerate(v for v, is_kept in enumerate(stays) if is_kept)}

    def at(block: int, k: int) -> int:
        return number[model.layers[block][k]]

    def image(v: int, is_ahead: bool) -> int:
        """is_ahead: the other side of the gap stands for the first block of a period."""
        if v not in place:
            return number[v]
        block, k = place[v]
        gap = gap_of.get(block)
        if gap is None:
            return number[v]
        return at(gap.stop if is_ahead and gap.image(block) == gap.start - gap.period else gap.image(block), k)

    scopes = {}
    for scope in model.costs:
        blocks = {place[v][0] for v in scope if v in place}
        last = max(blocks, default=-1)
        found = tuple(image(v, len(blocks) > 1 and place.get(v, (-1,))[0] == last) for v in scope)
        if list(found) != sorted(set(found)):
            return None  # variables of a layer come in another order than those of its image
        scopes[scope] = found
    costs = {scopes[scope]: table for scope, table in model.costs.items()}
    domains = [domain for domain, is_kept in zip(model.domains, stays, strict=True) if is_kept]
    if any(model.pool[model.costs[scope]].shape != tuple(domains[v].size for v in found) for scope, found in scopes.items()):
        return None
    variables = tuple(image(v, False) for v in range(len(model.domains)))
    return Shortened(replace(model, domains=domains, costs=costs, memory={}, blocks=(), layers=()), variables, scopes)


def _signatures(model: Model, place: Mapping[int, tuple[int, int]]) -> list[object]:
    """Per block all tables that it is in, and where: blocks that have equal ones are alike. None: it meets more than its neighbours."""
    found: list[list | None] = [[] for _ in model.layers]
    for scope, table in model.costs.items():
        blocks = {place[v][0] for v in scope if v in place}
        for block in blocks:
            where = tuple((place[v][0] - block, place[v][1]) if v in place else ("outside", v) for v in scope)
            own = found[block]
            if max(blocks) - min(blocks) > 1:
                found[block] = None
            elif own is not None:
                own.append((table, where))
    return [None if own is None else tuple(sorted(own, key=repr)) for own in found]


def _gaps(signatures: Sequence[object]) -> list[Gap]:
    """What is left out of each run of blocks that repeats with some period, the longest first period first."""
    gaps, start = list[Gap](), 0
    while start < len(signatures):
        runs = [(_run(signatures, start, period), period) for period in range(1, _LONGEST_PERIOD + 1)]
        left_out = [(length // period - _KEPT) * period for length, period in runs]
        most = max(left_out)
        if most <= 0:
            start += 1
            continue
        length, period = runs[left_out.index(most)]
        gaps.append(Gap(start + period, start + period + most, period))
        start += length
    return gaps


def _run(signatures: Sequence[object], start: int, period: int) -> int:
    """How many blocks from `start` repeat with this period."""
    stop = start
    while stop + period < len(signatures) and signatures[stop] is not None and signatures[stop] == signatures[stop + period]:
        stop += 1
    return stop + period - start if stop > start else 0


def _bound(model: Model, short: Shortened, handed: Mapping[Scope, Sequence[np.ndarray]]) -> float:
    """The lower bound that the handed numbers of the short model give of the whole one; equal terms are computed once."""
    terms = list[float]()
    rests: dict[tuple[int, Scope], float] = {}
    parts: list[list[tuple[Scope, int]]] = [[] for _ in model.domains]
    for scope, table in model.costs.items():
        image = short.scopes[scope]
        if len(scope) == 1:
            continue
        for k, v in enumerate(scope):
            parts[v].append((image, k))
        if (table, image) not in rests:
            rest = model.pool[table]
            for k, numbers in enumerate(handed[image]):
                rest = rest - numbers.reshape([-1 if k == dim else 1 for dim in range(rest.ndim)])
            rests[table, image] = float(rest.min())
        terms.append(rests[table, image])
    beliefs: dict[object, float] = {}
    for v, own in enumerate(parts):
        key = (model.costs[v,], tuple(own))
        if key not in beliefs:
            beliefs[key] = float(sum((handed[image][k] for image, k in own), model.pool[model.costs[v,]]).min())
        terms.append(beliefs[key])
    return math.fsum(terms)
