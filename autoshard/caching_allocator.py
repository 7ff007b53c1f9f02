"""torch's caching allocator for CUDA, replayed on a list of allocations and releases: what it hands out, and what it reserves for that.

Sizes are rounded to 512 bytes; blocks are cut from segments of 2 MiB (for blocks of up to 1 MiB), 20 MiB (up to 10 MiB) or their own size
in steps of 2 MiB; the smallest free block that fits is taken, and what is left of it is split off if it is worth keeping; free
neighbours are joined. Segments are never returned. One stream. Source: c10/cuda/CUDACachingAllocator.cpp, default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field

MIB = 2**20
_ROUND, _SMALL, _SMALL_SEGMENT = 512, MIB, 2 * MIB
_LARGE_SEGMENT, _LEAST_OWN_SEGMENT, _ROUND_SEGMENT = 20 * MIB, 10 * MIB, 2 * MIB


@dataclass(eq=False)
class _Piece:
    """A stretch of one segment."""

    address: int
    size: int
    is_small: bool
    is_free: bool = True
    before: _Piece | None = None
    after: _Piece | None = None


@dataclass
class CachingAllocator:
    """Bytes handed out now (allocated_bytes, rounded as torch.cuda.memory_allocated counts them) and held from the device."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    _used: dict[Hashable, _Piece] = field(default_factory=dict)
    _free: dict[bool, list[tuple[int, int, _Piece]]] = field(default_factory=lambda: {True: [], False: []})

    def allocate(self, key: Hashable, nbytes: int) -> int:
        """Bytes that a block of `nbytes` takes, 0 for none; `key` names it in `release`."""
        if nbytes == 0:
            return 0
        size = -(-nbytes // _ROUND) * _ROUND
        is_small = size <= _SMALL
        pool = self._free[is_small]
        k = bisect_left(pool, (size, -1))
        piece = pool.pop(k)[2] if k < len(pool) else self._segment(size, is_small)
        rest = piece.size - size
        if rest >= _ROUND if is_small else rest > _SMALL:
            after = _Piece(piece.address + size, rest, is_small, before=piece, after=piece.after)
            if piece.after is not None:
                piece.after.before = after
            piece.size, piece.after = size, after
            self._offer(after)
        piece.is_free = False
        self._used[key] = piece
        self.allocated_bytes += piece.size
        return piece.size

    def release(self, key: Hashable) -> None:
        """Take a block back; joins it with its free neighbours."""
        piece = self._used.pop(key, None)
        if piece is None:
            return
        self.allocated_bytes -= piece.size
        for other in (piece.before, piece.after):
            if other is not None and other.is_free:
                self._free[piece.is_small].remove((other.size, other.address, other))
                first, second = (other, piece) if other is piece.before else (piece, other)
                first.size, first.after = first.size + second.size, second.after
                if second.after is not None:
                    second.after.before = first
                piece = first
        piece.is_free = True
        self._offer(piece)

    def _segment(self, size: int, is_small: bool) -> _Piece:
        own = -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        length = _SMALL_SEGMENT if is_small else _LARGE_SEGMENT if size < _LEAST_OWN_SEGMENT else own
        address = self.reserved_bytes
        self.reserved_bytes += length
        return _Piece(address, length, is_small)

    def _offer(self, piece: _Piece) -> None:
        insort(self._free[piece.is_small], (piece.size, piece.address, piece))
