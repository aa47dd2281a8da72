"""Which files of a journal have bytes that are not durable yet, and the syncs under way over them."""

from __future__ import annotations

from typing import NamedTuple

from cdp import storage


class SyncToken(NamedTuple):
    """What one sync makes durable: everything up to the batch that ends at `seq`."""

    seq: int
    crc: int  # checksum of that batch
    order_ns: int  # order time of that record
    fds: tuple[int, ...]
    folder: str | None  # to be synced too: a segment got its name since the last sync

    @property
    def only_fd(self) -> int | None:
        """The descriptor whose fdatasync is all there is to do, if it is."""
        return self.fds[0] if len(self.fds) == 1 and self.folder is None else None


class Syncs:
    """Descriptors of ended segments, kept until what is in them is durable and no sync uses them any more."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._folder_dirty = False
        self._dirty: list[int] = []
        self._synced: list[int] = []
        self.under_way = 0

    def renamed(self) -> None:
        """A file of the folder got another name."""
        self._folder_dirty = True

    def ended(self, fd: int) -> None:
        """A segment is full; what is in it is not synced yet."""
        self._dirty.append(fd)

    def begin(self, seq: int, crc: int, order_ns: int, fd: int) -> SyncToken:
        """`fd` is the segment that is being written."""
        self.under_way += 1
        folder = self._folder if self._folder_dirty else None
        self._folder_dirty = False
        return SyncToken(seq, crc, order_ns, (*self._dirty, fd), folder)

    def run(self, token: SyncToken) -> None:
        """The only part that a worker's thread runs. Raises OSError."""
        for fd in token.fds:
            storage.fdatasync(fd)
        if token.folder is not None:
            storage.sync_folder(token.folder)

    def finish(self, token: SyncToken) -> None:
        """Back on the loop."""
        self.under_way -= 1
        self._synced += [fd for fd in self._dirty if fd in token.fds]
        self._dirty = [fd for fd in self._dirty if fd not in token.fds]
        if self.under_way == 0:
            self._close(self._synced)

    def abandon(self) -> None:
        """Nothing of the earlier segments is needed any more. No sync may be under way."""
        self._close(self._dirty)
        self._close(self._synced)

    def _close(self, fds: list[int]) -> None:
        for fd in fds:
            storage.close(fd)
        fds.clear()
