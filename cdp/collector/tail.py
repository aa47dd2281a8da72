"""The journal's tail written onto the primaries once more: after a kill, after a failed sync, after an outage.

A collector that was killed left a journal at least as new as its primaries (promise 2), so writing everything since
the checkpoint again, in order, makes them equal. What a primary refuses is told, not raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from cdp.collector.volume import Reason, Volume
from cdp.journal import batch
from cdp.journal.batch import Batch, Record

Refusal = Callable[[Volume, int, int, int], None]  # volume, offset, length, seq


class TailWriter:
    """Writes batches onto primaries, and notes what else they say. One for one walk over the tail."""

    def __init__(self, volumes: Mapping[int, Volume], refused: Refusal) -> None:
        """`volumes` by their number: those that are to be written; the others' records are passed over."""
        self._volumes, self._refused = volumes, refused
        self.bookmarks: list[str] = []
        self.open_gaps: dict[int, Reason] = {}  # volumes whose last GAP is open
        self.rollbacks: list[Record] = []  # BEGIN and END; their data is kept

    def apply(self, found: Batch) -> None:
        """Raises CorruptionError for a record outside its volume."""
        for record in found.records():
            if record.kind in (batch.WRITE, batch.ZERO, batch.SYNC):
                volume = self._volumes.get(record.volume)
                if volume is not None:
                    self._write(volume, record)
            elif record.kind == batch.BOOKMARK:
                self.bookmarks.append(bytes(record.data).decode())
            elif record.kind in (batch.ROLLBACK_BEGIN, batch.ROLLBACK_END):
                self.rollbacks.append(record._replace(data=memoryview(bytes(record.data))))
            elif record.kind == batch.GAP:
                if record.flags & batch.OPEN:
                    self.open_gaps[record.volume] = json.loads(bytes(record.data))
                else:
                    self.open_gaps.pop(record.volume, None)

    def _write(self, volume: Volume, record: Record) -> None:
        length = min(record.length, volume.size - record.offset)
        if length <= 0:
            return  # the volume is smaller than it was
        volume.dirty = True
        try:
            if record.kind == batch.ZERO or record.flags & batch.ZEROS:
                punch = record.kind == batch.SYNC or bool(record.flags & batch.PUNCH)
                volume.primary.zero(record.offset, length, punch)
            else:
                volume.primary.write(record.offset, record.data[:length])
        except OSError:
            self._refused(volume, record.offset, length, record.seq)
