"""A volume whose primary is behind NBD: its writes under way, and what happens when the upstream is away.

While it is away the volume is `stopped`: new writes are refused, those that were journaled wait. When it is back it
gets the journal's tail since the checkpoint before anything else, because nobody knows what it kept.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cdp.collector.primary_nbd import NbdPrimary, Operation
from cdp.collector.volume import UNREACHABLE, Volume
from cdp.errors import StorageError
from cdp.journal import batch
from cdp.nbd import wire

if TYPE_CHECKING:
    from cdp.collector.group import Group

log = logging.getLogger(__name__)


class Upstream:
    """Owned by the loop's thread."""

    def __init__(self, group: Group, volume: Volume, primary: NbdPrimary) -> None:
        self._group, self._volume, self._primary = group, volume, primary
        primary.on_lost = self._lost
        primary.on_back = self._back
        self._away = self._resent = self._resending = False
        self._unreadable: BaseException | None = None  # why the tail was not sent whole

    def write(
        self, batch_seq: int, seq: int, offset: int, length: int, data: bytes | None, punch: bool,
        answer: Callable[[OSError | None], None],
    ) -> None:  # fmt: skip
        """A journaled write (`data` None: zeros) of the batch that begins at `batch_seq`."""
        group, volume = self._group, self._volume
        group.pending[batch_seq] = group.pending.get(batch_seq, 0) + 1
        self._touch(offset, length)

        def done(_: object, error: BaseException | None) -> None:
            if error is not None:
                group.refused(volume, offset, length, seq)
            group.pending[batch_seq] -= 1
            if not group.pending[batch_seq]:
                del group.pending[batch_seq]
            volume.dirty = True
            group.settle()
            answer(_as_os_error(error))

        self._primary.write_later(offset, length, data, punch, done)

    def write_untracked(
        self, offset: int, length: int, data: bytes | None, punch: bool, answer: Callable[[OSError | None], None]
    ) -> None:
        """A write that is not journaled: nothing waits for it but its client."""
        self._touch(offset, length)

        def done(_: object, error: BaseException | None) -> None:
            answer(_as_os_error(error))

        self._primary.write_later(offset, length, data, punch, done)

    def _touch(self, offset: int, length: int) -> None:
        for watch in self._volume.watches:
            if offset < watch.end and watch.start < offset + length:
                watch.touched = True

    def _lost(self, error: BaseException) -> None:
        volume = self._volume
        log.error("volume %s: its upstream is away", volume.name)
        self._away, self._resent, self._resending = True, False, False
        volume.sync_failed = True  # until the tail is there again
        volume.refuse = errno.EIO
        volume.reason = {"code": UNREACHABLE, "text": f"The upstream {self._primary.address} cannot be reached."}

    def heal(self) -> None:
        """A sync of it failed although it is there: it gets the tail again, and what is queued waits for that."""
        if self._primary.connected and not self._resending:
            self._resend()

    def _resend(self) -> None:
        self._resent = self._resending = True
        self._unreadable = None
        self._primary.go_first(self._tail())

    def _back(self) -> None:
        """First call: it is connected again. Second: it has the tail."""
        volume, group = self._volume, self._group
        if not self._resent:
            return self._resend()
        self._resending = False
        if self._unreadable is not None:
            text = f"What the upstream of {volume.name} must be sent again cannot be read: {self._unreadable}."
            group.said.add(("tail", volume.id), logging.ERROR, "%s", text)
            self._away, self._resent = True, False
            volume.refuse, volume.reason = errno.EIO, {"code": UNREACHABLE, "text": text}
            return self._primary.hold()
        volume.sync_failed, volume.dirty = False, True
        if self._away:
            log.warning("volume %s: its upstream is back", volume.name)
            volume.refuse, volume.reason = 0, None
        self._away = False
        group.flusher.want_checkpoint()
        group.settle()

    def _tail(self) -> Iterator[list[Operation]]:
        """What this volume's primary was to take since the checkpoint, a batch at a time."""
        group, volume = self._group, self._volume
        if group.tracking.noted:
            return  # it may have what the journal never saw, which is newer
        try:
            for found in group.journal.batches_after(group.checkpoint_seq):
                yield [
                    self._operation(r) for r in found.records()
                    if r.volume == volume.id and r.kind in (batch.WRITE, batch.ZERO, batch.SYNC)
                ]  # fmt: skip
        except (OSError, StorageError) as e:
            self._unreadable = e

    def _operation(self, record: batch.Record) -> Operation:
        zeros = record.kind == batch.ZERO or bool(record.flags & batch.ZEROS)
        kind = wire.WRITE_ZEROES if zeros else wire.WRITE
        data = None if zeros else bytes(record.data)
        punch = bool(record.flags & batch.PUNCH)
        offset, length, seq = record.offset, record.length, record.seq

        def done(_: object, error: BaseException | None) -> None:
            if error is not None:
                self._group.refused(self._volume, offset, length, seq)

        return Operation(kind, offset, length, data, punch, done)


def _as_os_error(error: BaseException | None) -> OSError | None:
    return None if error is None else OSError(getattr(error, "errno", None) or errno.EIO, str(error))
