"""Copying what differs from a past export onto a primary, and proving it, with many requests in flight.

What differs comes from the `cdp:changed` context of the past's export, what of it is zeros from `base:allocation`:
zeros become WRITE_ZEROES, which may punch holes, and cost nothing by their length. Nothing here grows with the volume
or with what differs: extents are asked for as the copy proceeds, and the requests in flight are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cdp.nbd import wire
from cdp.nbd.client import Client
from cdp.recovery.past import CHANGED

# Requests in flight on a connection and the largest of them: enough to keep both servers busy with small extents, and
# at most 16 MiB a connection with large ones. A write of at most 1 MiB is one record.
DEPTH = 64
PIECE_BYTES = 256 << 10
# One BLOCK_STATUS or WRITE_ZEROES: a server answers for the beginning if a status is too much for it.
_STEP_BYTES = 1 << 30
# Places that differ after a copy: more of them say no more.
_MAX_UNEQUAL = 1000
_DIFFERS = 1
Extents = list[tuple[int, int]]  # length, flags


class Extent(NamedTuple):
    """A part of a volume; `zero`: it reads as zeros there."""

    offset: int
    length: int
    zero: bool


def extents(source: Client, start: int = 0, only_changed: bool = True) -> Iterator[Extent]:
    """What differs (or all that may hold data, if not `only_changed`) from `start` on, in order."""
    while start < source.size:
        answer = source.block_status(start, min(_STEP_BYTES, source.size - start))
        allocation = answer.get(wire.BASE_ALLOCATION, [])
        changed = answer.get(CHANGED, [])
        if not only_changed:
            changed = [(length, _DIFFERS) for length, _ in allocation]
        before = start
        for length, differs, state in _both(changed, allocation):
            zero = bool(state & wire.STATE_ZERO)
            if differs & _DIFFERS and (only_changed or not zero):
                yield Extent(start, length, zero)
            start += length
        if start == before:
            raise OSError(f"the NBD server says nothing about offset {start}")


def _both(first: Extents, second: Extents) -> Iterator[tuple[int, int, int]]:
    """(length, flags, flags) as far as both lists say something."""
    a, b = iter(first), iter(second)
    a_left = b_left = a_flags = b_flags = 0
    while True:
        if not a_left:
            a_left, a_flags = next(a, (0, 0))
        if not b_left:
            b_left, b_flags = next(b, (0, 0))
        length = min(a_left, b_left)
        if not length:
            return
        yield length, a_flags, b_flags
        a_left, b_left = a_left - length, b_left - length


def measure(source: Client) -> tuple[int, int]:
    """(bytes, extents) that differ; neighbours count as one."""
    total = count = end = 0
    for extent in extents(source):
        total += extent.length
        count += extent.offset != end or not count
        end = extent.offset + extent.length
    return total, count


def ranges(source: Client) -> Iterator[tuple[int, int]]:
    """(offset, length) of what differs, neighbours joined."""
    start = end = 0
    for extent in extents(source):
        if extent.offset != end and end > start:
            yield start, end - start
        if extent.offset != end or end == start:
            start = extent.offset
        end = extent.offset + extent.length
    if end > start:
        yield start, end - start


def pieces(parts: Iterable[Extent]) -> Iterator[Extent]:
    """The same in pieces that are one request each."""
    for offset, length, zero in parts:
        while length:
            piece = min(length, _STEP_BYTES if zero else PIECE_BYTES - offset % PIECE_BYTES)
            yield Extent(offset, piece, zero)
            offset, length = offset + piece, length - piece


class Copier:
    """A past export and the locked primary that gets its content."""

    def __init__(self, source_address: str, source_name: str, target_address: str, target_name: str) -> None:
        self.source = Client.connect(source_address, source_name, (wire.BASE_ALLOCATION, CHANGED))
        try:
            self.target = Client.connect(target_address, target_name, (wire.BASE_ALLOCATION,))
        except BaseException:
            self.source.close()
            raise

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()
        self.target.close()

    def copy(self, start: int, checkpoint_bytes: int, on_bytes: Callable[[int], None]) -> Iterator[int]:
        """Copies what differs from offset `start` on; yields the offset up to which it is durable, now and then and
        at the end. `on_bytes` gets the bytes copied since `start`. Raises OSError."""
        reads, writes = self.source.pipeline(DEPTH), self.target.pipeline(DEPTH)
        done = since = 0
        for offset, length, zero in pieces(extents(self.source, start)):
            if zero:
                writes.zero(offset, length)
            else:
                reads.read(offset, length, writes.write)
            done, since = done + length, since + length
            on_bytes(done)
            if since >= checkpoint_bytes:
                reads.finish()
                writes.finish()
                self.target.flush()
                since = 0
                yield offset + length
        reads.finish()
        writes.finish()
        self.target.flush()
        yield self.source.size

    def compare(self, on_bytes: Callable[[int], None]) -> Extents:
        """(offset, length) of pieces that differ still between the export and the primary. Raises OSError."""
        theirs, ours = self.source.pipeline(DEPTH), self.target.pipeline(DEPTH)
        comparison = _Comparison()
        done = 0
        for offset, length, zero in pieces(extents(self.source)):
            if zero:
                for part in pieces(_data_within(self.target, offset, length)):
                    ours.read(part.offset, part.length, comparison.zeros)
            else:
                theirs.read(offset, length, comparison.meet)
                ours.read(offset, length, comparison.meet)
            done += length
            on_bytes(done)
        theirs.finish()
        ours.finish()
        return comparison.unequal


class _Comparison:
    """Pieces from both sides, each compared when its second copy arrives; at most the requests in flight are held."""

    def __init__(self) -> None:
        self.unequal: Extents = []
        self._first: dict[int, bytearray] = {}

    def meet(self, offset: int, content: bytearray) -> None:
        other = self._first.pop(offset, None)
        if other is None:
            self._first[offset] = content
        elif other != content:
            self._note(offset, len(content))

    def zeros(self, offset: int, content: bytearray) -> None:
        if content.count(0) != len(content):
            self._note(offset, len(content))

    def _note(self, offset: int, length: int) -> None:
        if len(self.unequal) < _MAX_UNEQUAL:
            self.unequal.append((offset, length))


def _data_within(client: Client, offset: int, length: int) -> Iterator[Extent]:
    """What of a range may hold data."""
    end = offset + length
    while offset < end:
        left = end - offset
        for size, state in client.block_status(offset, left).get(wire.BASE_ALLOCATION) or [(left, 0)]:
            if not state & wire.STATE_ZERO:
                yield Extent(offset, size, False)
            offset += size
