"""The segment file and the frame in front of each batch. FORMAT.md has every byte.

A segment is a header page and then frames back to back. A frame is `batch_bytes` and a CRC-32C of the batch's
header seeded with the segment's random salt; so neither what an earlier life of a recycled file left behind nor
a whole batch inside a guest's data can pass for a batch of this segment. The header says where the journal ended
before the segment: whatever lies behind that place in the segment before is not part of the journal.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from crc32c import crc32c

from cdp import storage
from cdp.errors import CorruptionError, ForkedError, StorageError
from cdp.journal.batch import CRC, HEADER_BYTES, Batch, decode, decode_header

MAGIC = b"CDPJSEG1"
VERSION = 1
SALT_BYTES = 16
HEADER = struct.Struct("<8sII16s16sQQQQQI")
HEADER_PAGE_BYTES = storage.PAGE_BYTES
_CRC_AT = HEADER_PAGE_BYTES - CRC.size

FRAME = struct.Struct("<II")  # batch_bytes, CRC-32C of the batch's header seeded with the salt
FRAME_BYTES = FRAME.size

# One read: large enough that a reader's cost is the checksum, not the system call; small enough for many readers.
READ_BYTES = 1 << 20
# Headers only: most of a chunk would be skipped where batches are large.
READ_HEADERS_BYTES = 64 << 10

_NAME = re.compile(r"segment-(\d{20})")


class SegmentHeader(NamedTuple):
    """What the first page of a segment says."""

    group_id: bytes
    salt: bytes
    first_seq: int  # of its first batch, if it has one
    epoch: int  # of the incarnation that writes it
    last_seq: int  # the journal's last seq before this segment; 0: there is none
    last_order_ns: int  # order time of that record
    durable_seq: int  # known to be durable when the segment began
    last_crc: int  # checksum of the batch that ends at last_seq; 0: there is none

    @property
    def seed(self) -> int:
        """What the checksums of frames begin with."""
        return int(crc32c(self.salt))


def segment_name(first_seq: int) -> str:
    return f"segment-{first_seq:020d}"


def list_segments(folder: str) -> list[int]:
    """First seqs of the segments in a journal folder, in order; none if there is no such folder."""
    try:
        names = storage.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(m[1]) for name in names if (m := _NAME.fullmatch(name)))


def encode_header(h: SegmentHeader) -> bytes:
    """The header page."""
    fixed = HEADER.pack(
        MAGIC, VERSION, 0, h.group_id, h.salt, h.first_seq, h.epoch, h.last_seq, h.last_order_ns, h.durable_seq,
        h.last_crc,
    )  # fmt: skip
    page = fixed.ljust(_CRC_AT, b"\0")
    return page + CRC.pack(crc32c(page))


def decode_header_page(page: bytes, where: str) -> SegmentHeader:
    """Raises CorruptionError, and StorageError for a version from the future."""
    if len(page) != HEADER_PAGE_BYTES or crc32c(page[:_CRC_AT]) != CRC.unpack_from(page, _CRC_AT)[0]:
        raise CorruptionError(f"{where}: the segment's header page is damaged.")
    magic, version, _, *fields = HEADER.unpack_from(page)
    if magic != MAGIC:
        raise CorruptionError(f"{where}: this is no journal segment (magic {magic!r}).")
    if version != VERSION:
        raise StorageError(f"{where}: segment version {version} cannot be read.", "Upgrade this program.")
    return SegmentHeader(*fields)


def read_header(fd: int, path: str, first_seq: int) -> SegmentHeader:
    """The header of the segment that `path` names. Raises as `decode_header_page`, and if it is another's."""
    header = decode_header_page(storage.pread(fd, HEADER_PAGE_BYTES, 0), path)
    if header.first_seq != first_seq or header.last_seq != first_seq - 1:
        raise CorruptionError(f"{path}: the segment's header is that of seq {header.first_seq}, not of its name.")
    return header


def check_group(header: SegmentHeader, group_id: bytes, path: str) -> None:
    """Raises ForkedError when the segment belongs to another group's history."""
    if header.group_id != group_id:
        raise ForkedError(
            f"{path}: belongs to the journal {header.group_id.hex()}, not to {group_id.hex()}.",
            "Two state folders were mixed up: put each back to its own group.",
        )


class FrameReader:
    """Reads the batches of one segment one after another, in large reads, each checked in full or by its header.

    `offset` is where the next frame begins; `end` where reading stops (settable: a reader moves it on as the
    journal grows). The caller checks that batches continue each other.
    """

    def __init__(self, fd: int, path: str, seed: int, end: int, offset: int = HEADER_PAGE_BYTES) -> None:
        self._fd = fd
        self._path = path
        self._seed = seed
        self.offset = offset
        self.end = end
        self._buffer = memoryview(b"")
        self._start = 0  # offset of the buffer's first byte

    def next(self, header_only: bool = False) -> Batch:
        """The batch at `offset`, which moves behind it. `header_only`: only its header is read and checked.

        Raises CorruptionError if no intact batch of this segment is there.
        """
        chunk = READ_HEADERS_BYTES if header_only else READ_BYTES
        where = f"{self._path} at offset {self.offset}"
        head = self._at(self.offset, FRAME_BYTES + HEADER_BYTES, chunk, where)
        batch_bytes, crc = FRAME.unpack_from(head)
        if crc32c(head[FRAME_BYTES : FRAME_BYTES + HEADER_BYTES], self._seed) != crc:
            raise CorruptionError(f"{where}: no batch of this segment begins here.")
        if self.offset + FRAME_BYTES + batch_bytes > self.end:
            raise CorruptionError(f"{where}: the batch reaches beyond the end at {self.end}.")
        if header_only:
            batch = decode_header(head[FRAME_BYTES:], where)
        else:
            whole = self._at(self.offset, FRAME_BYTES + batch_bytes, chunk, where)
            batch = decode(whole[FRAME_BYTES : FRAME_BYTES + batch_bytes], where)
        if batch.batch_bytes != batch_bytes:
            raise CorruptionError(f"{where}: frame and batch contradict each other about the length.")
        self.offset += FRAME_BYTES + batch_bytes
        return batch

    def refresh(self) -> None:
        """Forgets what was read ahead, which may have changed since."""
        self._buffer = memoryview(b"")

    def _at(self, offset: int, length: int, chunk: int, where: str) -> memoryview:
        """At least `length` bytes from `offset`."""
        skip = offset - self._start
        if skip < 0 or skip + length > len(self._buffer):
            room = self.end - offset
            if room < length:
                raise CorruptionError(f"{where}: {room} bytes up to the end are too few for a batch.")
            self._buffer = memoryview(storage.pread(self._fd, min(max(length, chunk), room), offset))
            self._start, skip = offset, 0
            if len(self._buffer) < length:
                raise CorruptionError(f"{where}: the file ends inside a batch.")
        return self._buffer[skip:]


def check_continues(batch: Batch, header: SegmentHeader, last_seq: int, last_crc: int, where: str) -> None:
    """Raises CorruptionError unless `batch` is of the segment's incarnation and follows the batch before it."""
    if batch.first_seq != last_seq + 1 or batch.prev_crc != last_crc:
        raise CorruptionError(
            f"{where}: the batch of seqs {batch.first_seq} to {batch.last_seq} does not continue seq {last_seq}."
        )
    if batch.group_id != header.group_id or batch.epoch != header.epoch:
        raise CorruptionError(f"{where}: the batch of seq {batch.first_seq} is not of this segment's incarnation.")
