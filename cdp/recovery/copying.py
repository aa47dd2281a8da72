"""Copying what differs from a past export onto a primary, and proving it, with many requests in flight.

What differs comes from the `cdp:changed` context of the past's export, what of it is zeros from `base:allocation`:
zeros become WRITE_ZEROES, which may punch holes, and cost nothing by their length. Nothing here grows with the volume
or with what differs: extents are asked for as the copy proceeds, and a window bounds what is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cdp.nbd import wire
from cdp.recovery.past import CHANGED
from cdp.recovery.pipeline import Extents, Request
from cdp.recovery.session import Session, connect

# A write of at most 1 MiB is one record.
PIECE_BYTES = 1 << 20
# Two windows are in flight: enough for both servers to be busy, and within what a server reads ahead of its answers.
WINDOW_BYTES = 4 << 20
WINDOW_PIECES = 512
# One BLOCK_STATUS: a server answers for the beginning if this is too much for it.
_STATUS_BYTES = 1 << 30
_DIFFERS = 1


class Extent(NamedTuple):
    """A part of a volume; `zero`: it reads as zeros there."""

    offset: int
    length: int
    zero: bool


def extents(source: Session, start: int = 0, only_changed: bool = True) -> Iterator[Extent]:
    """What differs (or all that may hold data, if not `only_changed`) from `start` on, in order."""
    while start < source.size:
        answer = source.block_status(start, min(_STATUS_BYTES, source.size - start))
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


def measure(source: Session) -> tuple[int, int]:
    """(bytes, extents) that differ; neighbours count as one."""
    total = count = end = 0
    for extent in extents(source):
        total += extent.length
        count += extent.offset != end or not count
        end = extent.offset + extent.length
    return total, count


def ranges(source: Session) -> Iterator[tuple[int, int]]:
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


def _windows(parts: Iterable[Extent]) -> Iterator[list[Extent]]:
    """The same in pieces that are one request each, in bunches that are in flight together."""
    window: list[Extent] = []
    room = WINDOW_BYTES
    for offset, length, zero in parts:
        while length:
            piece = length if zero else min(length, PIECE_BYTES - offset % PIECE_BYTES)
            piece = min(piece, _STATUS_BYTES)
            window.append(Extent(offset, piece, zero))
            room -= 0 if zero else piece
            offset, length = offset + piece, length - piece
            if room <= 0 or len(window) >= WINDOW_PIECES:
                yield window
                window, room = [], WINDOW_BYTES
    if window:
        yield window


def _reads(window: list[Extent], zeros_too: bool = False) -> list[Request]:
    return [(wire.READ, 0, e.offset, e.length, None) for e in window if zeros_too or not e.zero]


def _read_ahead(source: Session, windows: Iterator[list[Extent]]) -> Iterator[tuple[list[Extent], list[int]]]:
    """Each window with the cookies of its reads; the next window's reads are sent before this one is used."""
    ahead: tuple[list[Extent], list[int]] | None = None
    for window in windows:
        sent = window, source.pipeline.send(_reads(window))
        if ahead is not None:
            yield ahead
        ahead = sent
    if ahead is not None:
        yield ahead


def read_extents(source: Session, parts: Iterable[Extent]) -> Iterator[tuple[int, bytearray]]:
    """(offset, bytes) of every part that is not zeros, in order, read ahead."""
    for window, cookies in _read_ahead(source, _windows(parts)):
        for extent, cookie in zip((e for e in window if not e.zero), cookies, strict=True):
            yield extent.offset, source.pipeline.read(cookie)


class Copier:
    """A past export and the locked primary that gets its content."""

    def __init__(self, source_address: str, source_name: str, target_address: str, target_name: str) -> None:
        self.source = connect(source_address, source_name, (wire.BASE_ALLOCATION, CHANGED))
        try:
            self.target = connect(target_address, target_name, (wire.BASE_ALLOCATION,))
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
        done = since = 0
        pipeline = self.target.pipeline
        for window, cookies in _read_ahead(self.source, _windows(extents(self.source, start))):
            pipeline.done(pipeline.send(self._writes(window, cookies)))
            copied = sum(e.length for e in window)
            done, since = done + copied, since + copied
            on_bytes(done)
            if since >= checkpoint_bytes:
                self.target.flush()
                since = 0
                yield window[-1].offset + window[-1].length
        self.target.flush()
        yield self.source.size

    def _writes(self, window: list[Extent], cookies: list[int]) -> list[Request]:
        reads = iter(cookies)
        return [
            (wire.WRITE_ZEROES, 0, e.offset, e.length, None)
            if e.zero
            else (wire.WRITE, 0, e.offset, e.length, self.source.pipeline.read(next(reads)))
            for e in window
        ]

    def compare(self, on_bytes: Callable[[int], None]) -> list[tuple[int, int]]:
        """(offset, length) of pieces that differ still between the export and the primary. Raises OSError."""
        unequal: list[tuple[int, int]] = []
        done = 0
        for window, cookies in _read_ahead(self.source, _windows(extents(self.source))):
            reads = iter(cookies)
            written = iter(self.target.pipeline.send(_reads(window)))
            for extent in window:
                if extent.zero:
                    equal = self._reads_as_zeros(extent.offset, extent.length)
                else:
                    equal = self.source.pipeline.read(next(reads)) == self.target.pipeline.read(next(written))
                if not equal and len(unequal) < WINDOW_PIECES:  # more say no more
                    unequal.append((extent.offset, extent.length))
                done += extent.length
            on_bytes(done)
        return unequal

    def _reads_as_zeros(self, offset: int, length: int) -> bool:
        """Reads only what the primary does not know to be zeros."""
        return all(
            content.count(0) == len(content)
            for part in extents_within(self.target, offset, length)
            for _, content in read_extents(self.target, [part])
        )


def extents_within(source: Session, offset: int, length: int) -> Iterator[Extent]:
    """What of a range may hold data."""
    end = offset + length
    while offset < end:
        allocation = source.block_status(offset, min(_STATUS_BYTES, end - offset)).get(wire.BASE_ALLOCATION)
        for size, state in allocation or [(min(_STATUS_BYTES, end - offset), 0)]:
            if not state & wire.STATE_ZERO:
                yield Extent(offset, size, False)
            offset += size
