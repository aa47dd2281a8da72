"""Reads that would block the loop: a small pool of threads that sit in `pread`.

Bounded by the server's own limits: requests and payload bytes that a connection, and the process, may have unanswered.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cdp import storage

if TYPE_CHECKING:
    from cdp.collector.volume import Volume
    from cdp.nbd.connection import Connection

# 32 cold reads at once are seven times as fast as one after another; past a dozen threads little is gained.
READ_THREADS = 32


class ReadPool:
    """Reads of all volumes; answers leave from the loop's thread."""

    def __init__(self) -> None:
        self.worker = storage.Worker(READ_THREADS, "read")

    def submit(self, connection: Connection, volume: Volume, cookie: bytes, offset: int, length: int) -> None:
        """Answers with the bytes, or with the primary's error."""

        def done(payload: bytes | None, error: BaseException | None) -> None:
            volume.cold_reads -= 1
            if payload is None:
                connection.fail(cookie, getattr(error, "errno", None) or errno.EIO)
            else:
                connection.data(cookie, offset, payload)

        primary = volume.primary
        if not primary.readable:
            connection.fail(cookie, errno.EOPNOTSUPP)
            return
        volume.cold_reads += 1
        if primary.inline:
            self.worker.submit(done, primary.read, offset, length)
        else:
            primary.read_later(offset, length, done)

    def warm(self, connection: Connection, volume: Volume, cookie: bytes, offset: int, length: int) -> None:
        """Asks the kernel to read ahead; answered at once where there is nothing to ask."""
        if volume.primary.fd < 0:
            connection.done(cookie)
            return
        self.worker.submit(
            lambda _, error: connection.done(cookie) if error is None else connection.fail(cookie, errno.EIO),
            storage.posix_fadvise, volume.primary.fd, offset, length, os.POSIX_FADV_WILLNEED,
        )  # fmt: skip
