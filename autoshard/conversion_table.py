"""Seconds of converting a value between any two layouts, whole tables at a time.

For every order of the axes: each axis that differs takes one step, on the bytes that the other axes leave at that moment,
and is legal as in conversions.routes. The cheapest legal order wins; pairs without one (they need a detour through whole
axes) are priced one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from autoshard.conversions import BY_KINDS, without_gradient
from autoshard.costs import CostModel, stretch
from autoshard.ops.row import TensorInfo
from autoshard.placements import Layout, Placement, R

_KINDS = "SPRI"


class ConversionTable:
    """Prices of conversions on one mesh; `random` draws prices in place of the real ones (0 and inf stay)."""

    def __init__(self, costs: CostModel, random: np.random.Generator | None = None) -> None:
        self.costs, self.random = costs, random
        self.sizes = costs.mesh.shape
        self.codes: dict[Placement, int] = {}
        self.fitting: dict[Sequence[int], np.ndarray] = {}
        self.terms = {needs_grad: [self._axis_terms(axis, needs_grad) for axis in range(len(self.sizes))] for needs_grad in (False, True)}

    def _axis_terms(self, axis: int, needs_grad: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per algorithm: fixed seconds and seconds per byte, by kind before and after; one where an axis has but one."""
        terms = {kinds: self.costs.row_terms(row, axis, needs_grad) for kinds, row in BY_KINDS.items()}
        tables = []
        for k in range(max(map(len, terms.values()))):
            fixed, per_byte = np.zeros((4, 4)), np.zeros((4, 4))
            for (src, dst), choices in terms.items():
                where = _KINDS.index(src), _KINDS.index(dst)
                fixed[where], per_byte[where] = choices[min(k, len(choices) - 1)]
            tables.append((fixed, per_byte))
        return tables

    def seconds(self, have: Sequence[Layout], want: Sequence[Layout], info: TensorInfo) -> np.ndarray:
        """f64[len(have), len(want)]: 0 where equal, inf where there is no way."""
        if not info.needs_grad:
            have, want = [without_gradient(x) for x in have], [without_gradient(x) for x in want]
        rows, columns = list(dict.fromkeys(have)), list(dict.fromkeys(want))
        small = self._distinct(rows, columns, info)
        row_of, column_of = {x: k for k, x in enumerate(rows)}, {x: k for k, x in enumerate(columns)}
        return small[np.ix_([row_of[x] for x in have], [column_of[x] for x in want])]

    def _distinct(self, rows: list[Layout], columns: list[Layout], info: TensorInfo) -> np.ndarray:
        best = self._direct(rows, columns, info)
        if np.isinf(best).any():
            best = np.where(np.isinf(best), self._detour(rows, columns, info), best)
        for i, j in np.argwhere(np.isinf(best)):
            route = self.costs.best_route(rows[i], columns[j], info)
            best[i, j] = math.inf if route is None else route[0]
        if not info.nbytes:
            best = np.where(np.isfinite(best), 0.0, np.inf)  # nothing to send
        if self.random is not None:
            best = np.where(np.isfinite(best), self.random.random(best.shape), np.inf)
        same = (self._encode(rows)[3][:, None] == self._encode(columns)[3][None]).all(axis=2)
        return np.where(same, 0.0, best)

    def _direct(self, rows: list[Layout], columns: list[Layout], info: TensorInfo) -> np.ndarray:
        """One step per axis that differs, in the cheapest legal order."""
        src, dst = self._encode(rows), self._encode(columns)
        best = np.full((len(rows), len(columns)), np.inf)
        for order in itertools.permutations(range(len(self.sizes))):
            best = np.minimum(best, self._in_order(order, src, dst, info))
        return best

    def _detour(self, rows: list[Layout], columns: list[Layout], info: TensorInfo) -> np.ndarray:
        """Every split axis gathered first, then cut anew."""
        whole = [tuple(R if p.is_split else p for p in layout) for layout in rows]
        middle = list(dict.fromkeys(whole))
        through = [middle.index(mid) for mid in whole]
        gathered = self._direct(rows, middle, info)[np.arange(len(rows)), through]
        return gathered[:, None] + self._direct(middle, columns, info)[through]

    def _encode(self, layouts: list[Layout]) -> tuple[np.ndarray, ...]:
        """Per layout and axis: kind, dim (-1: not split), whether segmented, and a number for the placement."""
        parts = [
            [
                (_KINDS.index(p.kind), p.dim if p.is_split else -1, bool(p.segments), self.codes.setdefault(p, len(self.codes)))
                for p in layout
            ]
            for layout in layouts
        ]
        stacked = np.array(parts, dtype=np.int64).reshape(len(layouts), len(self.sizes), 4)
        return tuple(np.ascontiguousarray(stacked[:, :, k]) for k in range(4))

    def _in_order(self, order: Sequence[int], src: tuple[np.ndarray, ...], dst: tuple[np.ndarray, ...], info: TensorInfo) -> np.ndarray:
        """Seconds of taking the axes in this order, inf where a step would not be legal."""
        total = np.zeros((len(src[0]), len(dst[0])))
        stretched = self._stretched(info)
        legal = np.ones(total.shape, dtype=bool)
        moves = [src[3][:, None, axis] != dst[3][None, :, axis] for axis in range(len(self.sizes))]
        for position, axis in enumerate(order):
            state = [self._state(other, order[:position], src, dst) for other in range(len(self.sizes))]
            share = np.ones((1, 1))
            for other, (dims, _) in enumerate(state):
                if other != axis:
                    share = share * np.where(dims >= 0, 1.0 / self.sizes[other], 1.0)
                    share = share if stretched is None else share * stretched[other][dims]
            if stretched is not None:
                share = share * stretched[axis][src[1][:, None, axis]] * stretched[axis][dst[1][None, :, axis]]
            kinds = np.ix_(src[0][:, axis], dst[0][:, axis])
            (fixed, per_byte), *others = self.terms[info.needs_grad][axis]
            seconds = fixed[kinds] + per_byte[kinds] * (share * info.nbytes)
            for fixed, per_byte in others:
                seconds = np.minimum(seconds, fixed[kinds] + per_byte[kinds] * (share * info.nbytes))
            total += np.where(moves[axis], seconds, 0.0)
            legal &= ~moves[axis] | self._is_legal(axis, state, src, dst)
            later = np.zeros(total.shape, dtype=bool)
            for other in order[position + 1 :]:
                later |= moves[other]
            if later.any():
                after = [self._state(other, order[: position + 1], src, dst) for other in range(len(self.sizes))]
                legal &= ~(moves[axis] & later) | self._divides(after, info)
        return np.where(legal, total, np.inf)

    def _stretched(self, info: TensorInfo) -> list[np.ndarray] | None:
        """Per axis and dim (the last entry: not split) by how much padding lengthens the dim; None when all dims divide."""
        if not self.costs.pads(info.shape):
            return None
        return [np.array([*(stretch(info.shape, dim, n) for dim in range(len(info.shape))), 1.0]) for n in self.sizes]

    def _state(
        self, axis: int, done: Sequence[int], src: tuple[np.ndarray, ...], dst: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Dim and segmentedness of one axis while the axes in `done` have moved."""
        if axis in done:
            return dst[1][None, :, axis], dst[2][None, :, axis]
        return src[1][:, None, axis], src[2][:, None, axis]

    def _is_legal(self, axis: int, state: list, src: tuple[np.ndarray, ...], dst: tuple[np.ndarray, ...]) -> np.ndarray:
        before, after = src[1][:, None, axis], dst[1][None, :, axis]
        legal = (before != after) | (before < 0)
        for dims, _ in state[axis + 1 :]:
            legal = legal & ((dims < 0) | ((dims != before) & (dims != after)))
        return legal

    def _divides(self, state: list, info: TensorInfo) -> np.ndarray:
        """Whether dims that several axes split divide by all of them; nested segments are left to the exact check."""
        if info.shape not in self.fitting:
            self.fitting[info.shape] = self._fitting(info.shape)
        return self.fitting[info.shape][tuple(2 * (dims + 1) + (segments > 0) for dims, segments in state)]

    def _fitting(self, shape: Sequence[int]) -> np.ndarray:
        """_divides for every combination of one number per axis: twice the dim (0: not split), plus 1 where it is segmented."""
        fits = np.ones([2 * (len(shape) + 1)] * len(self.sizes), dtype=bool)
        numbers = np.indices(fits.shape)
        for dim, size in enumerate(shape):
            is_here = numbers // 2 == dim + 1
            ways = np.prod([np.where(here, n, 1) for here, n in zip(is_here, self.sizes, strict=True)], axis=0)
            segmented = (is_here & (numbers % 2 == 1)).any(axis=0)
            fits &= (is_here.sum(axis=0) < 2) | (~segmented & (size % ways == 0))
        return fits
