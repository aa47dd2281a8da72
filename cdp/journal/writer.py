"""The only writer of a journal folder: appends batches to segment files, on the collector's hot path.

Nothing here blocks on a sync but the start, `rewrite` and `adopt`. The loop's thread calls everything except `sync`,
`rewrite` and what `prepare` returns, which are for a worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from cdp import storage
from cdp.errors import FencedError, StorageError
from cdp.journal import consumers
from cdp.journal.batch import DESCRIPTOR_BYTES, HEADER_BYTES, Batch, Identity, encode
from cdp.journal.position import DurablePosition
from cdp.journal.publisher import Mark, Publisher
from cdp.journal.reader import batches_between
from cdp.journal.recovery import Recovery
from cdp.journal.rewriting import Rewritten, rewrite, room_for
from cdp.journal.segment import FRAME_BYTES, HEADER_PAGE_BYTES, SALT_BYTES, SegmentHeader, segment_name
from cdp.journal.segment_writer import Buffer, SegmentWriter, cut
from cdp.journal.spares import Spare, Spares, disk_full
from cdp.journal.syncs import Syncs, SyncToken

# Smallest segment: a few batches of small writes. What production needs (the largest batch fits) is 64 MiB.
MIN_SEGMENT_BYTES = 64 << 10
# Up to this mean size of a piece joining them first is cheaper than a checksum call and an iovec entry for each.
JOIN_PIECE_BYTES = 16 << 10
# The kernel's IOV_MAX is 1024; the tail, frame, head and padding need four.
MAX_PIECES = 1000

Bytes = bytes  # the writer has an attribute of that name


class Segment(NamedTuple):
    """A live segment before the current one."""

    first_seq: int
    bytes: int


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
        if segment_bytes < MIN_SEGMENT_BYTES or segment_bytes % storage.PAGE_BYTES:
            raise StorageError(f"A journal segment must be a multiple of 4096 bytes, at least {MIN_SEGMENT_BYTES}.")
        self.folder = folder
        self.segment_bytes = segment_bytes
        self._identity = identity
        consumers.make_folder(folder)
        self._lock = storage.lock_file(f"{folder}/lock", 0, f"The journal {folder}")
        with ExitStack() as on_error:
            on_error.callback(storage.close, self._lock)
            self._recover(known_durable_seq)
            self._open(max_bytes, on_error)
            on_error.pop_all()

    def _recover(self, known_durable_seq: int) -> None:
        end = Recovery(self.folder, self._identity.group_id, known_durable_seq).find()
        if end.epoch >= self._identity.epoch:
            raise FencedError(
                f"The journal {self.folder} was written by incarnation {end.epoch}; this is {self._identity.epoch}.",
                "The collector's own files are older than its journal: put both back from the same copy.",
            )
        self.last_seq = self.durable_seq = end.last_seq
        self.last_crc = self._durable_crc = end.last_crc
        self.order_ns = self._durable_order_ns = end.last_order_ns
        self._base_order_ns = end.last_order_ns  # order time of the newest batch's first record …
        self._base_monotonic_ns = storage.monotonic_ns()  # … and the monotonic clock then
        self._found = end

    def _open(self, max_bytes: int, on_error: ExitStack) -> None:
        end = self._found
        self._failure: BaseException | None = None
        self._sync_failure: BaseException | None = None
        self._segments: deque[Segment] = deque()
        for name in end.segments:
            path = self._path(name)
            size = cut(path, end.end) if name == end.segments[-1] else storage.stat(path).st_size
            if name <= self.last_seq:  # else nothing is in it, and the new segment takes its name
                self._segments.append(Segment(name, size))
        self._spares = Spares(self.folder, self.segment_bytes, max_bytes)
        on_error.callback(self._spares.close)
        for name in end.discarded:
            if name != self.last_seq + 1:
                self._spares.give(self._path(name))
        positions = consumers.positions(self.folder)
        self._free(min(positions.values(), default=0), keep=1)  # on a full disk that is the space to begin with
        self._syncs = Syncs(self.folder)
        self._current_bytes = self.segment_bytes
        self._current = self._begin_segment(self._spares.take(self._ended_bytes()), at_once=True)
        on_error.callback(storage.close, self._current.fd)
        storage.sync_folder(self.folder)
        found = Mark(self.last_seq, self.last_crc, self.order_ns, self._current.first_seq, self._current.end)
        self._publisher = Publisher(self.folder, self._identity, found)

    def _path(self, first_seq: int) -> str:
        return f"{self.folder}/{segment_name(first_seq)}"

    @property
    def first_seq(self) -> int:
        return self._segments[0].first_seq if self._segments else self._current.first_seq

    @property
    def bytes(self) -> int:
        """Space of the segments and of the files kept to be recycled."""
        return self.live_bytes + self._spares.bytes

    @property
    def live_bytes(self) -> int:
        """The same without what is kept to be recycled."""
        return self._ended_bytes() + self._current_bytes

    @property
    def has_room(self) -> bool:
        """Whether more than the rest of a segment can be appended: the next segment is there, or half of this one."""
        return self._spares.ready or self.segment_bytes - self._current.end >= self.segment_bytes // 2

    def _ended_bytes(self) -> int:
        return sum(s.bytes for s in self._segments)

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
        length = FRAME_BYTES + HEADER_BYTES + len(descriptors) + data_bytes
        if self._current.end + length > self.segment_bytes:
            self._roll(length)
        wall_ns = storage.wall_ns()
        monotonic_ns = storage.monotonic_ns()
        order_ns = max(wall_ns, self._base_order_ns + monotonic_ns - self._base_monotonic_ns, self.order_ns + 1)
        first_seq = self.last_seq + 1
        head, crc = encode(
            self._identity, first_seq, self.durable_seq, wall_ns, order_ns, self.last_crc, descriptors, data, data_bytes
        )
        try:
            self._current.write(head, data)
        except OSError as e:
            self._failure = e
            raise
        count = len(descriptors) // DESCRIPTOR_BYTES
        self.last_seq += count
        self.last_crc = crc
        self._base_order_ns, self._base_monotonic_ns = order_ns, monotonic_ns
        self.order_ns = order_ns + count - 1
        self._publisher.mark(Mark(self.last_seq, crc, self.order_ns, self._current.first_seq, self._current.end))
        return first_seq

    def _roll(self, length: int) -> None:
        """Ends the segment and begins the next, whose header goes to disk with its first batch.

        A batch that is larger than a segment gets one of its own size.
        """
        size = length + HEADER_PAGE_BYTES
        size = max(self.segment_bytes, size + -size % storage.PAGE_BYTES)
        live_bytes, old = self.live_bytes, self._current
        try:
            larger = size > self.segment_bytes
            spare = self._spares.take_larger(live_bytes, size) if larger else self._spares.take(live_bytes)
            self._current = self._begin_segment(spare)
        except OSError as e:
            self._failure = e
            raise
        self._syncs.ended(old.fd)
        self._segments.append(Segment(old.first_seq, self._current_bytes))
        self._current_bytes = size

    def _header(self, last_seq: int, last_crc: int, last_order_ns: int) -> SegmentHeader:
        return SegmentHeader(
            self._identity.group_id, storage.random_bytes(SALT_BYTES), last_seq + 1, self._identity.epoch,
            last_seq, last_order_ns, self.durable_seq, last_crc,
        )  # fmt: skip

    def _begin_segment(self, spare: Spare, at_once: bool = False) -> SegmentWriter:
        """A spare gets its header and the name of the next segment. `at_once`: the header is durable before the name,
        so a start that appends nothing leaves its mark too. Raises JournalFullError, OSError; the spare is kept."""
        header = self._header(self.last_seq, self.last_crc, self.order_ns)
        segment = SegmentWriter(self.folder, spare.fd, header)
        try:
            if at_once:
                segment.write_header()
            storage.rename(spare.path, self._path(header.first_seq))
        except OSError as e:
            self._spares.give_back(spare)
            raise disk_full(self.folder, e) from e
        self._syncs.renamed()
        return segment

    # --- durability

    def begin_sync(self) -> SyncToken | None:
        """What a worker has to sync so that all that was appended is durable; None if it is already. Raises OSError."""
        if self._failure is not None:
            raise self._dead()
        if self.last_seq == self.durable_seq:
            return None
        return self._syncs.begin(self.last_seq, self.last_crc, self.order_ns, self._current.fd)

    def sync(self, token: SyncToken) -> None:
        """On a worker's thread. After an error, `end_sync` ends the writer (promise 3). Raises OSError."""
        try:
            self._syncs.run(token)
        except BaseException as e:
            self._sync_failure = e  # the loop may be appending right now; it hears of it in `end_sync`
            raise

    def end_sync(self, token: SyncToken, error: BaseException | None = None) -> int:
        """Back on the loop, also after a `sync` that raised: the highest durable seq. Raises OSError if it failed.

        Who has synced a token's `only_fd` without `sync` gives its error here. What a good sync covers is durable
        even where an append has failed meanwhile.
        """
        self._syncs.finish(token)
        self._sync_failure = self._sync_failure or error
        if self._sync_failure is not None:
            self._failure = self._failure or self._sync_failure
            raise self._dead()
        if token.seq > self.durable_seq:
            self.durable_seq, self._durable_crc, self._durable_order_ns = token.seq, token.crc, token.order_ns
        return self.durable_seq

    @property
    def syncing(self) -> bool:
        """Whether a token is out."""
        return self._syncs.under_way > 0

    def reopen_after_failure(self) -> None:
        """`rewrite` and `adopt` in one; blocks."""
        self.adopt(self.rewrite())

    def rewrite(self) -> Rewritten:
        """Everything that was appended and is not durable, written to a new segment and synced (promise 3). Blocks,
        and may do so on a worker's thread: no sync may be under way, and nothing is called before `adopt`.

        Raises CorruptionError when the page cache has not kept it, JournalFullError, OSError: the writer stays dead.
        """
        room = max(self.segment_bytes, room_for(self.batches_after(self.durable_seq, header_only=True)))
        header = self._header(self.durable_seq, self._durable_crc, self._durable_order_ns)
        spare = self._spares.new(room)
        try:
            return rewrite(self.folder, spare, room, header, self.batches_after(self.durable_seq))
        except BaseException:
            self._spares.drop(spare)
            raise

    def adopt(self, rewritten: Rewritten) -> None:
        """On the loop: the writer goes on in that segment. Raises OSError: the writer stays dead."""
        try:
            storage.rename(rewritten.spare.path, self._path(rewritten.segment.first_seq))
            storage.sync_folder(self.folder)
        except BaseException:
            self._spares.drop(rewritten.spare)
            raise
        self._replace_current(rewritten.segment, rewritten.bytes, rewritten.marks)

    def _replace_current(self, segment: SegmentWriter, size: int, marks: list[Mark]) -> None:
        """The rewritten segment takes the place of all that had bytes which are not durable."""
        old = [s.first_seq for s in self._segments if s.first_seq > segment.first_seq]
        if self._current.first_seq > segment.first_seq:
            old.append(self._current.first_seq)
        while self._segments and self._segments[-1].first_seq >= segment.first_seq:
            self._segments.pop()
        if self._current.first_seq < segment.first_seq:
            self._segments.append(Segment(self._current.first_seq, self._current_bytes))
        for name in old:  # not recycled: what failed once is not used again
            storage.unlink(self._path(name))
        storage.close(self._current.fd)
        self._syncs.abandon()
        self._current, self._current_bytes = segment, size
        self._publisher.moved(self.durable_seq, marks)
        self.durable_seq, self._durable_crc, self._durable_order_ns = self.last_seq, self.last_crc, self.order_ns
        self._failure = self._sync_failure = None

    def publish(self, seq: int) -> None:
        """Readers may take everything up to `seq`, or up to what is durable if that is less. Raises OSError.

        The batches found at the start become visible together, with the first call that reaches their end.
        """
        self._publisher.publish(min(seq, self.durable_seq))

    def batches_after(self, seq: int, header_only: bool = False) -> Iterator[Batch]:
        """Every batch behind `seq` that was appended, published or not: what a start writes onto the primaries.

        Raises HoleError, ForkedError (no batch ends at `seq`), CorruptionError.
        """
        newest = DurablePosition(
            0, self.last_seq, self.order_ns, self._current.first_seq, self._current.end, self._identity.epoch,
            self._identity.group_id, self.last_crc,
        )  # fmt: skip
        return batches_between(self.folder, seq, newest, header_only)

    # --- space

    def prepare(self) -> Callable[[], None] | None:
        """Work for a worker, if there is any: the next segment's file, freed ones to recycle or remove. What it raises
        (OSError, JournalFullError) is for the log: a roll that finds no file tries itself."""
        return self._spares.job(self.live_bytes)

    def release(self) -> None:
        """Frees the segments that every consumer is past; reads a small file for each. Raises CorruptionError."""
        positions = consumers.positions(self.folder)
        self._free(min([*positions.values(), self._publisher.published_seq]))

    def _free(self, needed: int, keep: int = 0) -> None:
        """Frees the segments that end at or before `needed`, but for the newest `keep`."""
        while len(self._segments) > keep:
            follower = self._segments[1].first_seq if len(self._segments) > 1 else self._current.first_seq
            if follower - 1 > needed:
                break
            self._spares.give(self._path(self._segments[0].first_seq))
            self._segments.popleft()

    def close(self) -> None:
        """Closes the files; syncs nothing. No sync may be under way."""
        self._spares.close()
        self._syncs.abandon()
        self._publisher.close()
        for fd in (self._current.fd, self._lock):
            storage.close(fd)

    def _dead(self) -> OSError:
        number = getattr(self._failure, "errno", None) or 5
        return OSError(number, f"The journal {self.folder} failed and takes nothing more: {self._failure}")
