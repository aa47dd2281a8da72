"""The write-intent map on disk: one file a volume, two slots written in turn, each with a checksum over all of it.

A slot is a header and one bit a region, most significant first::

    0   magic       4s   b"CDPI"
    4   version     u32  1
    8   generation  u64  counts the writes of this file: the higher of two whole slots is the newer
    16  size        u64  of the volume, in bytes
    24  shift       u32  a region is 1 << shift bytes
    28  regions     u32
    32  bits        (regions + 7) // 8 bytes
        crc         u32  CRC-32C of all before it

A write that a power cut tears costs the slot it went to; the other one lacks only bits whose writes have not begun,
because a bit is used when its sync has returned.
"""

from __future__ import annotations

import os
import struct

from crc32c import crc32c

from cdp import storage

MAGIC, VERSION = b"CDPI", 1
_HEAD = struct.Struct("<4sIQQII")
_CRC = struct.Struct("<I")
# At most so many bits: 2 KiB that one sync writes, and a random storm sets all of them in a second.
MAX_REGIONS = 16 << 10
# Smaller regions would cost small volumes more syncs, and save them milliseconds after a power cut.
MIN_SHIFT = 20
SLOT_BYTES = 4096
_TO_DIGITS = b"0" + b"1" * 255


def shift_of(size: int) -> int:
    """The exponent of a region's size for a volume of `size` bytes."""
    shift = MIN_SHIFT
    while size > MAX_REGIONS << shift:
        shift += 1
    return shift


def regions_of(size: int, shift: int) -> int:
    return -(-size >> shift)


class IntentFile:
    """The file of one volume. `bits`: a byte a region, 0 or 1, as of the last whole slot; `known` False: there was none
    for a volume of this size, so nobody knows what was written, and all are set."""

    def __init__(self, path: str, size: int, is_new: bool) -> None:
        """Made if missing, durably; `is_new`: the volume is, so nothing of it was written. Raises OSError."""
        self._size, self._shift = size, shift_of(size)
        self._regions = regions_of(size, self._shift)
        was_there = storage.exists(path)
        self._fd = storage.open_file(path, os.O_RDWR | os.O_CREAT)
        self._generation = 0
        self.known = False
        self.bits = bytes(self._regions) if is_new else b"\1" * self._regions
        for slot in (0, 1):
            self._read(storage.pread(self._fd, SLOT_BYTES, slot * SLOT_BYTES))
        if not self.known:  # both slots are written, so that later syncs concern nothing but what is in them
            for _ in (0, 1):
                storage.pwrite(self._fd, *self.encode(self.bits))
            storage.fsync(self._fd)
        if not was_there:
            storage.sync_folder(os.path.dirname(path))

    def _read(self, raw: bytes) -> None:
        length = _HEAD.size + (self._regions + 7) // 8
        if len(raw) < length + _CRC.size or crc32c(raw[:length]) != _CRC.unpack_from(raw, length)[0]:
            return
        magic, version, generation, *geometry = _HEAD.unpack_from(raw)
        if (magic, version) != (MAGIC, VERSION) or geometry != [self._size, self._shift, self._regions]:
            return
        if generation > self._generation:
            self._generation = generation
            bits = int.from_bytes(raw[_HEAD.size : length]) >> (-self._regions % 8)
            self.bits = bytes(map(int, format(bits, f"0{self._regions}b")))
            self.known = True

    def encode(self, marks: bytes | bytearray) -> tuple[bytes, int]:
        """A slot of these marks (not 0: set), and where it goes. For the loop: what computes must not be a thread."""
        self._generation += 1
        bits = int(marks.translate(_TO_DIGITS), 2) << (-self._regions % 8)
        head = _HEAD.pack(MAGIC, VERSION, self._generation, self._size, self._shift, self._regions)
        body = head + bits.to_bytes((self._regions + 7) // 8)
        return (body + _CRC.pack(crc32c(body))).ljust(SLOT_BYTES, b"\0"), self._generation % 2 * SLOT_BYTES

    def put(self, slot: tuple[bytes, int]) -> None:
        """What `encode` made, durably; for a worker. Each is synced before the next: it may be torn, and then the other
        slot must be the one before it. Raises OSError."""
        storage.pwrite(self._fd, *slot)
        storage.fdatasync(self._fd)

    def close(self) -> None:
        storage.close(self._fd)
