"""Which blocks differ between two points: from the entries that each segment keeps together, not from the index."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cdp.history.undo import UndoLog
from cdp.history.undo_format import BLOCK_BYTES, BLOCK_MASK, RUN_BIT, RUN_BLOCKS, VOLUME_SHIFT, Array

# A byte map is faster than sorting what was found while it has no more than so many bytes for each block in it, and
# smaller than one call may take in any case up to 256 GiB of volume.
_MAP_BYTES_A_BLOCK = 32
_MAP_BLOCKS = 1 << 26
# Sorted arrays are merged when they have doubled, from this many blocks on (8 MiB).
_MERGE_BLOCKS = 1 << 20


def changed_blocks(log: UndoLog, volume: int, after_seq: int, up_to_seq: int) -> tuple[Array, Array]:
    """(first blocks, counts) of the stretches that records in (after_seq, up_to_seq] wrote, in order.

    Raises CorruptionError, StorageError when a segment left the window meanwhile.
    """
    found = _Blocks()
    for segment in list(log.segments.values()):
        if segment.last_seq <= after_seq or segment.opening.first_seq > up_to_seq or not segment.entries:
            continue
        codes, seqs = log.columns(segment)
        if segment.opening.first_seq <= after_seq or segment.last_seq > up_to_seq:
            codes = codes[(seqs > after_seq) & (seqs <= up_to_seq)]
        if len(codes):
            _collect(found, codes, volume)
    return found.stretches()


def _collect(found: _Blocks, codes: Array, volume: int) -> None:
    low, high = int(codes.min()), int(codes.max())
    if low >> VOLUME_SHIFT != volume or high >> VOLUME_SHIFT != volume:
        codes = codes[(codes >> np.uint64(VOLUME_SHIFT)) == volume]
        if not len(codes):
            return
        high = int(codes.max())
    if high & RUN_BIT:
        runs = (codes & np.uint64(RUN_BIT)) != 0
        found.add(codes[~runs] & np.uint64(BLOCK_MASK), 1)
        found.add(codes[runs] & np.uint64(BLOCK_MASK), RUN_BLOCKS)
    else:
        found.add(codes & np.uint64(BLOCK_MASK), 1)


class _Blocks:
    """A set of blocks: sorted arrays while they are few for where they lie, a byte map once that is no larger."""

    def __init__(self) -> None:
        self._map: Array | None = None
        self._sorted: list[Array] = []
        self._held = 0  # blocks in the sorted arrays
        self._held_merged = 0
        self._end = 0

    def add(self, blocks: Array, width: int) -> None:
        """Each of `blocks` and those behind it, `width` in all."""
        if not len(blocks):
            return
        self._end = max(self._end, int(blocks.max()) + width)
        if self._map is not None and self._end <= _MAP_BLOCKS:
            self._mark(self._map_to(self._end), blocks, width)
            return
        self._sorted.append(_distinct(blocks if width == 1 else _widen(_distinct(blocks), width)))
        self._held += len(self._sorted[-1])
        if self._map is None and self._end <= min(_MAP_BLOCKS, self._held * _MAP_BYTES_A_BLOCK):
            self._begin_map()
        elif self._held > 2 * self._held_merged + _MERGE_BLOCKS:
            self._merge()

    def _begin_map(self) -> None:
        for blocks in self._sorted:
            self._mark(self._map_to(self._end), blocks, 1)
        self._sorted, self._held, self._held_merged = [], 0, 0

    def _map_to(self, end: int) -> Array:
        """The map, long enough. Doubled, so that growing is rare; zeros that nobody touches take no memory."""
        old = self._map if self._map is not None else np.zeros(0, np.bool_)
        if end > len(old):
            self._map = np.zeros(min(max(end, 2 * len(old)), _MAP_BLOCKS), np.bool_)
            self._map[: len(old)] = old
            return self._map
        return old

    @staticmethod
    def _mark(marks: Array, blocks: Array, width: int) -> None:
        for i in range(width):
            marks[blocks + np.uint64(i)] = True

    def _merge(self) -> Array:
        """The sorted arrays as one: a block that many segments wrote is held once."""
        merged = _distinct(np.concatenate(self._sorted)) if self._sorted else np.zeros(0, np.uint64)
        self._sorted, self._held, self._held_merged = [merged], len(merged), len(merged)
        return merged

    def stretches(self) -> tuple[Array, Array]:
        blocks = self._merge().astype(np.int64)
        if self._map is not None:
            if not len(blocks):
                edges = np.flatnonzero(np.diff(self._map.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
                starts, ends = edges[::2].astype(np.int64), edges[1::2].astype(np.int64)
                return starts, ends - starts
            blocks = _distinct(np.concatenate([np.flatnonzero(self._map), blocks]))
        if not len(blocks):
            return blocks, blocks
        cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
        starts = blocks[np.concatenate([[0], cuts])]
        return starts, blocks[np.concatenate([cuts - 1, [len(blocks) - 1]])] + 1 - starts


def _distinct(blocks: Array) -> Array:
    """Sorted, each once. (`np.unique` looks each up in a hash table first: ten times as slow for millions.)"""
    ordered: Array = np.sort(blocks)
    keep = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=keep[1:])
    return ordered[keep]


def _widen(blocks: Array, width: int) -> Array:
    wide: Array = (blocks[:, None] + np.arange(width, dtype=np.uint64)).ravel()
    return wide


def to_extents(starts: Array, counts: Array) -> list[tuple[int, int]]:
    """(offset, length) in bytes."""
    offsets, lengths = (starts * BLOCK_BYTES).tolist(), (counts * BLOCK_BYTES).tolist()
    return list(zip(offsets, lengths, strict=True))


def flags_of(starts: Array, counts: Array, offset: int, length: int, flag: int) -> list[tuple[int, int]]:
    """The range [offset, offset + length) as (length, flags) stretches: `flag` inside the blocks, 0 outside."""
    found: list[tuple[int, int]] = []
    at, end = offset, offset + length
    first = int(np.searchsorted((starts + counts) * BLOCK_BYTES, offset, "right"))
    last = int(np.searchsorted(starts * BLOCK_BYTES, end, "left"))
    for start, size in to_extents(starts[first:last], counts[first:last]):
        if start > at:
            found.append((start - at, 0))
            at = start
        stop = min(start + size, end)
        found.append((stop - at, flag))
        at = stop
    if at < end:
        found.append((end - at, 0))
    return found


def merged(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours with equal flags as one."""
    found: list[tuple[int, int]] = []
    for length, flags in parts:
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + length, flags)
        elif length:
            found.append((length, flags))
    return found
