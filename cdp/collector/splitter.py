"""The export of a volume: every write goes to the journal first, then to the primary (promises 1, 2 and 3).

This is the hot path. All writes that one receive brought become ONE journal append, then one `pwrite` each in
journal order, then one answer for all of them. What is rare (zeroes, flushes, large and refused writes, upstream
primaries) leaves that path as early as it can be told apart.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cdp import storage
from cdp.collector.intent import NoIntent
from cdp.collector.reads import ReadPool
from cdp.collector.replies import reply
from cdp.collector.tracking import JOURNAL_FULL
from cdp.errors import JournalFullError, StorageError
from cdp.journal import batch
from cdp.nbd import wire
from cdp.nbd.contract import Export, Request

if TYPE_CHECKING:
    from cdp.collector.group import Group
    from cdp.collector.intent import Region
    from cdp.collector.volume import Volume
    from cdp.nbd.connection import Connection

# A WRITE record carries at most this much, so that a message of any carrier can hold it.
PIECE_BYTES = 1 << 20
# What one batch may hold, with room for what is still added to it.
_BATCH_BYTES = batch.MAX_DATA_BYTES - PIECE_BYTES
# Bytes of READs that may be answered in the loop in one receive; more is read by the pool.
_INLINE_READ_BYTES = 1 << 20
# So many reads in a row that were not cached say that the next will not be either; every so many is tried again.
_COLD_ROW, _COLD_PROBE = 32, 16
# Copies of writes that wait for their regions' bits; over it the loop itself waits for the sync.
_DEFERRED_BYTES = 64 << 20
_CHANGES = (wire.WRITE, wire.TRIM, wire.WRITE_ZEROES)


class Splitter(Export):
    """For all connections of a volume."""

    multi_conn = True  # one loop, one primary: a FLUSH covers what any connection was answered
    contexts = (wire.BASE_ALLOCATION,)

    def __init__(self, volume: Volume, group: Group, reads: ReadPool) -> None:
        self.size = volume.size
        self.can_zero_fast = volume.primary.can_zero
        # Else the loop would write zeros, as many as one request names: clients write them, in bounded pieces.
        self.can_zero = volume.primary.can_zero or not volume.primary.inline
        self._volume, self._group, self._reads = volume, group, reads
        self._id, self._primary = volume.id, volume.primary
        self._fd = volume.primary.fd
        self._inline = volume.primary.inline
        self._misses = 0  # reads since the last that was cached
        # A mirror sink has no content to compare: one region of it, always set.
        self._intent = volume.intent or NoIntent()
        self._deferred_bytes = 0
        self._batch_bytes = min(_BATCH_BYTES, group.journal.segment_bytes // 2)

    def opened(self, connection: Connection) -> None:
        self._volume.connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._volume.connections.discard(connection)

    def submit(self, connection: Connection, requests: list[Request]) -> None:
        pack, volume, fd = batch.DESCRIPTOR.pack, self._id, self._fd
        writes: list[Request] = []
        descriptors: list[bytes] = []
        data_bytes = 0
        plain, batch_bytes = self._inline, self._batch_bytes
        marks, shift, turn = self._intent.marks, self._intent.shift, self._intent.turn
        clean = False  # whether a region may have to be set first
        for request in requests:
            command, flags, cookie, offset, length, _ = request
            if command == 1:  # wire.WRITE
                if data_bytes + length > batch_bytes:
                    self._commit(connection, writes, descriptors, data_bytes, plain, clean)
                    writes, descriptors, data_bytes = [], [], 0
                data_bytes += length
                writes.append(request)
                region = offset >> shift
                if marks[region] and (offset + length - 1) >> shift == region:
                    marks[region] = turn
                else:
                    clean = True
                if length <= PIECE_BYTES and not flags:
                    descriptors.append(pack(1, 0, volume, length, offset, length))  # batch.WRITE
                else:
                    plain = False
                    descriptors.append(_describe_write(volume, flags, offset, length))
            elif command == 0:  # wire.READ
                if length > _INLINE_READ_BYTES or fd < 0 or self._is_cold():
                    self._reads.submit(connection, self._volume, cookie, offset, length)
                    continue
                view = connection.slot(cookie, offset, length)
                try:
                    if storage.preadv(fd, [view], offset, storage.RWF_NOWAIT) == length:
                        self._misses = 0
                        continue
                except OSError:
                    pass  # not cached, or an error that the pool will meet again
                connection.unslot()
                self._reads.submit(connection, self._volume, cookie, offset, length)
            elif command == wire.BLOCK_STATUS:
                self._block_status(connection, flags, cookie, offset, length)
            elif command == wire.CACHE:
                self._reads.warm(connection, self._volume, cookie, offset, length)
            elif command == wire.TRIM and not self._primary.can_zero:
                connection.done(cookie)
            else:
                plain = False
                clean = clean or command != 3  # wire.FLUSH
                writes.append(request)
                descriptors.append(_describe_other(volume, command, flags, offset, length))
        if writes:
            self._commit(connection, writes, descriptors, data_bytes, plain, clean)

    def _is_cold(self) -> bool:
        """After a row of reads that were not cached the next ones go to the pool at once, but for a probe at times:
        a vain try costs a system call, and with it the interpreter lock while the pool's threads want it."""
        self._misses += 1
        return self._misses > _COLD_ROW and self._misses % _COLD_PROBE != 0

    def _commit(
        self, connection: Connection, writes: list[Request], descriptors: list[bytes], data_bytes: int, plain: bool,
        clean: bool,
    ) -> None:  # fmt: skip
        """Journal, primary, answers for what one receive brought."""
        if not writes:
            return
        group, volume = self._group, self._volume
        if clean and (missing := self._missing(writes)):
            return self._defer(connection, writes, descriptors, data_bytes, plain, missing)
        if volume.refuse or group.refuse:
            return self._refuse(connection, writes, volume.refuse or group.refuse)
        if writes[0][0] == wire.FLUSH:
            group.flusher.flush_comes(volume)
        try:
            first_seq = group.journal.append(b"".join(descriptors), [w[5] for w in writes if w[5]], data_bytes)
        except (OSError, StorageError) as e:
            return self._refuse(connection, writes, self._not_journaled(e))
        volume.dirty = True
        if volume.lock is None:  # what a rollback copies is nothing that its own VERIFY should make way for
            group.active = True
        group.dirty_bytes += data_bytes
        try:
            self._execute(connection, writes, first_seq, plain)
        except BaseException:  # out of memory, or a bug: journaled, and nobody knows what the primary took of it
            self._doubt(writes, first_seq)
            raise

    def _missing(self, writes: list[Request]) -> list[Region]:
        return self._intent.missing((w[3], w[4]) for w in writes if w[0] != wire.FLUSH)

    def _defer(
        self, connection: Connection, writes: list[Request], descriptors: list[bytes], data_bytes: int, plain: bool,
        missing: list[Region],
    ) -> None:  # fmt: skip
        """The same once these regions are durably set in the intent map (promise 2). Nothing of it is answered yet, so
        what comes meanwhile may go first."""
        if self._deferred_bytes + data_bytes > _DEFERRED_BYTES:
            try:
                self._intent.want_now(missing)
            except OSError as e:
                return self._intent_failed(connection, writes, e)
            return self._commit(connection, writes, descriptors, data_bytes, plain, True)
        kept = [(c, f, cookie, o, n, None if data is None else memoryview(bytes(data)))
                for c, f, cookie, o, n, data in writes]  # fmt: skip
        self._deferred_bytes += data_bytes

        def are_set(error: BaseException | None) -> None:
            self._deferred_bytes -= data_bytes
            if connection not in self._volume.connections:
                return  # nobody waits for it, and a rollback may hold the volume by now
            if error is not None:
                return self._intent_failed(connection, kept, error)
            self._commit(connection, kept, descriptors, data_bytes, plain, True)

        self._intent.want(missing, are_set)

    def _intent_failed(self, connection: Connection, writes: list[Request], error: BaseException) -> None:
        text = "volume %s: writes are refused, because the write-intent map cannot be written: %s"
        self._group.said.add(("intent", self._volume.id), logging.ERROR, text, self._volume.name, error)
        for request in writes:
            connection.fail(request[2], getattr(error, "errno", None) or errno.EIO)
    def _not_journaled(self, error: OSError | StorageError) -> int:
        """What a failed append means for the group; the errno for clients."""
        group, volume = self._group, self._volume
        if isinstance(error, JournalFullError):
            group.stop(JOURNAL_FULL, str(error), errno.ENOSPC)
            return errno.ENOSPC
        if isinstance(error, OSError):
            group.journal_died(error)
        else:  # a request that no segment can hold
            group.said.add(("too large", volume.id), logging.ERROR, "volume %s: %s", volume.name, error)
        return errno.EIO

    def _execute(self, connection: Connection, writes: list[Request], first_seq: int, plain: bool) -> None:
        """What is in the journal, onto the primary, and the answers."""
        if not plain:
            (self._apply if self._inline else self._enqueue)(connection, writes, first_seq)
            return
        pwrite, fd, written = storage.pwrite, self._fd, 0
        if fd >= 0:
            try:
                for _, _, _, offset, length, data in writes:
                    if pwrite(fd, data, offset) != length:  # type: ignore[arg-type]
                        break
                    written += 1
            except OSError:
                pass  # met again, and dealt with, below
            if written < len(writes):
                connection.done_many([w[2] for w in writes[:written]])
                return self._apply(connection, writes[written:], first_seq + written)
        connection.done_many([w[2] for w in writes])

    def _doubt(self, writes: list[Request], seq: int) -> None:
        """All of these are read back from the primary, as if it had refused them."""
        for request in writes:
            if request[0] != wire.FLUSH:
                self._group.refused(self._volume, request[3], request[4], seq)
            seq += _records(request)
        self._group.settle()

    def _apply(self, connection: Connection, writes: list[Request], seq: int) -> None:
        """One request after the other onto an inline primary, whatever they are."""
        primary, group = self._primary, self._group
        answered = []
        for request in writes:
            command, flags, cookie, offset, length, data = request
            try:
                if data is not None:
                    primary.write(offset, data)
                elif command != wire.FLUSH:
                    primary.zero(offset, length, not flags & wire.NO_HOLE)
            except OSError as e:
                connection.fail(cookie, e.errno or errno.EIO)
                group.refused(self._volume, offset, length, seq)
            else:
                if command == wire.FLUSH or flags & wire.FUA:
                    group.flusher.wait_flush(self._volume, partial(reply, connection, cookie))
                else:
                    answered.append(cookie)
            seq += _records(request)
        if answered:
            connection.done_many(answered)
        group.settle()
        group.flusher.kick()

    def _enqueue(self, connection: Connection, writes: list[Request], seq: int) -> None:
        """The same for a primary that answers later: its queue keeps the order, copies keep the data."""
        group, volume, batch_seq = self._group, self._volume, seq
        upstream = volume.upstream
        assert upstream is not None
        for request in writes:
            command, flags, cookie, offset, length, data = request
            if command == wire.FLUSH:
                group.flusher.wait_flush(volume, partial(reply, connection, cookie))
            else:
                upstream.write(
                    batch_seq, seq, offset, length, None if data is None else bytes(data),
                    not flags & wire.NO_HOLE, self._answer_of(connection, cookie, flags),
                )  # fmt: skip
            seq += _records(request)
        group.flusher.kick()

    def _answer_of(self, connection: Connection, cookie: bytes, flags: int) -> Callable[[OSError | None], None]:
        answer = partial(reply, connection, cookie)
        return self._group.flusher.behind_write(self._volume, answer) if flags & wire.FUA else answer

    def _refuse(self, connection: Connection, writes: list[Request], number: int) -> None:
        """Nothing was journaled: where that is being tracked it goes on, else changes fail, and a FLUSH has only what
        was answered before to make durable."""
        if self._group.tracking.takes(self._volume):
            return self._group.tracking.write(self._volume, connection, writes)
        for command, _, cookie, _, _, _ in writes:
            if command in _CHANGES or self._group.journal_dead:
                connection.fail(cookie, number)
            else:
                self._group.flusher.wait_flush(self._volume, partial(reply, connection, cookie))
        self._group.flusher.kick()

    def _block_status(self, connection: Connection, flags: int, cookie: bytes, offset: int, length: int) -> None:
        found = []
        for stretch, data in self._primary.extents(offset, offset + length):
            found.append((stretch, 0 if data else wire.STATE_HOLE | wire.STATE_ZERO))
            if flags & wire.REQ_ONE:
                break
        connection.extents(cookie, wire.BASE_ALLOCATION, found)


def _records(request: Request) -> int:
    """How many records a request became."""
    return 1 if request[5] is None else -(-request[4] // PIECE_BYTES)


def _describe_write(volume: int, flags: int, offset: int, length: int) -> bytes:
    """One WRITE, or pieces of at most PIECE_BYTES, all but the last CONTINUED."""
    fua = batch.FUA if flags & wire.FUA else 0
    pieces = []
    for at in range(0, length, PIECE_BYTES):
        size = min(PIECE_BYTES, length - at)
        more = fua if at + size == length else batch.CONTINUED
        pieces.append(batch.DESCRIPTOR.pack(batch.WRITE, more, volume, size, offset + at, size))
    return b"".join(pieces)


def _describe_other(volume: int, command: int, flags: int, offset: int, length: int) -> bytes:
    if command == wire.FLUSH:
        return batch.DESCRIPTOR.pack(batch.BARRIER, 0, volume, 0, 0, 0)
    marks = batch.FUA if flags & wire.FUA else 0
    if command == wire.TRIM or not flags & wire.NO_HOLE:
        marks |= batch.PUNCH
    return batch.DESCRIPTOR.pack(batch.ZERO, marks, volume, 0, offset, length)
