"""A timeline as plain lists: what resolving is tested against, without a journal behind it."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple


class Point(NamedTuple):
    seq: int
    time_ns: int


class Gap(NamedTuple):
    volume: int
    from_seq: int
    to_seq: int | None
    code: str
    text: str


class PlainTimeline:
    """Record `first + i` has order time `times_ns[i]`."""

    def __init__(self, times_ns, first=1, **named):
        self.times_ns, self.first = list(times_ns), first
        self.named_bookmarks = named.get("bookmarks", {})
        self.expired = named.get("expired", ())
        self.barrier_seqs = named.get("barriers", ())
        self.gap_list = named.get("gaps", [])
        self.continued = named.get("continued", ())
        self.steps = named.get("steps", [])
        self.sizes = named.get("sizes", {1: 1 << 20})
        self.born = named.get("born", {})  # volume → first seq at which it exists

    def oldest(self):
        return Point(self.first, self.times_ns[0]) if self.times_ns else None

    def newest(self):
        return Point(self.first + len(self.times_ns) - 1, self.times_ns[-1]) if self.times_ns else None

    def time_of(self, seq):
        if not 0 <= seq - self.first < len(self.times_ns):
            raise AssertionError(f"seq {seq} was asked for")
        return self.times_ns[seq - self.first]

    def seq_at(self, time_ns):
        at = bisect_right(self.times_ns, time_ns)
        return self.first + at - 1 if at else None

    def bookmark(self, name):
        seq = self.named_bookmarks.get(name)
        return None if seq is None else Point(seq, 0)

    def was_bookmark(self, name):
        return name in self.expired

    def barrier_before(self, seq, volume):
        found = [s for v, s in self.barrier_seqs if s <= seq and volume in (v, None)]
        return Point(max(found), 0) if found else None

    def gaps(self, volume):
        return [gap for gap in self.gap_list if volume in (gap.volume, None)]

    def whole_request(self, seq):
        while seq in self.continued:
            seq -= 1
        return seq

    def size_at(self, volume, seq):
        return self.sizes.get(volume) if seq >= self.born.get(volume, 0) else None

    def clock_steps(self):
        return self.steps
