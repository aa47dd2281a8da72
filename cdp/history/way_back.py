"""The way back to the committed seq: the newest bundle first, so that nothing has to be kept of what was read.

A block may come more than once; what it held at the committed seq comes last of it. A discard of a whole volume that
was killed in its middle leaves undo of its size behind, and memory must not follow that (promise 9).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cdp.errors import CorruptionError
from cdp.history.blobs import Extent
from cdp.history.fetch import Fetcher
from cdp.history.index import Place
from cdp.history.undo import UndoLog
from cdp.history.undo_format import BLOCK_MASK, VOLUME_SHIFT, Bundle
from cdp.history.undo_segment import Descriptor


class Step(NamedTuple):
    """Where a bundle stands, and what is needed to read it alone."""

    ordinal: int
    start: int
    prev_crc: int

    @classmethod
    def of(cls, bundle: Bundle) -> Step:
        return cls(bundle.ordinal, bundle.start, bundle.header.prev_crc)


def extents_back(log: UndoLog, steps: Sequence[Step], committed_seq: int) -> Iterator[Extent]:
    """What records beyond `committed_seq` replaced, block by block; `steps` are in the log's order. CorruptionError."""
    fetch = Fetcher(log)
    for bundle in _backwards(log, steps):
        for code, seq, offset, crc, length in reversed(bundle.rows.tolist()):
            if seq > committed_seq:
                first = code & BLOCK_MASK
                for i, before in enumerate(fetch.whole(code, seq, Place(bundle.ordinal, offset, crc, length))):
                    yield Extent(code >> VOLUME_SHIFT, first + i, 1, seq, before)


def _backwards(log: UndoLog, steps: Sequence[Step]) -> Iterator[Bundle]:
    file: Descriptor | None = None
    opened = -1
    for ordinal, start, prev_crc in reversed(steps):
        segment = log.segments[ordinal]
        if file is None or ordinal != opened:
            file, opened = Descriptor(segment.path, os.O_RDONLY), ordinal
        bundle = segment.read_bundle(file.fd, start, prev_crc)
        if bundle is None:
            raise CorruptionError(
                f"{segment.path}: the bundle at offset {start} was whole a moment ago.", "Check the disk."
            )
        yield bundle
