"""Copying what differs from a past export onto a primary, and proving it, with many requests in flight.

A piece is proven as soon as the primary took it, while later ones are copied: read again from both sides and compared.

What differs comes from the `cdp:changed` context, on a connection of its own: nothing else is asked about the rest of
the volume, so the time follows the change. What of it is zeros becomes WRITE_ZEROES, which may punch holes: large
extents are asked about (`base:allocation`), small ones are read and looked at. Nothing here grows with the volume or
with what differs: extents are asked for as the copy proceeds, and the requests in flight are bounded.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from cdp.errors import RefusedError
from cdp.nbd import wire
from cdp.nbd.client import Client
from cdp.recovery.past import CHANGED

# Requests in flight on a connection and the largest of them: enough to keep both servers busy with small extents, and
# at most 16 MiB a connection with large ones. A write of at most 1 MiB is one record.
DEPTH = 64
PIECE_BYTES = 256 << 10
# One BLOCK_STATUS: a server answers for the beginning if this is too much for it.
_STATUS_BYTES = 1 << 31
# One WRITE_ZEROES; and asking which part of an extent is zeros is worth a round trip from this length on.
_ZERO_BYTES, _ASK_BYTES = 1 << 30, 1 << 20
# The primary's file is synced as the copy proceeds: the disk would idle now, and all wait for it at the end.
_FLUSH_BYTES = 32 << 20
# Places that differ after a copy: more of them say no more.
_MAX_UNEQUAL = 1000
_DIFFERS = 1
_ZEROS = memoryview(bytes(PIECE_BYTES))
Extents = list[tuple[int, int]]


class Extent(NamedTuple):
    """A part of a volume; `zero`: it reads as zeros there."""

    offset: int
    length: int
    zero: bool


def stretches(client: Client, context: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length, flags) of a context over [start, end), in order. Raises OSError."""
    while start < end:
        before = start
        answer = client.block_status(start, min(_STATUS_BYTES, end - start))
        for length, flags in answer.get(context, []):
            length = min(length, end - start)
            yield start, length, flags
            start += length
        if start == before:
            raise OSError(f"the NBD server says nothing of {context} at offset {start}")


def ranges(changes: Client, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """(offset, length) of what differs in [start, stop), neighbours joined; `stop` None: the volume's end."""
    first = end = start
    for offset, length, flags in stretches(changes, CHANGED, start, changes.size if stop is None else stop):
        if not flags & _DIFFERS:
            continue
        if offset != end and end > first:
            yield first, end - first
        if offset != end:
            first = offset
        end = offset + length
    if end > first:
        yield first, end - first


def near(parts: Iterable[tuple[int, int]], gap_bytes: int) -> Iterator[tuple[int, int]]:
    """The same with those joined that are at most `gap_bytes` apart."""
    first = end = 0
    for offset, length in parts:
        if end and offset > end + gap_bytes:
            yield first, end - first
            first = offset
        elif not end:
            first = offset
        end = offset + length
    if end:
        yield first, end - first


def measure(changes: Client) -> tuple[int, int]:
    """(bytes, extents) that differ."""
    total = count = 0
    for _, length in ranges(changes):
        total, count = total + length, count + 1
    return total, count


def with_zeros(source: Client, parts: Iterable[tuple[int, int]], ask_bytes: int = _ASK_BYTES) -> Iterator[Extent]:
    """The same, parted where `source` says of those of at least `ask_bytes` that they are zeros."""
    for offset, length in parts:
        if length < ask_bytes:
            yield Extent(offset, length, False)
            continue
        for start, size, state in stretches(source, wire.BASE_ALLOCATION, offset, offset + length):
            yield Extent(start, size, bool(state & wire.STATE_ZERO))


def pieces(parts: Iterable[Extent]) -> Iterator[Extent]:
    """The same in pieces that are one request each."""
    for offset, length, zero in parts:
        while length:
            piece = min(length, _ZERO_BYTES if zero else PIECE_BYTES - offset % PIECE_BYTES)
            yield Extent(offset, piece, zero)
            offset, length = offset + piece, length - piece


def _is_zero(content: bytearray) -> bool:
    return not content[0] and not content[-1] and content == bytes(len(content))


def check_size(replayer_address: str, volume: str, seq: int) -> None:
    """A volume that grew since the point keeps its size, so the point does not fit it. Raises RefusedError."""
    sizes = []
    for name in (f"{volume}@seq:{seq}", volume):
        with Client.connect(replayer_address, name) as client:
            sizes.append(client.size)
    if sizes[0] != sizes[1]:
        raise RefusedError(
            f"{volume} had {sizes[0]:,} bytes at that point and has {sizes[1]:,} now.",
            "Export the point instead.",
            code="unsupported",
        )


class Copier:
    """A past export and the locked primary that gets its content. `unequal` is what was copied and differs still."""

    def __init__(self, source_address: str, source_name: str, target_address: str, target_name: str) -> None:
        with contextlib.ExitStack() as opened:
            source = partial(Client.connect, source_address, source_name)
            self.changes = opened.enter_context(source((CHANGED,)))
            self.source = opened.enter_context(source((wire.BASE_ALLOCATION,)))
            self.target = opened.enter_context(Client.connect(target_address, target_name, (wire.BASE_ALLOCATION,)))
            self._opened = opened.pop_all()
        self.unequal: Extents = []

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def copy(
        self, start: int, checkpoint_bytes: int, on_bytes: Callable[[int], None],
        on_written: Callable[[int, int], None] = lambda offset, length: None,
    ) -> Iterator[int]:  # fmt: skip
        """Copies what differs from offset `start` on and proves it; yields the offset up to which it is durable and
        compared, now and then and at the end. `on_bytes` gets the bytes copied since `start`, `on_written` each offset
        and length that the primary took. Raises OSError."""
        reads, writes = self.source.pipeline(DEPTH), self.target.pipeline(DEPTH)
        can_zero = bool(self.target.flags & wire.SEND_WRITE_ZEROES)
        proof = _Proof(self.source, self.target)
        written: deque[Extent] = deque()
        done = flushed = kept = 0

        def zeros(piece: Extent) -> None:
            if can_zero:
                return writes.zero(piece.offset, piece.length, then=partial(written.append, piece))
            end = piece.offset + piece.length
            for at in range(piece.offset, end, PIECE_BYTES):
                part = Extent(at, min(PIECE_BYTES, end - at), True)
                writes.write(at, _ZEROS[: part.length], then=partial(written.append, part))

        def write(offset: int, content: bytearray) -> None:
            piece = Extent(offset, len(content), False)
            if _is_zero(content):
                zeros(piece)
            else:
                writes.write(offset, content, then=partial(written.append, piece))

        def prove() -> None:
            while written:
                piece = written.popleft()
                proof.begin(piece)
                on_written(piece.offset, piece.length)

        def finish() -> None:
            reads.finish()
            writes.finish()
            self.target.flush()
            prove()
            self.unequal += proof.finish()

        for piece in pieces(with_zeros(self.source, ranges(self.changes, start))):
            if piece.zero:
                zeros(piece)
            else:
                reads.read(piece.offset, piece.length, write)
            prove()
            done += piece.length
            on_bytes(done)
            if done - kept >= checkpoint_bytes:
                finish()
                kept = flushed = done
                yield piece.offset + piece.length
            elif done - flushed >= _FLUSH_BYTES:
                writes.flush()
                flushed = done
        finish()
        yield self.source.size

    def compare(self, on_bytes: Callable[[int], None], stop: int | None = None) -> Extents:
        """(offset, length) of pieces that differ still between the export and the primary, in front of `stop` (None:
        all of them). Raises OSError."""
        proof = _Proof(self.source, self.target)
        done = 0
        for piece in pieces(with_zeros(self.source, ranges(self.changes, 0, stop))):
            proof.begin(piece)
            done += piece.length
            on_bytes(done)
        return proof.finish()


class _Proof:
    """Pieces from both sides, each compared when its second copy arrives; at most the requests in flight are held."""

    def __init__(self, source: Client, target: Client) -> None:
        self._target = target
        self._theirs, self._ours = source.pipeline(DEPTH), target.pipeline(DEPTH)
        self._unequal: Extents = []
        self._first: dict[int, bytearray] = {}

    def begin(self, piece: Extent) -> None:
        """Asks for a piece that the primary has taken. Raises OSError of this or an earlier one."""
        if not piece.zero:
            self._theirs.read(piece.offset, piece.length, self._meet)
            self._ours.read(piece.offset, piece.length, self._meet)
            return
        for part in pieces(with_zeros(self._target, [(piece.offset, piece.length)])):
            if not part.zero:
                self._ours.read(part.offset, part.length, self._zeros)

    def finish(self) -> Extents:
        """(offset, length) of those since the last call that differ, when all are compared. Raises OSError."""
        self._theirs.finish()
        self._ours.finish()
        assert not self._first  # each has been read from both sides
        found, self._unequal = self._unequal, []
        return found

    def _meet(self, offset: int, content: bytearray) -> None:
        other = self._first.pop(offset, None)
        if other is None:
            self._first[offset] = content
        elif other != content:
            self._note(offset, len(content))

    def _zeros(self, offset: int, content: bytearray) -> None:
        if not _is_zero(content):
            self._note(offset, len(content))

    def _note(self, offset: int, length: int) -> None:
        if len(self._unequal) < _MAX_UNEQUAL:
            self._unequal.append((offset, length))
