"""Where a journal ends, found when its writer starts.

Known to be durable is the highest of: the checkpoint, `durable`, every durable seq that a later segment or batch
names, and every consumer's position. A bad checksum at or below it is corruption and an error; above it, it is a torn
tail: the journal ends before it, whatever stands behind it (an intact batch too), and what ends there is synced.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field

from cdp import storage
from cdp.errors import CorruptionError, ForkedError, StorageError
from cdp.journal import consumers
from cdp.journal.batch import HEADER_BYTES, Batch, decode_header
from cdp.journal.position import read_durable
from cdp.journal.segment import (
    FRAME,
    FRAME_BYTES,
    HEADER_PAGE_BYTES,
    FrameReader,
    SegmentHeader,
    check_continues,
    check_group,
    list_segments,
    read_header,
    segment_name,
)


@dataclass
class End:
    """What recovery found."""

    last_seq: int = 0
    last_crc: int = 0
    last_order_ns: int = 0
    epoch: int = 0  # the newest incarnation that is named
    segments: list[int] = field(default_factory=list)  # first seqs of those that stand
    discarded: list[int] = field(default_factory=list)  # and of those behind the end
    end: int = 0  # offset behind the last batch, in the last of `segments`
    torn: str = ""  # why the walk ended before the last file's end


class Recovery:
    """One walk. `find` does all; nothing is changed on disk but that what stands is synced."""

    def __init__(self, folder: str, group_id: bytes, known_durable_seq: int) -> None:
        self._folder = folder
        self._group_id = group_id
        self._durable_seq = known_durable_seq
        self._consumers = consumers.highest_positions(folder)
        self._headers: dict[int, SegmentHeader | CorruptionError] = {}
        self._found = End()

    def find(self) -> End:
        """Raises CorruptionError, ForkedError (older than its consumers, or another group's), StorageError, OSError."""
        published = read_durable(self._folder)
        if published is not None:
            self._durable_seq = max(self._durable_seq, published.seq)
        names = list_segments(self._folder)
        self._read_headers(names)
        if names:  # what stood before the oldest segment was freed, so it was durable
            self._durable_seq = max(self._durable_seq, names[0] - 1)
        found = self._found
        first = self._first_to_walk(names)
        found.segments = names[:first]
        for i in range(first, len(names)):
            follower = names[i + 1] if i + 1 < len(names) else None
            if not self._walk(names[i], follower):
                found.discarded = [name for name in names if name not in found.segments]
                break
        self._judge()
        for name in found.segments[first:]:
            self._sync(name)
        storage.sync_folder(self._folder)
        return found

    def _path(self, first_seq: int) -> str:
        return f"{self._folder}/{segment_name(first_seq)}"

    def _read_headers(self, names: list[int]) -> None:
        for name in names:
            fd = storage.open_file(self._path(name), os.O_RDONLY)
            try:
                header = read_header(fd, self._path(name), name)
            except CorruptionError as e:
                self._headers[name] = e
                continue
            finally:
                storage.close(fd)
            check_group(header, self._group_id, self._path(name))
            self._headers[name] = header
            self._durable_seq = max(self._durable_seq, header.durable_seq)
            self._found.epoch = max(self._found.epoch, header.epoch)

    def _first_to_walk(self, names: list[int]) -> int:
        """The segment that holds the highest durable seq: those before it are durable as they are."""
        highest = max([self._durable_seq, *self._consumers.values()])
        return max([i for i, name in enumerate(names) if name <= highest], default=0)

    def _walk(self, name: int, follower: int | None) -> bool:
        """Walks one segment; False if the journal ends in it or before it."""
        found = self._found
        header = self._headers[name]
        if isinstance(header, CorruptionError):
            found.torn = found.torn or header.message
            return False
        if not found.end:
            found.last_seq, found.last_crc, found.last_order_ns = header.last_seq, header.last_crc, header.last_order_ns
        elif (header.last_seq, header.last_crc) != (found.last_seq, found.last_crc):
            found.torn = f"{self._path(name)}: the segment does not continue seq {found.last_seq}."
            return False
        found.segments.append(name)
        found.end = HEADER_PAGE_BYTES
        stop = follower - 1 if follower is not None and isinstance(self._headers[follower], SegmentHeader) else None
        fd = storage.open_file(self._path(name), os.O_RDONLY)
        try:
            frames = FrameReader(fd, self._path(name), header.seed, storage.device_bytes(fd))
            while found.last_seq != stop:
                try:
                    self._take(frames, header, stop)
                except CorruptionError as e:
                    found.torn = e.message
                    self._look_behind(fd, header, found.end)
                    return False
        finally:
            storage.close(fd)
        return True

    def _take(self, frames: FrameReader, header: SegmentHeader, stop: int | None) -> None:
        found = self._found
        where = f"offset {frames.offset}"
        batch = frames.next()
        check_continues(batch, header, found.last_seq, found.last_crc, where)
        if stop is not None and batch.last_seq > stop:
            raise CorruptionError(f"{where}: the batch goes beyond seq {stop}, where the next segment begins.")
        self._durable_seq = max(self._durable_seq, batch.durable_seq)
        found.last_seq, found.last_crc = batch.last_seq, batch.crc
        found.last_order_ns = batch.order_ns + batch.record_count - 1
        found.end = frames.offset

    def _look_behind(self, fd: int, header: SegmentHeader, offset: int) -> None:
        """What later batches of a segment say was durable, seen by their frames past one that is bad."""
        size = storage.device_bytes(fd)
        frames = FrameReader(fd, "", header.seed, size, offset)
        reached = self._found.last_seq
        while (batch := self._next_behind(fd, frames)) is not None:
            if batch.first_seq <= reached or (batch.group_id, batch.epoch) != (header.group_id, header.epoch):
                return
            reached = batch.last_seq
            self._durable_seq = max(self._durable_seq, batch.durable_seq)

    def _next_behind(self, fd: int, frames: FrameReader) -> Batch | None:
        """The batch header at the reader's offset, or behind the bad one there if either length of it leads on."""
        try:
            return frames.next(header_only=True)
        except StorageError:
            raw = storage.pread(fd, FRAME_BYTES + HEADER_BYTES, frames.offset)
        if len(raw) < FRAME_BYTES + HEADER_BYTES:
            return None
        start, lengths = frames.offset, {FRAME.unpack_from(raw)[0]}
        with suppress(StorageError):  # then only the frame knows
            lengths.add(decode_header(raw[FRAME_BYTES:]).batch_bytes)
        for length in lengths:
            frames.offset = start + FRAME_BYTES + length
            try:
                return frames.next(header_only=True)
            except StorageError:
                continue
        return None

    def _judge(self) -> None:
        found = self._found
        if self._durable_seq > found.last_seq:
            why = found.torn or "There is nothing behind it."
            raise CorruptionError(
                f"The journal {self._folder} ends at seq {found.last_seq}, but everything up to seq "
                f"{self._durable_seq} was durable. {why}",
                "The disk lost or changed what was written: check it, and resync the group's volumes.",
            )
        for name, seq in self._consumers.items():
            if seq > found.last_seq:
                raise ForkedError(
                    f"The journal {self._folder} ends at seq {found.last_seq}, but its consumer {name} is at seq "
                    f"{seq}: it was put back to an older copy.",
                    "Put the newer copy back, or begin a new journal and resync the group's volumes.",
                )

    def _sync(self, name: int) -> None:
        fd = storage.open_file(self._path(name))
        try:
            storage.fdatasync(fd)
        finally:
            storage.close(fd)
