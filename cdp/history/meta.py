"""What a bundle keeps of its batches: headers, descriptors, and the data of the records that describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cdp.errors import CorruptionError, StorageError
from cdp.history.blobs import Buffer, Packed, run_parts
from cdp.history.undo_format import (
    BATCH_HEADER,
    BLOCK_BYTES,
    DESCRIPTOR,
    RUN_HEADER,
    RUN_MIXED,
    RUN_RAW,
    RUN_ZERO,
    Bundle,
    BundleHeader,
    mix,
)
from cdp.journal.batch import BOOKMARK, GAP, HEADER_BYTES, RESIZE, ROLLBACK_BEGIN, ROLLBACK_END, Batch

# Records whose data says something about the timeline; of the others only the descriptor is kept.
DESCRIBING = frozenset((BOOKMARK, RESIZE, GAP, ROLLBACK_BEGIN, ROLLBACK_END))
Parts = tuple[bytes, bytes, bytes]  # headers, descriptors, notes



class Log(Protocol):
    """What `kept_of` needs of the log."""

    def read(self, ordinal: int, offset: int, length: int) -> Buffer: ...
    def salt_of(self, ordinal: int) -> int: ...


def describe(batches: Sequence[Batch]) -> Parts:
    """(headers, descriptors, notes), each joined over all batches."""
    headers = b"".join([b.raw[:HEADER_BYTES] for b in batches])
    descriptors = b"".join([b.descriptors for b in batches])
    notes: list[memoryview] = []
    kinds = descriptors[:: DESCRIPTOR.itemsize]
    if any(kind in kinds for kind in DESCRIBING):
        for batch in batches:
            notes.extend(r.data for r in batch.records() if r.kind in DESCRIBING)
    return headers, descriptors, b"".join(notes)


def header_of(parts: Parts, packed: Packed, synced_seq: int) -> BundleHeader:
    """The header of a bundle of these; the segment that takes it fills in salt, sizes of meta and checksums."""
    batches = np.frombuffer(parts[0], BATCH_HEADER)
    seqs = [min(packed.seqs), max(packed.seqs)] if packed.seqs else []
    first_ns = last_ns = 0
    if len(batches):
        last = batches[-1]
        seqs += [int(batches[0]["first_seq"]), int(last["first_seq"]) + int(last["record_count"]) - 1]
        first_ns, last_ns = int(batches[0]["order_ns"]), int(last["order_ns"]) + int(last["record_count"]) - 1
    return BundleHeader(
        0, min(seqs), max(seqs), first_ns, last_ns, synced_seq, 0, len(batches),
        len(parts[1]) // DESCRIPTOR.itemsize, len(packed.codes), packed.blob_bytes, 0, 0,
    )  # fmt: skip


def kept_of(log: Log, bundle: Bundle, last_seq: int) -> tuple[Parts, Packed]:
    """What a bundle has of records up to `last_seq`, as if it had been made of those alone."""
    batches = bundle.batches
    ends = batches["first_seq"] + batches["record_count"] - np.uint64(1)
    count = int(np.count_nonzero(ends <= last_seq))
    if count < len(batches) and int(batches["first_seq"][count]) <= last_seq:
        raise StorageError(f"Seq {last_seq} is not the end of a batch; the history cannot be cut there.")
    records = int(batches["record_count"][:count].sum())
    described = np.frombuffer(bundle.descriptors, DESCRIPTOR)[:records]
    noted = described["data_bytes"][np.isin(described["kind"], list(DESCRIBING))]
    parts = (
        bundle.headers[: count * BATCH_HEADER.itemsize],
        bundle.descriptors[: records * DESCRIPTOR.itemsize],
        bundle.notes[: int(noted.sum())],
    )
    packed = Packed()
    salt = log.salt_of(bundle.ordinal)
    for code, seq, offset, crc, length in bundle.rows.tolist():
        if seq <= last_seq:
            stored = log.read(bundle.ordinal, offset, stored_length(log, bundle.ordinal, offset, length))
            packed.add(code, seq, stored or None, crc ^ mix(code, seq, salt), length)
    return parts, packed


def stored_length(log: Log, ordinal: int, offset: int, length: int) -> int:
    """Bytes of a blob, from its length field. Raises CorruptionError."""
    if length in (0, RUN_ZERO):
        return 0
    if length <= BLOCK_BYTES:
        return length
    if length == RUN_RAW:
        return RUN_HEADER.size + 16 * BLOCK_BYTES
    header = log.read(ordinal, offset, RUN_HEADER.size)
    if length != RUN_MIXED or len(header) != RUN_HEADER.size:
        raise CorruptionError(f"The undo log has an entry of an impossible length, {length}.")
    offsets, lengths, _ = run_parts(header)
    return offsets[-1] + lengths[-1]
