"""What changed between two points of a volume, from the undo log's descriptors: no content is read.

An extent was written between the points; its bytes may still be equal (a write of the same content).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cdp.errors import RefusedError
from cdp.history.undo_format import BLOCK_BYTES, Array
from cdp.recovery.points import Resolved

# Of one list: some 20 MiB of JSON, a third of what a parent takes from its child in one line.
MAX_EXTENTS = 1_000_000


class ChangedBlocks(Protocol):
    """What a diff needs of `cdp.history.history.History`."""

    def changed_blocks(self, volume: int, after_seq: int, up_to_seq: int, /) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class Diff:
    """Extents (offset, length) in bytes, sorted and apart from each other."""

    start: Resolved
    end: Resolved
    extents: list[tuple[int, int]]

    @property
    def bytes(self) -> int:
        return sum(length for _, length in self.extents)

    def to_json(self) -> dict[str, Any]:
        return {
            "from": self.start.to_json(),
            "to": self.end.to_json(),
            "extents": [{"offset": offset, "length": length} for offset, length in self.extents],
            "bytes": self.bytes,
        }


def diff(history: ChangedBlocks, volume: int, size: int, start: Resolved, end: Resolved) -> Diff:
    """Between two points in either order; clipped to `size`, the volume's larger size of the two. Raises RefusedError
    for more than MAX_EXTENTS."""
    starts, ends = _stretches(history, volume, size, start, end)
    if len(starts) > MAX_EXTENTS:
        raise RefusedError(
            f"{len(starts):,} extents differ between seq {start.seq} and seq {end.seq}: "
            f"more than {MAX_EXTENTS:,} are not listed.",
            "Choose points nearer to each other, or read the NBD context cdp:changed of the older one.",
            code="unsupported",
        )
    return Diff(start, end, list(zip(starts.tolist(), (ends - starts).tolist(), strict=True)))


def measure(history: ChangedBlocks, volume: int, size: int, start: Resolved, end: Resolved) -> tuple[int, int]:
    """(bytes, extents) of the same, whatever their number."""
    starts, ends = _stretches(history, volume, size, start, end)
    return int((ends - starts).sum()), len(starts)


def _stretches(
    history: ChangedBlocks, volume: int, size: int, start: Resolved, end: Resolved
) -> tuple[Array, Array]:
    """Where each extent begins and ends, in bytes."""
    low, high = sorted((start.seq, end.seq))
    if low == high:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    blocks, counts = history.changed_blocks(volume, low, high)
    starts, ends = np.minimum(blocks * BLOCK_BYTES, size), np.minimum((blocks + counts) * BLOCK_BYTES, size)
    return starts[ends > starts], ends[ends > starts]
