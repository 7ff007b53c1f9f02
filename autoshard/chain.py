"""The chain that pipeline stages are cut from, and what a stage of it costs: sums over its places, less what it pays once.

    costs of stage [j, k)  =  sums[k] - sums[j] + at_end[k] + at_start[j] + sum of charge[p] with previous[p] < j <= reader[p] < k

`sums` counts what several places read at its first reader; every later reader pays again where a cut parts it from the
reader before. Without these charges the costs are a sum over the cuts, below the true costs: `Blocks.relaxed_costs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoshard.errors import ConstraintError, PlanError
from autoshard.pipeline_timeline import StageCosts

FIELDS = 9
FORWARD, BACKWARD, BACKWARD_INPUT, SEND, SEND_BACK, ONCE, AFTER, KEPT, RESIDENT = range(FIELDS)
"""What a stage costs, the last dim of arrays of costs: the fields of StageCosts, and the bytes of its weights."""


@dataclass(frozen=True)
class Weight:
    """A parameter: every stage with a place that reads it holds, gathers and steps it."""

    places: tuple[int, ...]  # that read it
    bytes: float  # resident on the rank, with gradient and optimizer state
    once_s: float = 0.0  # a step, before the stage's first microbatch
    after_s: float = 0.0  # a step, after the stage's last microbatch
    step_s: float = 0.0  # of the optimizer


@dataclass(frozen=True)
class Copy:
    """A value computed from inputs alone: every stage with a place that reads it computes it, once a microbatch."""

    places: tuple[int, ...]  # that read it
    forward_s: float


@dataclass(frozen=True)
class Chain:
    """What is cut: places 0 .. n - 1 in order. Cut k lies before place k; seconds and bytes are those of one microbatch."""

    forward_s: Sequence[float]  # [n]
    backward_s: Sequence[float]  # [n]
    backward_input_s: Sequence[float]  # [n] the part of backward_s that makes gradients of inputs
    sent_bytes: Sequence[float]  # [n + 1] forward over cut k; 0 at both ends
    sent_back_bytes: Sequence[float]  # [n + 1] gradients over cut k
    kept_bytes: Sequence[float]  # [n] kept for backward
    weights: Sequence[Weight] = ()
    copies: Sequence[Copy] = ()
    is_cut_allowed: Sequence[bool] | None = None  # [n + 1]; left out: everywhere

    def __post_init__(self) -> None:
        count = len(self.forward_s)
        lengths = {"backward_s": 0, "backward_input_s": 0, "kept_bytes": 0, "sent_bytes": 1, "sent_back_bytes": 1, "is_cut_allowed": 1}
        for name, more in lengths.items():
            values = getattr(self, name)
            if values is not None and len(values) != count + more:
                raise PlanError(f"{name} has {len(values)} entries; {count} places need {count + more}")
        for name in ("forward_s", "backward_s", "backward_input_s", "kept_bytes", "sent_bytes", "sent_back_bytes"):
            values = np.asarray(getattr(self, name), float)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise PlanError(f"{name} of a chain must be finite and not negative; the least is {values.min(initial=0)}")
        if (np.asarray(self.backward_input_s, float) > np.asarray(self.backward_s, float)).any():
            raise PlanError("backward_input_s is a part of backward_s: give no more than that at any place")
        items: tuple[Weight | Copy, ...] = (*self.weights, *self.copies)
        readers = [p for item in items for p in item.places]
        if readers and not (min(readers) >= 0 and max(readers) < count):
            raise PlanError(f"weights and copies are read by places 0 to {count - 1}, not {min(readers)} or {max(readers)}")


@dataclass(frozen=True)
class Link:
    """Between neighbouring pipeline ranks."""

    latency_s: float
    bytes_per_s: float


def stage_costs(chain: Chain, start: int, stop: int, link: Link) -> tuple[StageCosts, float]:
    """Costs of the stage of places `start` to `stop` - 1, and the bytes of its weights."""
    places = range(start, stop)
    weights = [w for w in chain.weights if any(p in places for p in w.places)]
    copied_s = sum(c.forward_s for c in chain.copies if any(p in places for p in c.places))
    costs = StageCosts(
        forward_s=float(sum(chain.forward_s[start:stop]) + copied_s),
        backward_s=float(sum(chain.backward_s[start:stop])),
        backward_input_s=float(sum(chain.backward_input_s[start:stop])),
        send_s=chain.sent_bytes[stop] / link.bytes_per_s,
        send_back_s=chain.sent_back_bytes[start] / link.bytes_per_s,
        kept_bytes=float(sum(chain.kept_bytes[start:stop])),
        once_s=float(sum(w.once_s for w in weights)),
        after_s=float(sum(w.after_s + w.step_s for w in weights)),
    )
    return costs, float(sum(w.bytes for w in weights))


@dataclass(frozen=True)
class Blocks:
    """A chain in numpy, where places that no cut may part are one block. Cut k lies before block k."""

    cuts: np.ndarray  # [n + 1] the place of every cut
    sums: np.ndarray  # [FIELDS, n + 1] over the blocks before the cut
    at_end: np.ndarray  # [FIELDS, n + 1] of the stage that ends at the cut
    at_start: np.ndarray  # [FIELDS, n + 1] of the stage that starts at the cut
    previous: np.ndarray  # [charges] block
    reader: np.ndarray  # [charges] block
    charge: np.ndarray  # [FIELDS, charges]
    forced: np.ndarray  # cuts where a stage must start

    @property
    def count(self) -> int:
        return len(self.cuts) - 1

    @cached_property
    def next_forced(self) -> np.ndarray:
        """[n + 1] the last cut at which a stage that starts at the cut may end."""
        stops = np.append(self.forced[self.forced > 0], self.count)
        return stops[np.minimum(np.searchsorted(stops, np.arange(self.count + 1), side="right"), len(stops) - 1)]

    @cached_property
    def by_end(self) -> np.ndarray:
        """[FIELDS, n + 1] what ending at a cut adds to the relaxed costs of a stage."""
        return self.sums + self.at_end

    @cached_property
    def by_start(self) -> np.ndarray:
        """[FIELDS, n + 1] what starting at a cut adds."""
        return self.at_start - self.sums

    def costs_from(self, start: int, ends: slice) -> np.ndarray:
        """[FIELDS, ends] of the stages from cut `start` to each cut of the slice, which lies after it."""
        costs = self.by_end[:, ends] + self.by_start[:, start, None]
        paid = (self.previous < start) & (start <= self.reader) & (self.reader + 1 < ends.stop)
        if paid.any():
            again = np.zeros(costs.T.shape)
            np.add.at(again, np.maximum(self.reader[paid] + 1 - ends.start, 0), self.charge[:, paid].T)
            costs += np.cumsum(again, axis=0).T
        return costs

    def relaxed_costs(self, starts: np.ndarray) -> np.ndarray:
        """[cuts, stages, FIELDS] for starts [cuts, stages]: what several places read is paid by its first stage alone."""
        ends = np.concatenate([starts[:, 1:], np.full((len(starts), 1), self.count)], axis=1)
        costs = self.by_end[:, ends] + self.by_start[:, starts]
        return np.moveaxis(costs, 0, -1)

    def costs(self, starts: np.ndarray) -> np.ndarray:
        """[cuts, stages, FIELDS] for starts [cuts, stages]."""
        costs = self.relaxed_costs(starts)
        if len(self.reader):
            stage_of = (starts[:, :, None] <= self.reader).sum(axis=1) - 1  # [cuts, charges]
            rows = np.arange(len(starts))[:, None]
            is_paid = starts[rows, stage_of] > self.previous
            cut, charge = np.nonzero(is_paid)
            np.add.at(costs, (cut, stage_of[cut, charge]), self.charge[:, charge].T)
        return costs


def blocks(chain: Chain, link: Link, starts_at: Collection[int] = (), together: Collection[Collection[int]] = ()) -> Blocks:
    """The blocks of a chain; a stage must start at each place of `starts_at`, and no cut parts a group of `together`.

    Raises ConstraintError where a stage must start at a place that may not be parted from the one before.
    """
    count = len(chain.forward_s)
    is_allowed = np.array(chain.is_cut_allowed if chain.is_cut_allowed is not None else [True] * (count + 1), bool)
    is_allowed[[0, count]] = True
    for group in together:
        is_allowed[min(group) + 1 : max(group) + 1] = False
    wrong = sorted(k for k in starts_at if not (0 <= k < count and is_allowed[k]))
    if wrong:
        raise ConstraintError(f"stages must start at places {wrong}, where no cut is allowed; drop them from starts_at or allow the cuts")
    cuts = np.flatnonzero(is_allowed)
    block_of = np.cumsum(is_allowed[:-1]) - 1
    each = np.zeros((FIELDS, count + 1))
    columns = {FORWARD: chain.forward_s, BACKWARD: chain.backward_s, BACKWARD_INPUT: chain.backward_input_s, KEPT: chain.kept_bytes}
    for field, column in columns.items():
        each[field, 1:] = column
    charges: dict[tuple[int, int], np.ndarray] = {}
    items: tuple[Weight | Copy, ...] = (*chain.weights, *chain.copies)
    for item in items:
        if not item.places:
            continue
        each[:, min(item.places) + 1] += _charge(item)
        for pair in itertools.pairwise(sorted({int(block_of[p]) for p in item.places})):
            charges[pair] = charges.get(pair, np.zeros(FIELDS)) + _charge(item)
    at_end, at_start = np.zeros((2, FIELDS, len(cuts)))
    at_end[SEND] = np.asarray(chain.sent_bytes, float)[cuts] / link.bytes_per_s
    at_start[SEND_BACK] = np.asarray(chain.sent_back_bytes, float)[cuts] / link.bytes_per_s
    pairs = np.array([*charges], int).reshape(-1, 2)
    charge = np.array([*charges.values()]).reshape(-1, FIELDS).T
    forced = np.searchsorted(cuts, sorted(set(starts_at)))
    return Blocks(cuts, np.cumsum(each, axis=1)[:, cuts], at_end, at_start, pairs[:, 0], pairs[:, 1], charge, forced)


def _charge(item: Weight | Copy) -> np.ndarray:
    charge = np.zeros(FIELDS)
    if isinstance(item, Copy):
        charge[FORWARD] = item.forward_s
    else:
        charge[[ONCE, AFTER, RESIDENT]] = item.once_s, item.after_s + item.step_s, item.bytes
    return charge
