"""The batch: the unit of append, the same bytes in every carrier.

Little-endian. Header (104 bytes), then one descriptor (24 bytes) for each record, then the data of all records in
their order::

    0   magic          4s   b"CDPB"
    4   version        u8   1
    5   codec          u8   0: data as it is
    6   reserved       u16  0
    8   batch_bytes    u32  header, descriptors and data
    12  record_count   u32  1 … MAX_RECORDS
    16  data_bytes     u32
    20  reserved       u32  0
    24  epoch          u64  grows with each incarnation
    32  first_seq      u64  of its first record; the others follow by one
    40  durable_seq    u64  highest seq known to be durable when this was written
    48  wall_ns        u64  wall clock, ns since 1970 (UTC)
    56  order_ns       u64  order time of its first record; record i has order_ns + i
    64  group_id       16s  random, made with the journal's history
    80  incarnation    16s  random, made at each start of the collector
    96  prev_crc       u32  crc of the batch before (0 for the first)
    100 crc            u32  CRC-32C of bytes 0 … 99, descriptors and data

    descriptor: kind u8, flags u8, volume u16, data_bytes u32, offset u64, length u64
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from crc32c import crc32c

from cdp.errors import CorruptionError, StorageError

MAGIC = b"CDPB"
VERSION = 1
CODEC_RAW = 0
HEADER = struct.Struct("<4sBBHIIIIQQQQQ16s16sI")  # all but the checksum
CRC = struct.Struct("<I")
HEADER_BYTES = HEADER.size + CRC.size
DESCRIPTOR = struct.Struct("<BBHIQQ")
DESCRIPTOR_BYTES = DESCRIPTOR.size
# A request of 32 MiB is the largest NBD request that is served; with room for what shares its batch.
MAX_DATA_BYTES = 34 << 20
# One receive buffer of a few MiB holds at most some 100,000 requests without payload (28 bytes each).
MAX_RECORDS = 1 << 17
# Where a carrier limits its messages, a batch holds no more than this: a record of a MiB, or many small ones.
MESSAGE_DATA_BYTES, MESSAGE_RECORDS = 1 << 20, 4096

# Kinds of record. A reader that meets another one stops.
WRITE, ZERO, BARRIER, BOOKMARK, VERIFY, SYNC, HEARTBEAT, ROLLBACK_BEGIN, ROLLBACK_END, RESIZE, GAP = range(1, 12)
KIND_NAMES = {
    1: "WRITE", 2: "ZERO", 3: "BARRIER", 4: "BOOKMARK", 5: "VERIFY", 6: "SYNC", 7: "HEARTBEAT",
    8: "ROLLBACK_BEGIN", 9: "ROLLBACK_END", 10: "RESIZE", 11: "GAP",
}  # fmt: skip

# Flags of a record.
FUA = 1  # WRITE, ZERO: its own barrier
CONTINUED = 2  # more pieces of the same request follow: no point is offered at this record
PUNCH = 4  # ZERO: may be a hole (TRIM, WRITE_ZEROES without NO_HOLE)
OPEN = 8  # GAP: begins here and ends at a later GAP of that volume without this flag
ZEROS = 16  # SYNC, VERIFY: the region reads as zeros, no content is carried
ABANDONED = 32  # ROLLBACK_END: ended by --abandon

# `volume` of records that belong to the whole group (BOOKMARK, HEARTBEAT).
NO_VOLUME = 0xFFFF


class Identity(NamedTuple):
    """Which history and which life of a collector a batch belongs to."""

    group_id: bytes  # 16 bytes
    epoch: int
    incarnation: bytes  # 16 bytes


class Record(NamedTuple):
    """One record, decoded. `data` is a view into its batch."""

    seq: int
    time_ns: int
    kind: int
    flags: int
    volume: int
    offset: int
    length: int
    data: memoryview


class Batch:
    """A decoded batch over the bytes it was decoded from (no copy)."""

    __slots__ = (
        "raw", "batch_bytes", "record_count", "data_bytes", "epoch", "first_seq", "durable_seq",
        "wall_ns", "order_ns", "group_id", "incarnation", "prev_crc", "crc",
    )  # fmt: skip

    raw: memoryview
    batch_bytes: int
    record_count: int
    data_bytes: int
    epoch: int
    first_seq: int
    durable_seq: int
    wall_ns: int
    order_ns: int
    group_id: bytes
    incarnation: bytes
    prev_crc: int
    crc: int

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.record_count - 1

    @property
    def identity(self) -> Identity:
        return Identity(self.group_id, self.epoch, self.incarnation)

    @property
    def descriptors(self) -> memoryview:
        return self.raw[HEADER_BYTES : HEADER_BYTES + self.record_count * DESCRIPTOR_BYTES]

    @property
    def data(self) -> memoryview:
        return self.raw[self.batch_bytes - self.data_bytes : self.batch_bytes]

    def records(self) -> Iterator[Record]:
        """Every record in order. The sum of their data was checked when the batch was decoded."""
        data, at, seq, time_ns = self.data, 0, self.first_seq, self.order_ns
        for kind, flags, volume, data_bytes, offset, length in DESCRIPTOR.iter_unpack(self.descriptors):
            yield Record(seq, time_ns, kind, flags, volume, offset, length, data[at : at + data_bytes])
            at += data_bytes
            seq += 1
            time_ns += 1


def encode(
    identity: Identity,
    first_seq: int,
    durable_seq: int,
    wall_ns: int,
    order_ns: int,
    prev_crc: int,
    descriptors: bytes,
    data: Sequence[bytes | bytearray | memoryview],
    data_bytes: int,
) -> tuple[bytes, int]:
    """Header and descriptors of a batch, and its checksum; `data` follows them unchanged on the carrier."""
    head = HEADER.pack(
        MAGIC, VERSION, CODEC_RAW, 0, HEADER_BYTES + len(descriptors) + data_bytes,
        len(descriptors) // DESCRIPTOR_BYTES, data_bytes, 0, identity.epoch, first_seq, durable_seq,
        wall_ns, order_ns, identity.group_id, identity.incarnation, prev_crc,
    )  # fmt: skip
    crc: int = crc32c(descriptors, crc32c(head))
    for piece in data:
        crc = crc32c(piece, crc)
    return b"".join((head, CRC.pack(crc), descriptors)), crc


def decode_header(raw: memoryview | bytes, where: str = "batch") -> Batch:
    """The header alone (`raw` may end behind it; `records` then must not be called).

    Raises CorruptionError for bytes that are no header, StorageError for a version, codec or size from the future.
    """
    if len(raw) < HEADER_BYTES:
        raise CorruptionError(f"{where}: {len(raw)} bytes are shorter than a batch header.")
    b = Batch()
    (
        magic, version, codec, _, b.batch_bytes, b.record_count, b.data_bytes, _, b.epoch, b.first_seq,
        b.durable_seq, b.wall_ns, b.order_ns, b.group_id, b.incarnation, b.prev_crc,
    ) = HEADER.unpack_from(raw)  # fmt: skip
    (b.crc,) = CRC.unpack_from(raw, HEADER.size)
    if magic != MAGIC:
        raise CorruptionError(f"{where}: no batch begins here (magic {bytes(magic)!r}).")
    if version != VERSION or codec != CODEC_RAW:
        raise StorageError(
            f"{where}: batch version {version}, codec {codec} cannot be read.", "Upgrade this program."
        )
    if (
        not 1 <= b.record_count <= MAX_RECORDS
        or b.data_bytes > MAX_DATA_BYTES
        or b.batch_bytes != HEADER_BYTES + b.record_count * DESCRIPTOR_BYTES + b.data_bytes
        or b.first_seq < 1
    ):
        raise CorruptionError(f"{where}: the lengths in the batch header contradict each other.")
    b.raw = memoryview(raw)
    return b


def decode(raw: memoryview | bytes, where: str = "batch") -> Batch:
    """A whole batch at the start of `raw`, its checksum and every length checked.

    Raises CorruptionError, and StorageError for a version or a kind of record from the future.
    """
    b = decode_header(raw, where)
    if len(raw) < b.batch_bytes:
        raise CorruptionError(f"{where}: batch of seq {b.first_seq} is cut: {len(raw)} of {b.batch_bytes} bytes.")
    b.raw = memoryview(raw)[: b.batch_bytes]
    if crc32c(b.raw[HEADER_BYTES:], crc32c(b.raw[: HEADER.size])) != b.crc:
        raise CorruptionError(f"{where}: checksum of the batch of seqs {b.first_seq} to {b.last_seq} is wrong.")
    total = 0
    for kind, _, _, data_bytes, _, _ in DESCRIPTOR.iter_unpack(b.descriptors):
        if kind not in KIND_NAMES:
            raise StorageError(f"{where}: unknown kind of record {kind}.", "Upgrade this program.")
        total += data_bytes
    if total != b.data_bytes:
        raise CorruptionError(f"{where}: the data of seqs {b.first_seq} to {b.last_seq} does not add up.")
    return b
