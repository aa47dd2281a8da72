"""Writing one segment: a write covers whole pages, the unfinished last one is written again in front of the next."""

from __future__ import annotations

import os
from collections.abc import Sequence

from crc32c import crc32c

from cdp import storage
from cdp.journal.batch import HEADER_BYTES
from cdp.journal.segment import FRAME, FRAME_BYTES, SegmentHeader, encode_header
from cdp.journal.spares import disk_full

PAGE_BYTES = storage.PAGE_BYTES
_ZEROS = bytes(PAGE_BYTES)
Buffer = bytes | bytearray | memoryview


class SegmentWriter:
    """The segment that is being written. Its header goes to disk with the first batch, or by `write_header`."""

    def __init__(self, folder: str, fd: int, header: SegmentHeader) -> None:
        self.fd = fd
        self.first_seq = header.first_seq
        self.seed = header.seed
        self.end = PAGE_BYTES  # offset behind the last batch
        self._folder = folder
        self._page = 0  # offset of the unfinished page …
        self._tail: bytes = encode_header(header)  # … and what is in it (before the first batch: the header page)

    def write_header(self) -> None:
        """Writes and syncs the header alone. Raises JournalFullError, OSError."""
        try:
            self._write_all([self._tail], 0)
            storage.fdatasync(self.fd)
        except OSError as e:
            raise disk_full(self._folder, e) from e
        self._page, self._tail = PAGE_BYTES, b""

    def write(self, head: bytes, data: Sequence[Buffer]) -> None:
        """A frame and its batch behind the last one; one pwritev. `head` is the batch's header and descriptors.

        Raises JournalFullError and OSError; the next write then goes to the same place.
        """
        tail = self._tail
        length = len(head) + sum(map(len, data))
        frame = FRAME.pack(length, crc32c(head[:HEADER_BYTES], self.seed))
        total = len(tail) + FRAME_BYTES + length
        rest = total % PAGE_BYTES
        pieces = [tail, frame, head, *data, _ZEROS[rest:] if rest else b""]
        try:
            written = storage.pwritev(self.fd, pieces, self._page)
            if written < total:
                self._write_all(pieces, written)
        except OSError as e:
            raise disk_full(self._folder, e) from e
        last = data[-1] if data else head
        # The bytes of the unfinished page: nearly always the end of the last piece.
        self._tail = bytes(last[len(last) - rest :]) if len(last) >= rest else b"".join(pieces[:-1])[total - rest :]
        self._page += total - rest
        self.end = self._page + rest

    def _write_all(self, pieces: Sequence[Buffer], written: int) -> None:
        """The rest of a write that came up short."""
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            count = storage.pwrite(self.fd, rest, self._page + written)
            written += count
            rest = rest[count:]


def cut(path: str, end: int) -> int:
    """Gives back what lies behind a segment's end. Its size then."""
    fd = storage.open_file(path, os.O_RDWR)
    try:
        size = min(storage.device_bytes(fd), end + -end % PAGE_BYTES)
        storage.ftruncate(fd, size)
    finally:
        storage.close(fd)
    return size


