"""The durable position: up to which batch readers may read. A file of two slots, written in turn.

Each slot is a sector of its own with its own checksum, so a torn write costs one slot and the other one stands.
The file is never synced: it may fall behind in a power cut, and is never ahead of what is durable in the segments,
because it is written only after they were synced.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from crc32c import crc32c

from cdp import storage
from cdp.journal.batch import CRC

MAGIC = b"CDPD"
VERSION = 1
SLOT_BYTES = 512
_STRUCT = struct.Struct("<4sIQQQQQQ16sI")
_LENGTH = _STRUCT.size + CRC.size


class DurablePosition(NamedTuple):
    """The last batch that readers may take."""

    generation: int  # counts the writes of this file
    seq: int  # its last seq
    order_ns: int  # order time of that record
    segment: int  # first seq of the segment it is in
    end: int  # offset behind it in that segment
    epoch: int  # of the writer that published it
    group_id: bytes
    crc: int  # its checksum


def encode_slot(magic: bytes, position: DurablePosition) -> bytes:
    head = _STRUCT.pack(magic, VERSION, *position)
    return head + CRC.pack(crc32c(head))


def decode_slot(magic: bytes, raw: bytes) -> DurablePosition | None:
    """None for bytes that are no whole slot."""
    if len(raw) < _LENGTH or crc32c(raw[: _STRUCT.size]) != CRC.unpack_from(raw, _STRUCT.size)[0]:
        return None
    found, version, *fields = _STRUCT.unpack_from(raw)
    return DurablePosition(*fields) if (found, version) == (magic, VERSION) else None


class DurableFile:
    """The file `durable` of a journal folder: the writer's side writes, readers poll it."""

    def __init__(self, folder: str, writable: bool) -> None:
        """Raises FileNotFoundError for a reader where there is no journal yet."""
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._fd = storage.open_file(f"{folder}/durable", flags)
        if writable and storage.fstat(self._fd).st_size < 2 * SLOT_BYTES:
            # Its block is there from the start: a disk that is full later must not keep readers back.
            storage.pwrite(self._fd, bytes(2 * SLOT_BYTES), 0)

    def read(self) -> DurablePosition | None:
        """The newest whole slot; None if nothing was ever published (or both slots are damaged)."""
        raw = storage.pread(self._fd, 2 * SLOT_BYTES, 0)
        slots = [decode_slot(MAGIC, raw[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
        return max((slot for slot in slots if slot is not None), default=None)

    def write(self, position: DurablePosition) -> None:
        """One pwrite, to the slot that the write before did not use. Raises OSError."""
        slot = encode_slot(MAGIC, position)
        storage.pwrite(self._fd, slot, position.generation % 2 * SLOT_BYTES)

    def close(self) -> None:
        storage.close(self._fd)


def read_durable(folder: str) -> DurablePosition | None:
    """What `durable` says; None if there is no such file or nothing in it."""
    try:
        file = DurableFile(folder, writable=False)
    except FileNotFoundError:
        return None
    try:
        return file.read()
    finally:
        file.close()
