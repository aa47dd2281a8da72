"""VERIFY records: digests of the primary's regions, each taken between two writes, for the replica to compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cdp import storage
from cdp.collector.sweep import Region, Sweep
from cdp.errors import CdpError, StorageError
from cdp.journal import batch

if TYPE_CHECKING:
    from cdp.collector.group import Group
    from cdp.collector.volume import Volume


class Verify:
    """One pass. `done(result, error)` is called when its records are durable; readers see them within 50 ms."""

    def __init__(
        self,
        group: Group,
        volume: Volume,
        worker: storage.Worker,
        regions: Iterable[Region],
        done: Callable[[dict[str, Any] | None, CdpError | None], None],
    ) -> None:
        self._group, self._volume, self._done = group, volume, done
        self._first_seq = self._last_seq = 0
        self._bytes = 0
        self._sweep = Sweep(group, volume, worker, regions, self._data, self._hole, self._swept)

    def start(self) -> None:
        self._sweep.start()

    def cancel(self) -> None:
        self._sweep.cancel()

    def _data(self, offset: int, content: bytes) -> bool:
        return self._append(0, offset, len(content), hashlib.sha256(content).digest())

    def _hole(self, offset: int, length: int) -> bool:
        return self._append(batch.ZEROS, offset, length, b"")

    def _append(self, flags: int, offset: int, length: int, digest: bytes) -> bool:
        try:
            seq = self._group.append([(batch.VERIFY, flags, self._volume.id, offset, length, digest)])
        except StorageError:
            return False
        self._first_seq = self._first_seq or seq
        self._last_seq = seq
        self._bytes += length
        return True

    def _swept(self, error: StorageError | None) -> None:
        if error is not None:
            return self._done(None, error)
        self._group.flusher.wait(None, self._durable)
        self._group.flusher.kick()

    def _durable(self, error: OSError | None) -> None:
        if error is not None:
            return self._done(None, StorageError(f"The journal of {self._group.name} could not be synced."))
        self._done(
            {
                "volume": self._volume.name,
                "first_seq": self._first_seq,
                "last_seq": self._last_seq,
                "bytes": self._bytes,
            },
            None,
        )
