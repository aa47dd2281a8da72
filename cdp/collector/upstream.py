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
        self._resent = False

    def write(
        self, batch_seq: int, seq: int, offset: int, length: int, data: bytes | None, punch: bool,
        answer: Callable[[OSError | None], None],
    ) -> None:  # fmt: skip
        """A journaled write (`data` None: zeros) of the batch that begins at `batch_seq`."""
        group, volume = self._group, self._volume
        group.pending[batch_seq] = group.pending.get(batch_seq, 0) + 1
        for watch in volume.watches:
            if offset < watch.end and watch.start < offset + length:
                watch.touched = True

        def done(_: object, error: BaseException | None) -> None:
            if error is not None:
                group.refused(volume, offset, length, seq)
            group.pending[batch_seq] -= 1
            if not group.pending[batch_seq]:
                del group.pending[batch_seq]
            volume.dirty = True
            group.settle()
            answer(OSError(getattr(error, "errno", None) or errno.EIO, str(error)) if error is not None else None)

        self._primary.write_later(offset, length, data, punch, done)

    def _lost(self, error: BaseException) -> None:
        volume = self._volume
        log.error("volume %s: its upstream is away", volume.name)
        self._resent = False
        volume.sync_failed = True  # until the tail is there again
        volume.refuse = errno.EIO
        volume.reason = {"code": UNREACHABLE, "text": f"The upstream {self._primary.address} cannot be reached."}

    def _back(self) -> None:
        """First call: it is connected again. Second: it has the tail."""
        volume = self._volume
        if not self._resent:
            self._resent = True
            self._primary.go_first(self._tail())
            return
        log.warning("volume %s: its upstream is back", volume.name)
        volume.sync_failed, volume.dirty = False, True
        volume.refuse, volume.reason = 0, None
        self._group.settle()

    def _tail(self) -> Iterator[list[Operation]]:
        """What this volume's primary was to take since the checkpoint, a batch at a time."""
        group, volume = self._group, self._volume
        try:
            for found in group.journal.batches_after(group.checkpoint_seq):
                yield [
                    self._operation(r) for r in found.records()
                    if r.volume == volume.id and r.kind in (batch.WRITE, batch.ZERO, batch.SYNC)
                ]  # fmt: skip
        except (OSError, StorageError) as e:
            group.stop("journal_failed", f"The journal's tail cannot be read: {e}.")

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
