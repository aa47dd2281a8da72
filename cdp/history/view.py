"""One volume as it was at one point.

A read takes the replica's bytes first and looks at the index after, with a cursor made after, so a write that lands
between is seen. It checks that the point is still inside the window last of all: what has been gathered by then was
whole (promise 6). One thread uses a view at a time.
"""

from __future__ import annotations

import errno
from typing import Protocol

from cdp import storage
from cdp.errors import CdpError
from cdp.history.blobs import Buffer
from cdp.history.changed import flags_of, merged
from cdp.history.fetch import Fetcher
from cdp.history.index import Place, all_after, first_after
from cdp.history.index_map import SortedMap
from cdp.history.touched import Touched
from cdp.history.undo import UndoLog
from cdp.history.undo_format import BLOCK_BYTES, BLOCK_MASK, RUN_BIT, RUN_BLOCKS, RUN_ZERO, VOLUME_SHIFT, Array

HOLE, ZERO = 1, 2  # base:allocation
CHANGED = 1  # cdp:changed
# One answer of `allocation` looks at so much of the volume at a time, and ends once it has so many stretches or has
# seen so many entries; the client asks again from there.
_ALLOCATION_STEP_BYTES = 64 << 20
_MAX_STRETCHES = 1024
_MAX_ENTRIES_SEEN = 8192
_RUN_MASK = RUN_BLOCKS - 1
_ZERO_RUN = memoryview(bytes(RUN_BLOCKS * BLOCK_BYTES))


class Window(Protocol):
    """What a view needs of its history."""

    log: UndoLog
    entries: SortedMap
    run_volumes: set[int]
    touched: Touched
    closed: bool

    @property
    def oldest_seq(self) -> int: ...
    def changed_blocks(self, volume: int, after_seq: int, up_to_seq: int, /) -> tuple[Array, Array]: ...


class View:
    """`size` is the volume's at the point; beyond the replica's end it reads as zeros."""

    def __init__(self, window: Window, replica_fd: int, volume: int, seq: int, size: int, applied_seq: int) -> None:
        self.seq = seq
        self.size = size
        self.volume = volume
        self.applied_seq = applied_seq
        self._window = window
        self._fd = replica_fd
        self._base = volume << VOLUME_SHIFT
        self._fetch = Fetcher(window.log)
        self._changed: tuple[Array, Array] | None = None

    # --- reading

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` with the point's bytes. Raises OSError: EIO when the point left the window or is damaged."""
        window, wanted = self._window, len(target)
        if window.closed:
            self._check_open()
        got = storage.preadv(self._fd, (target,), offset) if wanted else 0
        while got < wanted:
            more = storage.preadv(self._fd, [target[got:]], offset + got)
            if not more:
                target[got:] = bytes(wanted - got)
                break
            got += more
        # At the last seq that the undo log has anything of, or above it, the replica alone is the point.
        if self.seq < window.log.last_seq and wanted:
            try:
                self._patch(offset, target)
            except Exception as e:
                raise self._refusal(e) from e
        if self.seq < window.oldest_seq or window.closed:
            self._check_window()

    def _patch(self, offset: int, target: memoryview) -> None:
        """Puts what was replaced since the point over the replica's bytes."""
        first, last = offset // BLOCK_BYTES, (offset + len(target) - 1) // BLOCK_BYTES
        if first == last:
            self._patch_one(first, offset, target)
            return
        singles, runs = self._entries(first, last)
        for code, seq, place in runs:
            self._patch_run(code, seq, place, singles, offset, target)
        for block, (seq, place) in singles.items():
            _put(self._fetch.block(self._base | block, seq, place), block, offset, target)

    def _patch_one(self, block: int, offset: int, target: memoryview) -> None:
        window, code = self._window, self._base | block
        run_code = self._base | RUN_BIT | (block & ~_RUN_MASK)
        ask_single = window.touched.may_follow(code, self.seq)
        ask_run = self.volume in window.run_volumes and window.touched.may_follow(run_code, self.seq)
        if not (ask_single or ask_run):
            return
        cursor = window.entries.cursor()
        single = first_after(cursor, code, self.seq) if ask_single else None
        run = first_after(cursor, run_code, self.seq) if ask_run else None
        if run is not None and (single is None or run[0] < single[0]):
            _put(self._fetch.run(run_code, *run, block & _RUN_MASK, 1)[0], block, offset, target)
        elif single is not None:
            _put(self._fetch.block(code, *single), block, offset, target)

    def _entries(
        self, first: int, last: int
    ) -> tuple[dict[int, tuple[int, Place]], list[tuple[int, int, Place]]]:
        """Entries of single blocks, and of runs, that a read of these blocks needs."""
        cursor, base = self._window.entries.cursor(), self._base
        singles = {code & BLOCK_MASK: (seq, place) for code, seq, place in all_after(cursor, base | first, base | last,
                                                                                     self.seq)}  # fmt: skip
        if self.volume not in self._window.run_volumes:
            return singles, []
        start, end = base | RUN_BIT | (first & ~_RUN_MASK), base | RUN_BIT | last
        return singles, list(all_after(cursor, start, end, self.seq))

    def _patch_run(
        self, code: int, seq: int, place: Place, singles: dict[int, tuple[int, Place]], offset: int, target: memoryview
    ) -> None:
        """Those blocks of a run that no entry of their own came earlier for; such entries are taken out of `singles`
        where the run came first."""
        start = code & BLOCK_MASK
        first = max(start, offset // BLOCK_BYTES)
        last = min(start + _RUN_MASK, (offset + len(target) - 1) // BLOCK_BYTES)
        # Most often nothing came earlier: then it is one piece.
        pieces = [(first, last + 1)]
        for block in sorted(singles.keys() & range(first, last + 1)):
            if singles[block][0] <= seq:
                at, end = pieces.pop()
                pieces += [(at, block), (block + 1, end)]
            else:
                del singles[block]
        for at, end in pieces:
            if at < end:
                zeros = place.length == RUN_ZERO
                content = None if zeros else self._fetch.stretch(code, seq, place, at - start, end - at)
                _put(content, at, offset, target, end - at)

    # --- allocation and changes

    def allocation(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) stretches of base:allocation from `offset` on; may end early, never before one stretch.

        Raises OSError as `read_into`.
        """
        self._check_open()
        found: list[tuple[int, int]] = []
        seen, end = 0, offset + length
        while offset < end and len(found) < _MAX_STRETCHES and seen < _MAX_ENTRIES_SEEN:
            step = min(end, offset - offset % _ALLOCATION_STEP_BYTES + _ALLOCATION_STEP_BYTES) - offset
            parts, entries = self._allocation_step(offset, step)
            found = merged([*found, *parts])
            seen += entries
            offset += step
        self._check_window()
        return found

    def _allocation_step(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        data = storage.data_extents(self._fd, offset, offset + length)
        zeros: list[tuple[int, int, bool]] = []
        if self.seq < self._window.log.last_seq:
            try:
                zeros = self._zero_blocks(offset, length)
            except Exception as e:
                raise self._refusal(e) from e
        if not zeros:
            return _with_holes(data, offset, length), 0
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        state = bytearray([HOLE | ZERO]) * (last - first + 1)
        for start, size in data:
            a, b = start // BLOCK_BYTES - first, (start + size - 1) // BLOCK_BYTES - first + 1
            state[a:b] = bytes(b - a)
        for block, count, zero in zeros:
            a, b = max(block - first, 0), min(block - first + count, len(state))
            state[a:b] = bytes([HOLE | ZERO if zero else 0]) * max(0, b - a)
        return _stretches(state, first, offset, length), len(zeros)

    def _zero_blocks(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(block, count, whether zeros) of what has an entry after the point."""
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        singles, runs = self._entries(first, last)
        found = []
        for code, seq, place in runs:
            start = code & BLOCK_MASK
            found.append((start, RUN_BLOCKS, place.length == RUN_ZERO))
            for block in range(start, start + RUN_BLOCKS):
                if block in singles and singles[block][0] > seq:
                    del singles[block]
        found += [(block, 1, not place.length) for block, (_, place) in singles.items()]
        return found

    def changed(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) stretches of cdp:changed: 1 where blocks were written after the point, up to the newest
        state as of the opening. Computed when first asked for. Raises OSError as `read_into`."""
        if self._changed is None:
            try:
                self._changed = self._window.changed_blocks(self.volume, self.seq, self.applied_seq)
            except Exception as e:
                raise self._refusal(e) from e
        found = flags_of(*self._changed, offset, length, CHANGED)
        self._check_window()
        return found

    # --- honesty

    def _refusal(self, error: Exception) -> OSError:
        """Whatever stands in the way of reading the past is EIO for a reader of it: CdpError from the log, Exception
        from RocksDB, whose class is not exported."""
        if isinstance(error, OSError):
            return error
        self._check_window()
        text = str(error) if isinstance(error, CdpError) else f"the index cannot be read: {error}"
        return OSError(errno.EIO, text)

    def _check_open(self) -> None:
        """Behind a closed history the replica's descriptor is closed too, or another file's by now."""
        if self._window.closed:
            raise OSError(errno.EIO, f"the history of seq {self.seq} was closed")

    def _check_window(self) -> None:
        self._check_open()
        if self.seq < self._window.oldest_seq:
            raise OSError(errno.EIO, f"seq {self.seq} has left the window, which begins at {self._window.oldest_seq}")

    def close(self) -> None:
        """Lets go of what was computed. The replica's descriptor belongs to the opener."""
        self._changed = None


def _put(content: Buffer | None, block: int, offset: int, target: memoryview, count: int = 1) -> None:
    """The content of `count` blocks where they lie inside of what is read from `offset` on; at most a run of them."""
    at, length = block * BLOCK_BYTES - offset, count * BLOCK_BYTES
    data = _ZERO_RUN[:length] if content is None else content
    if at >= 0 and at + length <= len(target):
        target[at : at + length] = data
        return
    skip, end = max(0, -at), min(length, len(target) - at)
    target[at + skip : at + end] = memoryview(data)[skip:end]


def _with_holes(data: list[tuple[int, int]], offset: int, length: int) -> list[tuple[int, int]]:
    found, at, end = [], offset, offset + length
    for start, size in data:
        if start > at:
            found.append((start - at, HOLE | ZERO))
        found.append((size, 0))
        at = start + size
    if at < end:
        found.append((end - at, HOLE | ZERO))
    return found


def _stretches(state: bytearray, first: int, offset: int, length: int) -> list[tuple[int, int]]:
    """State by block as (length, flags), clipped to the range in bytes."""
    found, at, end, i = [], offset, offset + length, 0
    while at < end:
        flags = state[i]
        other = [j for j in (state.find(0, i), state.find(HOLE | ZERO, i)) if j > i]
        i = min(other, default=len(state))
        stop = min((first + i) * BLOCK_BYTES, end)
        found.append((stop - at, flags))
        at = stop
    return found


__all__ = ["CHANGED", "HOLE", "View", "ZERO", "Window"]
