"""VERIFY records: is the replica, at exactly that seq, what the primary was?

Runs while a bundle is planned, where the record stands in its group's order: the region is the replica's content
under what the pending bundle and this one make of it. What differs is kept: a log of mismatches that `cdp verify`
asks for by seq, and the regions that are unequal now, which go when a later VERIFY of them passes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable

from cdp.journal.batch import ZEROS, Record
from cdp.replica.bundle import Target
from cdp.replica.course import Reason, reason
from cdp.replica.replica import BLOCK_BYTES, BLOCK_SHIFT

# Kept of what differs: more than a few say no more than "resync the volume"; 1000 keep the position file at 50 KiB.
MAX_UNEQUAL = 1000
# Read and hashed at a time.
_CHUNK_BLOCKS = 256
_ZERO_BLOCK = bytes(BLOCK_BYTES)

Mismatch = tuple[int, int, int, int]  # seq, volume, offset, length


class Verifier:
    """One for each group. Read by other threads through `result` and `reason_of`, which see whole entries."""

    def __init__(self, unequal: Iterable[Mismatch] = ()) -> None:
        self._log: deque[Mismatch] = deque(unequal, MAX_UNEQUAL)
        self._unequal: dict[tuple[int, int, int], int] = {(v, o, n): seq for seq, v, o, n in self._log}

    def check(self, record: Record, target: Target) -> None:
        """Compares one region; a digest of an impossible size counts as unequal. Raises OSError."""
        offset, length, volume = record.offset, record.length, record.volume
        if record.flags & ZEROS:
            equal = _is_zero(target, offset, offset + length)
        else:
            equal = _digest(target, offset, offset + length) == bytes(record.data)
        end = offset + length
        now = {k: s for k, s in self._unequal.items() if k[0] != volume or k[1] < offset or k[1] + k[2] > end}
        if not equal:
            self._log.append((record.seq, volume, offset, length))
            if len(now) < MAX_UNEQUAL:
                now[(volume, offset, length)] = record.seq
        self._unequal = now

    def forget(self, volume: int, seq: int) -> None:
        """What was unequal has been written again: a resync of the volume ended at `seq`. What was found behind it, in
        a bundle that was planned before this one is applied, stays."""
        self._unequal = {k: s for k, s in self._unequal.items() if k[0] != volume or s > seq}

    def result(self, volume: int, first_seq: int, last_seq: int) -> list[tuple[int, int]]:
        """(offset, length) of regions whose VERIFY record in [first_seq, last_seq] did not match; sorted."""
        return sorted({(o, n) for seq, v, o, n in tuple(self._log) if v == volume and first_seq <= seq <= last_seq})

    def reason_of(self, volume: int) -> Reason | None:
        """What is unequal now, None if nothing is known to be."""
        unequal = [(o, n) for v, o, n in self._unequal if v == volume]
        if not unequal:
            return None
        total, first = sum(n for _, n in unequal), min(unequal)[0]
        return reason("unequal", f"{total} bytes differ from the primary, from {first} on. Resync the volume.")

    def plain(self) -> list[Mismatch]:
        """For the committed position: the regions unequal now."""
        return [(seq, v, o, n) for (v, o, n), seq in self._unequal.items()]


def _chunk(target: Target, buffer: memoryview, first: int, end: int) -> memoryview:
    """Blocks [first, end) as they are at this place in the order."""
    view = buffer[: (end - first) << BLOCK_SHIFT]
    target.file.read_into(view, first)
    for block in target.known(first, end):
        at = (block - first) << BLOCK_SHIFT
        view[at : at + BLOCK_BYTES] = target.content(block) or _ZERO_BLOCK
    return view


def _digest(target: Target, offset: int, end: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BLOCKS << BLOCK_SHIFT))
    while offset < end:
        first = offset >> BLOCK_SHIFT
        last = min(first + _CHUNK_BLOCKS, (end + BLOCK_BYTES - 1) >> BLOCK_SHIFT)
        stop = min(end, last << BLOCK_SHIFT)
        base = first << BLOCK_SHIFT
        digest.update(_chunk(target, buffer, first, last)[offset - base : stop - base])
        offset = stop
    return digest.digest()


def _is_zero(target: Target, offset: int, end: int) -> bool:
    """Looks only at what may hold data, so that a region of holes costs nothing whatever its length."""
    first, last = offset >> BLOCK_SHIFT, (end + BLOCK_BYTES - 1) >> BLOCK_SHIFT
    runs = [(block, block + 1) for block in target.known(first, last) if target.content(block) is not None]
    buffer = memoryview(bytearray(_CHUNK_BLOCKS << BLOCK_SHIFT))
    if any(not _run_is_zero(target, buffer, run, offset, end) for run in runs):
        return False
    while (run := target.file.data_run(first, last)) is not None:
        for at in range(max(first, run[0]), run[1], _CHUNK_BLOCKS):
            if not _run_is_zero(target, buffer, (at, min(at + _CHUNK_BLOCKS, run[1])), offset, end):
                return False
        first = run[1]
    return True


def _run_is_zero(target: Target, buffer: memoryview, run: tuple[int, int], offset: int, end: int) -> bool:
    base = run[0] << BLOCK_SHIFT
    view = _chunk(target, buffer, *run)[max(offset - base, 0) : min(end, run[1] << BLOCK_SHIFT) - base]
    return bytes(view).count(0) == len(view)
