"""What changed between two points of a volume, from the undo log's descriptors: no content is read.

An extent was written between the points; its bytes may still be equal (a write of the same content).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from cdp.recovery.points import Resolved


class ChangedBlocks(Protocol):
    """What a diff needs of `cdp.history.history.History`."""

    def changed(self, volume: int, after_seq: int, up_to_seq: int, /) -> Iterable[tuple[int, int]]: ...


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
    """Between two points in either order; clipped to `size`, the volume's larger size of the two."""
    low, high = sorted((start.seq, end.seq))
    changed = history.changed(volume, low, high) if low < high else []
    return Diff(start, end, merge(changed, size))


def merge(extents: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Sorted, joined where they touch or overlap, and cut at `size`."""
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(extents):
        end = min(offset + length, size)
        if merged and offset <= merged[-1][0] + merged[-1][1]:
            offset = merged[-1][0]
            end = max(end, offset + merged[-1][1])
            merged.pop()
        if end > offset:
            merged.append((offset, end - offset))
    return merged
