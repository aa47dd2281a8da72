"""Reads the durable batches of an embedded journal in order, from another process than its writer's.

Everything at or below the durable position must be whole: what is not is a CorruptionError that names the place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

from cdp import storage
from cdp.errors import CorruptionError, ForkedError, HoleError
from cdp.journal import consumers
from cdp.journal.batch import Batch
from cdp.journal.position import DurableFile, DurablePosition, read_durable
from cdp.journal.segment import (
    FrameReader,
    SegmentHeader,
    check_continues,
    list_segments,
    read_header,
    segment_name,
)
from cdp.journal.wake import Bell


class JournalReader(Protocol):
    """The contract of every carrier, for one consumer. One thread at a time."""

    def read(self, max_bytes: int) -> list[Batch]:
        """The next durable batches in order, [] if there are none now; at least one whatever its size.

        Raises CorruptionError, HoleError, ForkedError, StorageError, OSError.
        """
        ...

    def fileno(self) -> int:
        """Becomes readable when there may be more."""
        ...

    def drain(self) -> None:
        """To be called after `fileno` was readable, before `read`."""
        ...

    def acknowledge(self, seq: int) -> None:
        """The consumer needs nothing up to `seq` any more (durable on its side). NotFoundError: it was removed."""
        ...

    def end(self) -> tuple[int, int]:
        """(last durable seq, order time of that record) known now, for lag; (0, 0) if nothing is known."""
        ...

    def close(self) -> None: ...


class Cursor:
    """A place in the segments of a folder, at the end of a batch. Reads on from there up to a given end."""

    def __init__(self, folder: str, after_seq: int) -> None:
        """Raises HoleError when what follows `after_seq` is gone, ForkedError when no batch ends there."""
        self._folder = folder
        self.seq = after_seq
        self._fd = -1
        self._segment = 0
        self._header: SegmentHeader | None = None
        self._frames: FrameReader | None = None
        self._crc = 0
        self._last: int | None = None  # last seq of this segment, once the next one is known

    def next(self, end: DurablePosition, header_only: bool = False) -> Batch | None:
        """The next batch up to `end`, None if that is reached."""
        if self.seq >= end.seq:
            return None
        if self._frames is None:
            self._seek(end)
        try:
            return self._next(end, header_only)
        except CorruptionError:
            self._check_still_there()
            raise

    def _next(self, end: DurablePosition, header_only: bool) -> Batch:
        while self._segment != end.segment and self._segment_ended():
            self._enter(self.seq + 1)
        header, frames = self._header, self._frames
        assert header is not None and frames is not None
        limit = end.end if self._segment == end.segment else storage.device_bytes(self._fd)
        if frames.end != limit:
            frames.end = limit
            frames.refresh()
        where = f"{self._path(self._segment)} at offset {frames.offset}"
        try:
            batch = frames.next(header_only)
            check_continues(batch, header, self.seq, self._crc, where)
        except CorruptionError as e:
            raise CorruptionError(
                f"{e.message} Seqs {self.seq + 1} to {end.seq} of the journal are durable and follow there.",
                "The disk lost or changed what was written: check it, and resync the group's volumes.",
            ) from e
        self.seq, self._crc = batch.last_seq, batch.crc
        return batch

    def _segment_ended(self) -> bool:
        if self._last is None:
            later = [name for name in list_segments(self._folder) if name > self._segment]
            if later:
                self._last = later[0] - 1
        return self._last == self.seq

    def _path(self, first_seq: int) -> str:
        return f"{self._folder}/{segment_name(first_seq)}"

    def _enter(self, first_seq: int) -> None:
        """Opens the segment that begins with `first_seq`; it must continue where the cursor is."""
        path = self._path(first_seq)
        continues = self._header is not None
        fd = storage.open_file(path, os.O_RDONLY)
        try:
            header = read_header(fd, path, first_seq)
            if continues and (header.last_seq, header.last_crc) != (self.seq, self._crc):
                raise CorruptionError(f"{path}: the segment does not continue the batch that ends at seq {self.seq}.")
        except BaseException:
            storage.close(fd)
            raise
        self.close()
        self._fd, self._segment, self._header, self._last = fd, first_seq, header, None
        self._crc = header.last_crc
        self._frames = FrameReader(fd, path, header.seed, storage.device_bytes(fd))

    def _seek(self, end: DurablePosition) -> None:
        """To the batch that ends at `seq`, by headers alone."""
        wanted = self.seq
        names = list_segments(self._folder)
        if not names or names[0] > wanted + 1:
            first = names[0] if names else end.seq + 1
            raise HoleError(
                f"The journal {self._folder} begins at seq {first}; what follows seq {wanted} is gone.",
                "The consumer was away for too long, or removed: resync the group's volumes.",
            )
        try:
            self._enter(max(name for name in names if name <= wanted + 1))
            self.seq = self._segment - 1
            while self.seq < wanted:
                self._next(end, header_only=True)
        except FileNotFoundError:
            self._check_still_there()
            raise
        finally:
            reached, self.seq = self.seq, wanted
        if reached != wanted:
            raise ForkedError(
                f"The journal {self._folder} has no batch that ends at seq {wanted}: it is another history.",
                "The journal was put back to an older copy or mixed up: resync the group's volumes.",
            )

    def _check_still_there(self) -> None:
        """Raises HoleError if the segment was freed under the reader, whose consumer is not in the list then."""
        names = list_segments(self._folder)
        if names and names[0] > self.seq + 1:
            raise HoleError(
                f"The journal {self._folder} begins at seq {names[0]} now; what follows seq {self.seq} was freed.",
                "The consumer was removed from the list: resync the group's volumes.",
            )

    def close(self) -> None:
        if self._fd >= 0:
            storage.close(self._fd)
            self._fd = -1


class EmbeddedReader:
    """The JournalReader of a journal folder. A folder that has no journal yet reads as empty."""

    def __init__(self, folder: str, consumer: str, after_seq: int) -> None:
        """Registers `consumer` at `after_seq` if it is not in the list. Raises UsageError for its name, OSError."""
        self._folder = folder
        self._consumer = consumer
        consumers.register(folder, consumer, after_seq)
        self._bell = Bell(folder, consumer)
        self._cursor = Cursor(folder, after_seq)
        self._file: DurableFile | None = None
        self._end: DurablePosition | None = None
        self._ahead_of: DurablePosition | None = None
        self._look()

    def _look(self) -> DurablePosition | None:
        """Reads `durable` again."""
        if self._file is None:
            try:
                self._file = DurableFile(self._folder, writable=False)
            except FileNotFoundError:
                return None
        found = self._file.read()
        if found is not None:
            self._end = found
        if self._end is not None and self._cursor.seq > self._end.seq:
            self._check_ahead(self._end)
        return self._end

    def _check_ahead(self, end: DurablePosition) -> None:
        """The consumer is ahead of `durable`. That file may be older than the journal after a power cut, so it is
        believed once the writer has written it again; then the journal is an older copy of itself."""
        if self._ahead_of is None:
            self._ahead_of = end
        elif end != self._ahead_of:
            raise ForkedError(
                f"The journal {self._folder} goes on from seq {end.seq}, but {self._consumer} is at seq "
                f"{self._cursor.seq} already: it was put back to an older copy.",
                "Resync the group's volumes, or put the newer copy back.",
            )

    def read(self, max_bytes: int) -> list[Batch]:
        """See JournalReader."""
        end = self._end
        if end is None or self._cursor.seq >= end.seq:
            end = self._look()
        if end is None:
            return []
        batches: list[Batch] = []
        while max_bytes > 0 and (batch := self._cursor.next(end)) is not None:
            batches.append(batch)
            max_bytes -= batch.batch_bytes
        return batches

    def fileno(self) -> int:
        return self._bell.fileno()

    def drain(self) -> None:
        self._bell.drain()

    def acknowledge(self, seq: int) -> None:
        """See JournalReader."""
        consumers.acknowledge(self._folder, self._consumer, seq)

    def end(self) -> tuple[int, int]:
        """See JournalReader."""
        found = self._look()
        return (found.seq, found.order_ns) if found is not None else (0, 0)

    def close(self) -> None:
        self._cursor.close()
        self._bell.close()
        if self._file is not None:
            self._file.close()


def batches_between(folder: str, after_seq: int, end: DurablePosition, header_only: bool = False) -> Iterator[Batch]:
    """The batches behind `after_seq` up to `end`, as Cursor reads them."""
    cursor = Cursor(folder, after_seq)
    try:
        while (batch := cursor.next(end, header_only)) is not None:
            yield batch
    finally:
        cursor.close()


def time_of(folder: str, seq: int) -> int | None:
    """Order time of a published record, by walking the headers of its segment; None if it is not there (yet, or any
    more). Costs up to some hundred reads: for answers to people, not for a loop. Raises CorruptionError, OSError."""
    end = read_durable(folder)
    if end is None or not 0 < seq <= end.seq:
        return None
    names = [name for name in list_segments(folder) if name <= seq]
    if not names:
        return None
    for batch in batches_between(folder, names[-1] - 1, end, header_only=True):
        if batch.last_seq >= seq:
            return batch.order_ns + seq - batch.first_seq
    return None
