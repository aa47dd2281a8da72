"""The splitter where the journal's carrier limits its messages: every batch fits into one.

A request over 1 MiB is a batch for each of its pieces, in a row: nothing comes between them, all but the last are
CONTINUED, and no point is offered inside. Where the journal ends in the middle (a kill, no space) the pieces that are
there count as what the primary has: they are written to it, now or by the next start, and the request fails.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from cdp.collector.replies import reply
from cdp.collector.splitter import PIECE_BYTES, Splitter
from cdp.errors import StorageError
from cdp.journal import batch
from cdp.nbd import wire

if TYPE_CHECKING:
    from cdp.nbd.connection import Connection
    from cdp.nbd.contract import Request


class CuttingSplitter(Splitter):
    """For all connections of a volume."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._batch_bytes = min(self._batch_bytes, batch.MESSAGE_DATA_BYTES)

    def _commit(
        self, connection: Connection, writes: list[Request], descriptors: list[bytes], data_bytes: int, plain: bool,
        clean: bool,
    ) -> None:  # fmt: skip
        if data_bytes <= batch.MESSAGE_DATA_BYTES and len(writes) <= batch.MESSAGE_RECORDS:
            return super()._commit(connection, writes, descriptors, data_bytes, plain, clean)
        if clean and (missing := self._missing(writes)):
            return self._defer(connection, writes, descriptors, data_bytes, plain, missing)
        at = 0
        while at < len(writes):
            if _is_large(writes[at]):
                self._commit_pieces(connection, writes[at])
                at += 1
                continue
            end = at + 1
            while end < len(writes) and end - at < batch.MESSAGE_RECORDS and not _is_large(writes[end]):
                end += 1
            part = writes[at:end]
            size = sum(request[4] for request in part if request[5] is not None)
            super()._commit(connection, part, descriptors[at:end], size, plain, False)
            at = end

    def _commit_pieces(self, connection: Connection, request: Request) -> None:
        """One WRITE of more than a piece: into the journal piece by piece, then onto the primary, and the answer."""
        group, volume = self._group, self._volume
        if volume.refuse or group.refuse:
            return self._refuse(connection, [request], volume.refuse or group.refuse)
        first_seq, taken, number = self._append_pieces(request)
        if not taken:
            return self._refuse(connection, [request], number)
        if number and group.tracking.takes(volume):  # all of it goes to the primary, and is read from there
            return group.tracking.write(volume, connection, [request])
        volume.dirty = True
        if volume.lock is None:
            group.active = True
        group.dirty_bytes += taken
        command, flags, cookie, offset, _, data = request
        assert data is not None
        torn = (command, flags & ~wire.FUA, cookie, offset, taken, data[:taken])
        try:
            if number:
                self._execute_torn(connection, torn, first_seq, number)
            else:
                self._execute(connection, [request], first_seq, False)
        except BaseException:  # out of memory, or a bug: journaled, and nobody knows what the primary took of it
            self._doubt([torn], first_seq)
            raise

    def _append_pieces(self, request: Request) -> tuple[int, int, int]:
        """(first seq, bytes in the journal, errno of what kept the rest from it)."""
        _, flags, _, offset, length, data = request
        assert data is not None
        first_seq = 0
        for at in range(0, length, PIECE_BYTES):
            size = min(PIECE_BYTES, length - at)
            more = batch.CONTINUED if at + size < length else batch.FUA if flags & wire.FUA else 0
            described = batch.DESCRIPTOR.pack(batch.WRITE, more, self._id, size, offset + at, size)
            try:
                seq = self._group.journal.append(described, [data[at : at + size]], size)
            except (OSError, StorageError) as e:
                return first_seq, at, self._not_journaled(e)
            first_seq = first_seq or seq
        return first_seq, length, 0

    def _execute_torn(self, connection: Connection, torn: Request, seq: int, number: int) -> None:
        """What is in the journal is on the primary too; the client hears that its request failed."""
        group, volume = self._group, self._volume
        _, _, cookie, offset, length, data = torn
        assert data is not None
        failed = OSError(number, "the journal took only a part")
        if volume.upstream is not None:
            answer = partial(_fail, connection, cookie, failed)
            volume.upstream.write(seq, seq, offset, length, bytes(data), False, answer)
        else:
            try:
                self._primary.write(offset, data)
            except OSError:
                group.refused(volume, offset, length, seq)
            reply(connection, cookie, failed)
            group.settle()
        group.flusher.kick()


def _is_large(request: Request) -> bool:
    return request[5] is not None and request[4] > PIECE_BYTES


def _fail(connection: Connection, cookie: bytes, error: OSError, _: OSError | None) -> None:
    reply(connection, cookie, error)
