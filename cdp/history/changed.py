"""Which blocks differ between two points: from the entries that each segment keeps together, not from the index."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cdp.history.undo import UndoLog
from cdp.history.undo_format import BLOCK_BYTES, BLOCK_MASK, RUN_BIT, RUN_BLOCKS, VOLUME_SHIFT, Array

# Up to this many blocks (256 GiB of volume) a byte map is both faster and smaller than sorting what was found.
_MAP_BLOCKS = 1 << 26
_LAST_OF_RUN = RUN_BLOCKS - 1


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
    """A set of blocks: a byte map as long as they are low, sorted arrays above."""

    def __init__(self) -> None:
        self._map = np.zeros(0, np.bool_)
        self._high: list[Array] = []

    def add(self, blocks: Array, width: int) -> None:
        """Each of `blocks` and those behind it, `width` in all."""
        if not len(blocks):
            return
        end = int(blocks.max()) + width
        if end > _MAP_BLOCKS:
            high = blocks[blocks >= _MAP_BLOCKS]
            self._high.append(np.unique(high if width == 1 else _widen(np.unique(high), width)))
            blocks = blocks[blocks < _MAP_BLOCKS]
            end = _MAP_BLOCKS
        if end > len(self._map):
            # Doubled, so that growing is rare; zeros that nobody touches take no memory.
            grown = np.zeros(min(max(end, 2 * len(self._map)), _MAP_BLOCKS), np.bool_)
            grown[: len(self._map)] = self._map
            self._map = grown
        if width == 1:
            self._map[blocks] = True
        else:
            for i in range(width):
                self._map[blocks + np.uint64(i)] = True

    def stretches(self) -> tuple[Array, Array]:
        edges = np.flatnonzero(np.diff(self._map.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
        starts, ends = edges[::2].astype(np.int64), edges[1::2].astype(np.int64)
        if self._high:
            high = np.unique(np.concatenate(self._high)).astype(np.int64)
            cuts = np.flatnonzero(np.diff(high) != 1) + 1
            starts = np.concatenate([starts, high[np.concatenate([[0], cuts])]])
            ends = np.concatenate([ends, high[np.concatenate([cuts - 1, [len(high) - 1]])] + 1])
        return starts, ends - starts


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
