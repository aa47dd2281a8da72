"""The bytes of the undo log.

Little-endian. A segment file is a header page and bundles behind one another; a closed segment ends with its codes
and seqs together. A bundle is the unit of append and sync::

    segment, page 0
      0     opening   magic "CDPU", version, salt, ordinal, first seq, where the segment before ended, incarnations; crc
      512   closing   magic "CDPE" … (written when the segment is full, its own sector); crc
      1024  incarnations, 24 bytes each (epoch u64, id 16s), newest last; covered by the opening's crc
    bundle
      header  96 bytes, magic "CDPH"; its crc; the crc of the header before it (of the opening, for the first)
      meta    zstd: headers of the batches, all their descriptors, data of the records that describe (not payload)
      table   26 bytes for each entry: code u64, seq u64, offset in this file u32, checksum u32, length u16
      blobs   what the entries point to
    tail (closed)  codes u64 × entries, seqs u64 × entries

The bundle's body crc covers meta and table. A blob's checksum is CRC-32C of its stored bytes, xor a mix of code, seq
and the segment's random salt: what stands at the right place but belongs to another block, another seq or an
earlier life of a recycled file does not pass.

A code names what an entry covers: volume << 48 | run << 47 | block. Without the run bit it is one block, with it the
16 blocks from an aligned one. Length of one block: 0 zeros, 4096 raw, else zstd. Of a run: RUN_ZERO, RUN_RAW or
RUN_MIXED; a run's blob is 16 × u16 lengths, 16 × u32 CRC-32C, then the 16 stored blocks; its checksum covers those
first 96 bytes, and they the blocks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from cdp.journal.batch import DESCRIPTOR_BYTES
from cdp.journal.batch import HEADER_BYTES as BATCH_HEADER_BYTES

BLOCK_BYTES = 4096
PAGE_BYTES = 4096
RUN_BLOCKS = 16
RUN_BIT = 1 << 47
BLOCK_MASK = RUN_BIT - 1
VOLUME_SHIFT = 48
VERSION = 1

SEGMENT_MAGIC, CLOSING_MAGIC, BUNDLE_MAGIC = b"CDPU", b"CDPE", b"CDPH"
OPENING = struct.Struct("<4sHHQQQQQQI16s")
CLOSING = struct.Struct("<4sHHQQQQQQII")
CLOSING_AT, INCARNATIONS_AT = 512, 1024
INCARNATION = struct.Struct("<Q16s")
# What fits the header page; a duplicate of an incarnation that many restarts ago is not something a carrier repeats.
MAX_INCARNATIONS = 96
CRC = struct.Struct("<I")
BUNDLE = struct.Struct("<4sHHQQQQQQIIIIIII")
BUNDLE_BYTES = BUNDLE.size + CRC.size

RUN_ZERO, RUN_RAW, RUN_MIXED = 0xFFFD, 0xFFFE, 0xFFFF
RUN_HEADER = struct.Struct("<16H16I")

ROW = np.dtype([("code", "<u8"), ("seq", "<u8"), ("offset", "<u4"), ("crc", "<u4"), ("length", "<u2")])
BATCH_HEADER = np.dtype({
    "names": ["record_count", "epoch", "first_seq", "wall_ns", "order_ns", "group_id", "incarnation", "crc"],
    "formats": ["<u4", "<u8", "<u8", "<u8", "<u8", "V16", "V16", "<u4"],
    "offsets": [12, 24, 32, 48, 56, 64, 80, 100],
    "itemsize": BATCH_HEADER_BYTES,
})  # fmt: skip
DESCRIPTOR = np.dtype([
    ("kind", "u1"), ("flags", "u1"), ("volume", "<u2"), ("data_bytes", "<u4"), ("offset", "<u8"), ("length", "<u8"),
])  # fmt: skip
assert DESCRIPTOR.itemsize == DESCRIPTOR_BYTES

Array = NDArray[Any]
_MIX_CODE, _MIX_SEQ = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_U64 = (1 << 64) - 1


def mix(code: int, seq: int, salt: int) -> int:
    """What a blob's CRC is combined with, so that it stands for its place too."""
    x = ((code * _MIX_CODE) ^ (seq * _MIX_SEQ) ^ salt) & _U64
    return (x ^ (x >> 32)) & 0xFFFFFFFF


def mix_many(codes: Array, seqs: Array, salt: int) -> Array:
    """`mix` for arrays of u64; u32 results."""
    x = (codes * np.uint64(_MIX_CODE)) ^ (seqs * np.uint64(_MIX_SEQ)) ^ np.uint64(salt)
    return (x ^ (x >> np.uint64(32))).astype(np.uint32)


@dataclass(slots=True)
class Opening:
    """The header of a segment. `prev_*` say where the log stood when it began: the truth about the one before."""

    salt: int
    ordinal: int
    first_seq: int
    prev_ordinal: int
    prev_end: int
    prev_seq: int
    prev_crc: int
    group_id: bytes
    incarnations: list[tuple[int, bytes]]
    crc: int = 0

    def __post_init__(self) -> None:
        self.incarnations = [(epoch, name) for epoch, name in self.incarnations]

    def pack(self) -> bytes:
        """The header page; sets `crc`."""
        kept = self.incarnations[-MAX_INCARNATIONS:]
        head = OPENING.pack(
            SEGMENT_MAGIC, VERSION, len(kept), self.salt, self.ordinal, self.first_seq, self.prev_ordinal,
            self.prev_end, self.prev_seq, self.prev_crc, self.group_id,
        )  # fmt: skip
        lives = b"".join(INCARNATION.pack(*life) for life in kept)
        self.crc = crc32c(lives, crc32c(head))
        page = bytearray(PAGE_BYTES)
        page[: len(head) + 4] = head + CRC.pack(self.crc)
        page[INCARNATIONS_AT : INCARNATIONS_AT + len(lives)] = lives
        return bytes(page)

    @classmethod
    def parse(cls, page: bytes) -> Opening | None:
        """None for what is no whole opening of this version."""
        if len(page) < PAGE_BYTES:
            return None
        fields = OPENING.unpack_from(page)
        magic, version, count = fields[:3]
        if magic != SEGMENT_MAGIC or version != VERSION or count > MAX_INCARNATIONS:
            return None
        lives = page[INCARNATIONS_AT : INCARNATIONS_AT + count * INCARNATION.size]
        crc = crc32c(lives, crc32c(page[: OPENING.size]))
        if CRC.unpack_from(page, OPENING.size)[0] != crc:
            return None
        return cls(*[*fields[3:], INCARNATION.iter_unpack(lives), crc])


@dataclass(slots=True)
class Closing:
    """What is known of a segment once it is full."""

    salt: int
    end: int  # where its bundles end and its codes begin
    entries: int
    last_seq: int
    first_order_ns: int
    last_order_ns: int
    last_crc: int  # chain value of its last batch
    tail_crc: int  # of the codes and seqs

    def pack(self) -> bytes:
        head = CLOSING.pack(
            CLOSING_MAGIC, VERSION, 0, self.salt, self.end, self.entries, self.last_seq, self.first_order_ns,
            self.last_order_ns, self.last_crc, self.tail_crc,
        )  # fmt: skip
        return head + CRC.pack(crc32c(head))

    @classmethod
    def parse(cls, page: bytes, salt: int) -> Closing | None:
        """None if the segment is open, or its file was recycled since."""
        head = page[CLOSING_AT : CLOSING_AT + CLOSING.size]
        fields = CLOSING.unpack(head)
        if fields[:3] != (CLOSING_MAGIC, VERSION, 0) or fields[3] != salt:
            return None
        if CRC.unpack_from(page, CLOSING_AT + CLOSING.size)[0] != crc32c(head):
            return None
        return cls(*fields[3:])


@dataclass(slots=True)
class BundleHeader:
    """Sizes and place of a bundle. A bundle without batches carries part of the undo of a record still to come."""

    salt: int
    first_seq: int
    last_seq: int
    first_order_ns: int
    last_order_ns: int
    synced_seq: int  # everything up to here was durable in the log when this was written
    meta_bytes: int
    batch_count: int
    record_count: int
    entry_count: int
    blob_bytes: int
    prev_crc: int
    body_crc: int
    crc: int = 0

    @property
    def total_bytes(self) -> int:
        return BUNDLE_BYTES + self.meta_bytes + self.entry_count * ROW.itemsize + self.blob_bytes

    def pack(self) -> bytes:
        """The header's bytes; sets `crc`."""
        head = BUNDLE.pack(
            BUNDLE_MAGIC, VERSION, 0, self.salt, self.first_seq, self.last_seq, self.first_order_ns,
            self.last_order_ns, self.synced_seq, self.meta_bytes, self.batch_count, self.record_count,
            self.entry_count, self.blob_bytes, self.prev_crc, self.body_crc,
        )  # fmt: skip
        self.crc = crc32c(head)
        return head + CRC.pack(self.crc)

    @classmethod
    def parse(cls, raw: bytes, salt: int, prev_crc: int) -> BundleHeader | None:
        """None for what is no bundle of this life of the file, or does not follow the one before."""
        if len(raw) < BUNDLE_BYTES:
            return None
        fields = BUNDLE.unpack_from(raw)
        if fields[:3] != (BUNDLE_MAGIC, VERSION, 0) or fields[3] != salt:
            return None
        crc = crc32c(raw[: BUNDLE.size])
        if CRC.unpack_from(raw, BUNDLE.size)[0] != crc or fields[-2] != prev_crc:
            return None
        return cls(*[*fields[3:], crc])


@dataclass(slots=True)
class Bundle:
    """A bundle without its blobs: what index and timeline are made of."""

    ordinal: int
    start: int
    end: int
    header: BundleHeader
    rows: Array  # ROW
    headers: bytes  # of its batches, BATCH_HEADER each
    descriptors: bytes  # of all its records
    notes: bytes  # data of the records that describe, in order

    @property
    def batches(self) -> Array:
        return np.frombuffer(self.headers, BATCH_HEADER)
