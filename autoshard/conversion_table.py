"""Seconds of converting a value between any two layouts, whole tables at a time.

Each axis that differs takes one step, on the bytes that the other axes leave at that moment. The cheapest order of the
steps is found over the sets of axes that have taken theirs:

    best[done]  =  min over a in done of  best[done - a] + step(a, done - a)     inf where the layout in between does not fit

Steps are legal as in conversions.routes. Pairs without a legal order take a detour through whole axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autoshard.conversions import BY_KINDS, without_gradient
from autoshard.costs import CostModel, stretch
from autoshard.ops.row import TensorInfo
from autoshard.placements import Layout, Placement, R, local_shape

_KINDS = "SPRI"


class _Side(NamedTuple):
    """Layouts on one side of a table, as numbers: [layout, axis]."""

    kinds: np.ndarray  # index into _KINDS
    dims: np.ndarray  # -1: not split
    codes: np.ndarray  # number of the placement


class ConversionTable:
    """Prices of conversions on one mesh; `random` draws prices in place of the real ones (0 and inf stay)."""

    def __init__(self, costs: CostModel, random: np.random.Generator | None = None) -> None:
        self.costs, self.random = costs, random
        self.sizes = costs.mesh.shape
        self.axes = range(len(self.sizes))
        self.known: dict[object, _Prices] = {}
        self.fitting: dict[object, dict[Layout, bool]] = {}
        self.terms = {needs_grad: [self._axis_terms(axis, needs_grad) for axis in self.axes] for needs_grad in (False, True)}

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
        key = info, str(info.shape)  # a size that may change equals its example
        if key not in self.known:
            self.known[key] = _Prices(self, info)
        prices = self.known[key]
        rows, columns = prices.numbers(have), prices.numbers(want)
        if self.random is None:
            return prices.between(rows, columns)
        rows_once, columns_once = (np.array(list(dict.fromkeys(side.tolist())), dtype=np.intp) for side in (rows, columns))
        found = prices.between(rows_once, columns_once)
        drawn = np.where(np.isfinite(found), self.random.random(found.shape), np.inf)
        drawn = np.where(rows_once[:, None] == columns_once[None], 0.0, drawn)
        place_of_row, place_of_column = ({int(k): place for place, k in enumerate(side)} for side in (rows_once, columns_once))
        return drawn[np.ix_([place_of_row[int(k)] for k in rows], [place_of_column[int(k)] for k in columns])]


class _Prices:
    """Prices of one kind of value, between layouts by number; each pair is priced once."""

    def __init__(self, table: ConversionTable, info: TensorInfo) -> None:
        self.info, self.sizes, self.axes = info, table.sizes, table.axes
        self.terms = table.terms[info.needs_grad]
        self.fitting = table.fitting.setdefault(str(info.shape), {})
        pads = table.costs.pads(info.shape)
        # by dim that an axis splits (the last entry: none): how much padding lengthens it, and which share of the bytes is left
        self.stretched = [
            np.array([*(stretch(info.shape, k, n) if pads else 1.0 for k in range(len(info.shape))), 1.0]) for n in self.sizes
        ]
        self.shares = [np.array([*(lengths[:-1] / n), 1.0]) for lengths, n in zip(self.stretched, self.sizes, strict=True)]
        self._layouts: dict[Layout, int] = {}
        self._placements: dict[Placement, int] = {}
        self._seconds = np.zeros((0, 0))  # nan where nobody asked yet
        self._fits = np.zeros([0] * len(self.sizes), dtype=np.int8)  # by placements: 1 fits, 0 does not, -1 nobody asked yet

    def numbers(self, layouts: Sequence[Layout]) -> np.ndarray:
        """i64[len(layouts)]: numbers of layouts; without a gradient R and I are one."""
        if not self.info.needs_grad:
            layouts = [without_gradient(layout) for layout in layouts]
        known = self._layouts
        return np.array([known.setdefault(layout, len(known)) for layout in layouts], dtype=np.intp)

    def between(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """f64[len(rows), len(columns)]."""
        if len(self._seconds) < len(self._layouts):
            grown = np.full([2 * len(self._layouts)] * 2, math.nan)
            grown[: len(self._seconds), : len(self._seconds)] = self._seconds
            self._seconds = grown
        found = self._seconds[np.ix_(rows, columns)]
        missing = np.isnan(found)
        if not missing.any():
            return found
        new_rows, new_columns = np.unique(rows[missing.any(axis=1)]), np.unique(columns[missing.any(axis=0)])
        layouts = list(self._layouts)
        src, dst = self._encode([layouts[k] for k in new_rows]), self._encode([layouts[k] for k in new_columns])
        best = self._direct(src, dst)
        if np.isinf(best).any():
            best = np.where(np.isinf(best), self._detour([layouts[k] for k in new_rows], src, dst), best)
        if not self.info.nbytes:
            best = np.where(np.isfinite(best), 0.0, math.inf)  # nothing to send
        self._seconds[np.ix_(new_rows, new_columns)] = best
        return self._seconds[np.ix_(rows, columns)]

    def _encode(self, layouts: Sequence[Layout]) -> _Side:
        known = self._placements
        parts = [
            [(_KINDS.index(p.kind), p.dim if p.is_split else -1, known.setdefault(p, len(known))) for p in layout] for layout in layouts
        ]
        stacked = np.array(parts, dtype=np.intp).reshape(len(layouts), len(self.sizes), 3)
        return _Side(*(np.ascontiguousarray(stacked[:, :, k]) for k in range(3)))

    def _detour(self, layouts: Sequence[Layout], src: _Side, dst: _Side) -> np.ndarray:
        """Every split axis gathered first, then cut anew."""
        whole = [tuple(R if p.is_split else p for p in layout) for layout in layouts]
        middle = list(dict.fromkeys(whole))
        through, between = [middle.index(mid) for mid in whole], self._encode(middle)
        gathered = self._direct(src, between)[np.arange(len(layouts)), through]
        return gathered[:, None] + self._direct(between, dst)[through]

    def _direct(self, src: _Side, dst: _Side) -> np.ndarray:
        """One step per axis that differs, in the cheapest legal order."""
        steps = _Steps(self, src, dst)
        everything = (1 << len(self.sizes)) - 1
        best = {0: np.zeros((len(src.codes), len(dst.codes)))}
        for done in range(1, everything + 1):
            ways = [best[done & ~(1 << axis)] + steps.of(axis, done & ~(1 << axis)) for axis in self.axes if done >> axis & 1]
            least = ways[0]
            for way in ways[1:]:
                np.minimum(least, way, out=least)
            if done != everything:
                least[~self.fits(src, dst, done)] = math.inf
            best[done] = least
        return best[everything]

    def fits(self, src: _Side, dst: _Side, done: int) -> np.ndarray:
        """bool[src, dst]: whether the shape fits the layout in which the axes in `done` are as in dst, all others as in src."""
        if len(self._fits) < len(self._placements):
            grown = np.full([2 * len(self._placements)] * len(self.sizes), -1, dtype=np.int8)
            grown[tuple(slice(n) for n in self._fits.shape)] = self._fits
            self._fits = grown
        where = tuple(dst.codes[None, :, axis] if done >> axis & 1 else src.codes[:, None, axis] for axis in self.axes)
        found = self._fits[where]
        if (found < 0).any():
            placements = list(self._placements)
            new = np.ravel_multi_index(where, self._fits.shape)[found < 0]
            for number in np.unique(new):
                layout = tuple(placements[code] for code in np.unravel_index(number, self._fits.shape))
                self._fits.flat[number] = self._fit(layout)
            found = self._fits[where]
        return found > 0

    def _fit(self, layout: Layout) -> bool:
        """Whether dims that several axes split divide; what one axis splits alone does, as it does at both ends."""
        dims = [placement.dim for placement in layout if placement.is_split]
        if len(set(dims)) == len(dims):
            return True
        shared = tuple(p if p.is_split and dims.count(p.dim) > 1 else R for p in layout)
        if shared not in self.fitting:
            self.fitting[shared] = local_shape(self.info.shape, shared, self.sizes) is not None
        return self.fitting[shared]


class _Steps:
    """Seconds of single steps between the layouts of two sides."""

    def __init__(self, prices: _Prices, src: _Side, dst: _Side) -> None:
        self.prices, self.src, self.dst = prices, src, dst
        self.before, self.after = ([s[side.dims[:, k]] for k, s in enumerate(prices.shares)] for side in (src, dst))
        # meets[a][b]: before its step axis a splits the dim that axis b splits after its own
        split = [(dst.dims[:, b] >= 0)[None] for b in prices.axes]
        self.meets = [[(src.dims[:, None, a] == dst.dims[None, :, b]) & split[b] for b in prices.axes] for a in prices.axes]

    def of(self, axis: int, done: int) -> np.ndarray:
        """f64[src, dst]: of the step of `axis` when the axes in `done` took theirs; 0 where it stays, inf where it is not legal."""
        src, dst, stretched = self.src, self.dst, self.prices.stretched[axis]
        rows = self.prices.info.nbytes * stretched[src.dims[:, axis]]  # padding lengthens what the ranks of the axis hold together
        columns = stretched[dst.dims[:, axis]]
        illegal = self.meets[axis][axis].copy()
        for other in self.prices.axes:
            is_done = done >> other & 1
            if other != axis and is_done:
                columns = columns * self.after[other]
            elif other != axis:
                rows = rows * self.before[other]
            if other > axis:  # inside: its pieces would interleave
                illegal |= self.meets[axis][other] if is_done else self.meets[other][axis]
                side = dst if is_done else src
                alike = (side.dims[:, other] == side.dims[:, axis]) & (side.dims[:, axis] >= 0)
                illegal |= alike[None, :] if is_done else alike[:, None]
        moved_bytes = rows[:, None] * columns[None]
        kinds = np.ix_(src.kinds[:, axis], dst.kinds[:, axis])
        seconds = None
        for fixed, per_byte in self.prices.terms[axis]:
            way = fixed[kinds] + per_byte[kinds] * moved_bytes
            seconds = way if seconds is None else np.minimum(seconds, way, out=seconds)
        assert seconds is not None
        seconds[illegal] = math.inf
        seconds[src.codes[:, None, axis] == dst.codes[None, :, axis]] = 0.0
        return seconds
