"""The only writer of a journal folder: appends batches to segment files, on the collector's hot path.

`append` is one pwritev of whole pages: the unfinished last page is kept in memory and written again in front, since a
partial write to a page that is not cached would have to read it first. Nothing here blocks on a sync but the start.
The loop's thread calls everything except `sync` and what `prepare` returns, which are for a worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from crc32c import crc32c

from cdp import storage
from cdp.errors import FencedError, StorageError
from cdp.journal import consumers
from cdp.journal.batch import DESCRIPTOR_BYTES, HEADER_BYTES, Batch, Identity, encode
from cdp.journal.position import DurableFile, DurablePosition
from cdp.journal.reader import batches_between
from cdp.journal.recovery import Recovery
from cdp.journal.segment import (
    FRAME,
    FRAME_BYTES,
    HEADER_PAGE_BYTES,
    SALT_BYTES,
    SegmentHeader,
    encode_header,
    segment_name,
)
from cdp.journal.spares import Spares, disk_full
from cdp.journal.wake import Waker

PAGE_BYTES = storage.PAGE_BYTES
# Smallest segment: a few batches of small writes. What production needs (the largest batch fits) is 64 MiB.
MIN_SEGMENT_BYTES = 64 << 10
# Up to this mean size of a piece joining them first is cheaper than a checksum call and an iovec entry for each.
JOIN_PIECE_BYTES = 16 << 10
# The kernel's IOV_MAX is 1024; the tail, frame, head and padding need four.
MAX_PIECES = 1000

_ZEROS = bytes(PAGE_BYTES)
Bytes = bytes  # the writer has an attribute of that name
Buffer = bytes | bytearray | memoryview


class Segment(NamedTuple):
    """A live segment before the current one."""

    first_seq: int
    bytes: int


class Mark(NamedTuple):
    """The end of an appended batch, kept until it is published."""

    seq: int
    crc: int
    order_ns: int
    segment: int
    end: int


class SyncToken(NamedTuple):
    """What one sync makes durable."""

    seq: int
    fds: tuple[int, ...]
    folder: str | None  # to be synced too: a segment got its name since the last sync


class JournalWriter:
    """See the module. Attributes: `last_seq`, `last_crc` and `order_ns` of the newest record, `durable_seq`,
    `first_seq` (the oldest that is kept), `bytes`, `segment_bytes`."""

    def __init__(
        self,
        folder: str,
        identity: Identity,
        *,
        segment_bytes: int,
        max_bytes: int,
        known_durable_seq: int = 0,
    ) -> None:
        """Recovers what is there and begins a new segment; a folder that is missing or empty begins at seq 1.

        Raises CorruptionError, ForkedError and FencedError as `Recovery` and promise 4 say, JournalFullError,
        RefusedError when another process writes this folder, OSError. Nothing is published until `publish` is called.
        """
        if segment_bytes < MIN_SEGMENT_BYTES or segment_bytes % PAGE_BYTES:
            raise StorageError(f"A journal segment must be a multiple of 4096 bytes, at least {MIN_SEGMENT_BYTES}.")
        self.folder = folder
        self.segment_bytes = segment_bytes
        self._identity = identity
        consumers.make_folder(folder)
        self._lock = storage.lock_file(f"{folder}/lock", 0, f"The journal {folder}")
        try:
            self._open(known_durable_seq, max_bytes)
        except BaseException:
            storage.close(self._lock)
            raise

    def _open(self, known_durable_seq: int, max_bytes: int) -> None:
        end = Recovery(self.folder, self._identity.group_id, known_durable_seq).find()
        if end.epoch >= self._identity.epoch:
            raise FencedError(
                f"The journal {self.folder} was written by incarnation {end.epoch}; this is {self._identity.epoch}.",
                "The collector's own files are older than its journal: put both back from the same copy.",
            )
        self.last_seq = self.durable_seq = end.last_seq
        self.last_crc = end.last_crc
        self.order_ns = end.last_order_ns
        self._recovered_seq = end.last_seq
        self._base_order_ns = end.last_order_ns  # order time of the newest batch's first record …
        self._base_monotonic_ns = storage.monotonic_ns()  # … and the monotonic clock then
        self._failure: BaseException | None = None
        self._marks: deque[Mark] = deque()
        self._segments: deque[Segment] = deque()
        self._dirty: list[int] = []  # descriptors of earlier segments with bytes that are not synced
        self._retired: list[int] = []  # of those that are, to be closed when no sync uses them
        self._folder_dirty = False
        self._syncs = 0
        self._adopt(end.segments, end.end)
        self._spares = Spares(self.folder, self.segment_bytes, max_bytes)
        self._discard(end.discarded)
        self._fd = -1
        self._begin_segment(at_once=True)
        storage.sync_folder(self.folder)
        self._folder_dirty = False
        self._tail = b""
        self._page = HEADER_PAGE_BYTES
        self._durable_file = DurableFile(self.folder, writable=True)
        published = self._durable_file.read()
        self._generation = published.generation if published else 0
        self._published_seq = 0
        self._waker = Waker(self.folder)
        self._marks.append(Mark(self.last_seq, self.last_crc, self.order_ns, self._segment, HEADER_PAGE_BYTES))

    def _adopt(self, names: list[int], end: int) -> None:
        """The segments that stand; the last one gives back what lies behind its end."""
        for name in names:
            path = f"{self.folder}/{segment_name(name)}"
            if name == names[-1] and end:
                fd = storage.open_file(path)
                storage.ftruncate(fd, min(storage.device_bytes(fd), end + -end % PAGE_BYTES))
                storage.close(fd)
            if name <= self.last_seq:  # else nothing is in it, and the new segment takes its name
                self._segments.append(Segment(name, storage.stat(path).st_size))

    def _discard(self, names: list[int]) -> None:
        for name in names:
            if name != self.last_seq + 1:  # that one the new segment replaces
                self._spares.give_now(f"{self.folder}/{segment_name(name)}")

    @property
    def first_seq(self) -> int:
        return self._segments[0].first_seq if self._segments else self._segment

    @property
    def bytes(self) -> int:
        """Space of the segments and of the files kept to be recycled."""
        return self._live_bytes() + self._spares.bytes

    def _live_bytes(self) -> int:
        return sum(s.bytes for s in self._segments) + self.segment_bytes

    # --- appending

    def append(self, descriptors: Bytes, data: Sequence[Buffer], data_bytes: int) -> int:
        """One batch, one pwritev; its first seq. It is in the page cache then, durable after a sync.

        Raises JournalFullError (nothing was appended; the same call may work later), StorageError for a batch that no
        segment can hold, OSError (the writer takes nothing more: `reopen_after_failure`).
        """
        if self._failure is not None:
            raise self._dead()
        pieces = len(data)
        if pieces > 1 and (pieces > MAX_PIECES or data_bytes < pieces * JOIN_PIECE_BYTES):
            data = [b"".join(data)]
        length = HEADER_BYTES + len(descriptors) + data_bytes
        if self._page + len(self._tail) + FRAME_BYTES + length > self.segment_bytes:
            self._roll(FRAME_BYTES + length)
        wall_ns = storage.wall_ns()
        monotonic_ns = storage.monotonic_ns()
        order_ns = max(wall_ns, self._base_order_ns + monotonic_ns - self._base_monotonic_ns, self.order_ns + 1)
        first_seq = self.last_seq + 1
        head, crc = encode(
            self._identity, first_seq, self.durable_seq, wall_ns, order_ns, self.last_crc, descriptors, data, data_bytes
        )
        frame = FRAME.pack(length, crc32c(head[:HEADER_BYTES], self._seed))
        self._write_frame(frame + head, data, FRAME_BYTES + length)
        count = len(descriptors) // DESCRIPTOR_BYTES
        self.last_seq += count
        self.last_crc = crc
        self._base_order_ns, self._base_monotonic_ns = order_ns, monotonic_ns
        self.order_ns = order_ns + count - 1
        self._marks.append(Mark(self.last_seq, crc, self.order_ns, self._segment, self._page + len(self._tail)))
        return first_seq

    def _write_frame(self, head: Bytes, data: Sequence[Buffer], length: int) -> None:
        """Frame and batch behind the last one, in whole pages. Nothing has changed if it raises JournalFullError."""
        tail = self._tail
        total = len(tail) + length
        padding = -total % PAGE_BYTES
        pieces = [tail, head, *data, _ZEROS[:padding]]
        try:
            written = storage.pwritev(self._fd, pieces, self._page)
            if written != total + padding:
                self._write_all(pieces, written)
        except OSError as e:
            error = disk_full(self.folder, e)
            if error is e:
                self._failure = e
            raise error from e
        rest = total % PAGE_BYTES
        last = data[-1] if data else b""
        # The bytes of the unfinished page: nearly always the end of the last piece.
        self._tail = bytes(last[len(last) - rest :]) if len(last) >= rest else b"".join(pieces[:-1])[total - rest :]
        self._page += total - rest

    def _write_all(self, pieces: Sequence[Buffer], written: int) -> None:
        """The rest of a write that came up short."""
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            written += (count := storage.pwrite(self._fd, rest, self._page + written))
            rest = rest[count:]

    def _roll(self, length: int) -> None:
        """Ends the segment and begins the next, whose header goes to disk with its first batch."""
        if length + HEADER_PAGE_BYTES > self.segment_bytes:
            raise StorageError(
                f"A batch of {length} bytes does not fit into a journal segment of {self.segment_bytes}.",
                "Raise journal.segment_size.",
            )
        if self._segment > self.last_seq:
            return  # it is empty but for the header that is still to be written
        old = (self._fd, self._segment)
        try:
            self._begin_segment()
        except OSError as e:
            self._failure = e
            raise
        self._dirty.append(old[0])
        self._segments.append(Segment(old[1], self.segment_bytes))

    def _begin_segment(self, at_once: bool = False) -> None:
        """A spare gets the name of the next segment; its header page becomes the tail of the next write, or is
        written and synced before (`at_once`: a start that appends nothing leaves its mark too)."""
        live = sum(s.bytes for s in self._segments) + (self.segment_bytes if self._fd >= 0 else 0)
        spare = self._spares.take(live)
        first_seq = self.last_seq + 1
        header = SegmentHeader(
            self._identity.group_id, storage.random_bytes(SALT_BYTES), first_seq, self._identity.epoch, self.last_seq,
            self.order_ns, self.durable_seq, self.last_crc,
        )  # fmt: skip
        page = encode_header(header)
        try:
            if at_once:
                storage.pwrite(spare.fd, page, 0)
                storage.fdatasync(spare.fd)
            storage.rename(spare.path, f"{self.folder}/{segment_name(first_seq)}")
        except OSError as e:
            self._spares.give_back(spare)
            raise disk_full(self.folder, e) from e
        self._fd, self._segment = spare.fd, first_seq
        self._seed = header.seed
        self._page, self._tail = 0, page
        self._folder_dirty = True

    # --- durability

    def begin_sync(self) -> SyncToken | None:
        """What a worker has to sync so that all that was appended is durable; None if it is already."""
        if self.last_seq == self.durable_seq:
            return None
        if self._failure is not None:
            raise self._dead()
        self._syncs += 1
        folder = self.folder if self._folder_dirty else None
        self._folder_dirty = False
        return SyncToken(self.last_seq, (*self._dirty, self._fd), folder)

    def sync(self, token: SyncToken) -> None:
        """On a worker's thread. After an error the writer takes nothing more (promise 3). Raises OSError."""
        try:
            for fd in token.fds:
                storage.fdatasync(fd)
            if token.folder is not None:
                storage.sync_folder(token.folder)
        except BaseException as e:
            self._failure = e
            raise

    def end_sync(self, token: SyncToken) -> int:
        """Back on the loop, also after a `sync` that raised: the highest durable seq. Raises OSError if it failed."""
        self._syncs -= 1
        if self._failure is not None:
            raise self._dead()
        self.durable_seq = max(self.durable_seq, token.seq)
        synced = [fd for fd in self._dirty if fd in token.fds]
        self._dirty = [fd for fd in self._dirty if fd not in token.fds]
        self._retired += synced
        if self._syncs == 0:
            for fd in self._retired:
                storage.close(fd)
            self._retired.clear()
        return self.durable_seq

    def publish(self, seq: int) -> None:
        """Readers may take everything up to `seq`, or up to what is durable if that is less.

        The batches found at the start become visible together, with the first call that reaches their end.
        """
        limit = min(seq, self.durable_seq)
        mark = None
        while self._marks and self._marks[0].seq <= limit:
            mark = self._marks.popleft()
        if mark is None:
            return
        self._generation += 1
        self._published_seq = mark.seq
        self._durable_file.write(
            DurablePosition(
                self._generation, mark.seq, mark.order_ns, mark.segment, mark.end, self._identity.epoch,
                self._identity.group_id, mark.crc,
            )  # fmt: skip
        )
        self._waker.wake()

    def batches_after(self, seq: int, header_only: bool = False) -> Iterator[Batch]:
        """Every batch behind `seq` that was appended, published or not: what a start writes onto the primaries.

        Raises HoleError, ForkedError (no batch ends at `seq`), CorruptionError.
        """
        newest = DurablePosition(
            0, self.last_seq, self.order_ns, self._segment, self._page + len(self._tail), self._identity.epoch,
            self._identity.group_id, self.last_crc,
        )  # fmt: skip
        return batches_between(self.folder, seq, newest, header_only)

    # --- space

    def prepare(self) -> Callable[[], None] | None:
        """Work for a worker, if there is any: the next segment's file, freed ones to recycle or remove.

        What it raises (OSError, JournalFullError) is for the log: a roll that finds no file tries itself.
        """
        return self._spares.job(self._live_bytes())

    def release(self) -> None:
        """Frees the segments that every consumer is past; reads a small file for each. Raises CorruptionError."""
        positions = consumers.positions(self.folder)
        needed = min([*positions.values(), self._published_seq])
        while self._segments:
            follower = self._segments[1].first_seq if len(self._segments) > 1 else self._segment
            if follower - 1 > needed:
                break
            self._spares.give(f"{self.folder}/{segment_name(self._segments.popleft().first_seq)}")

    def close(self) -> None:
        """Closes the files; syncs nothing. No sync may be under way."""
        self._spares.close()
        for fd in (*self._dirty, *self._retired, self._fd, self._lock):
            storage.close(fd)
        self._durable_file.close()
        self._waker.close()

    def _dead(self) -> OSError:
        number = getattr(self._failure, "errno", None) or 5
        return OSError(number, f"The journal {self.folder} failed and takes nothing more: {self._failure}")
