"""After a failure: what is not durable, written once more to a segment of its own (promise 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cdp import storage
from cdp.journal.batch import HEADER_BYTES, Batch
from cdp.journal.publisher import Mark
from cdp.journal.segment import FRAME_BYTES, HEADER_PAGE_BYTES, SegmentHeader
from cdp.journal.segment_writer import SegmentWriter
from cdp.journal.spares import Spare


class Rewritten(NamedTuple):
    """A segment with everything that is not durable elsewhere, synced, still without its name."""

    segment: SegmentWriter
    spare: Spare
    bytes: int
    marks: list[Mark]


def room_for(batches: Iterable[Batch]) -> int:
    """Bytes of a segment that holds just these."""
    room = HEADER_PAGE_BYTES + sum(FRAME_BYTES + b.batch_bytes for b in batches)
    return room + -room % storage.PAGE_BYTES


def rewrite(folder: str, spare: Spare, room: int, header: SegmentHeader, batches: Iterable[Batch]) -> Rewritten:
    """Blocks. Raises JournalFullError, OSError, and what `batches` raises."""
    segment = SegmentWriter(folder, spare.fd, header)
    marks = []
    for batch in batches:
        segment.write(bytes(batch.raw[:HEADER_BYTES]), [batch.raw[HEADER_BYTES:]])
        order_ns = batch.order_ns + batch.record_count - 1
        marks.append(Mark(batch.last_seq, batch.crc, order_ns, header.first_seq, segment.end))
    if not marks:
        segment.write_header()
    storage.fdatasync(spare.fd)
    return Rewritten(segment, spare, room, marks)
