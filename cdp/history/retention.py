"""Which of the oldest segments of a history go: a pure function over plain data.

A point needs every entry after it, so dropping a segment gives up the points before its last seq. By age a segment
goes when even its newest record is older than the window; by size the oldest goes until the rest fits. A pin keeps
what its point needs, whatever the limits say. The newest segment always stays: it is being written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class SegmentFacts(NamedTuple):
    """One segment, oldest first; `last_ns` 0 when it holds no whole batch (it then goes with its neighbour)."""

    ordinal: int
    last_seq: int
    last_ns: int
    bytes: int


class Decision(NamedTuple):
    """`short`: size, not age, decided, so a point younger than the window goes; `pinned`: a pin kept something."""

    drop: list[int]
    oldest_seq: int | None
    short: bool
    pinned: bool


def decide(
    segments: Sequence[SegmentFacts],
    window_ns: int | None,
    window_bytes: int | None,
    pins: Iterable[int],
    now_ns: int,
    other_bytes: int = 0,
) -> Decision:
    """What to drop now. `other_bytes` is space that counts but is not in the segments. None: no such limit."""
    lowest_pin = min(pins, default=None)
    total = other_bytes + sum(s.bytes for s in segments)
    drop: list[int] = []
    oldest_seq: int | None = None
    short = pinned = False
    for segment in segments[:-1]:
        aged = window_ns is not None and segment.last_ns <= now_ns - window_ns
        oversized = window_bytes is not None and total > window_bytes
        if not aged and not oversized:
            break
        if lowest_pin is not None and segment.last_seq > lowest_pin:
            pinned = True
            break
        short |= window_ns is not None and not aged
        drop.append(segment.ordinal)
        oldest_seq = segment.last_seq
        total -= segment.bytes
    return Decision(drop, oldest_seq, short, pinned)
