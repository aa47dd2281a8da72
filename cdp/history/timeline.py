"""What points are resolved against: times, bookmarks, barriers, gaps, sizes. Reads only; any thread."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from cdp.history.index_map import SortedMap
from cdp.history.timeline_rows import (
    BATCH_VALUE,
    GAP_VALUE,
    MAX_SEQ,
    ROLLBACK_VALUE,
    SEQ,
    STEP_VALUE,
    VOLUME_SEQ,
    rows,
    rows_back,
    volumes_of,
)

# Longest answer of a list; the newest ones are given. A person reads none of that length, and memory is bounded.
MAX_LISTED = 10_000


class Point(NamedTuple):
    """The state after record `seq`; `time_ns` is its order time."""

    seq: int
    time_ns: int


class Gap(NamedTuple):
    """Points of `volume` with from_seq <= seq < to_seq are withheld; `to_seq` None: still open."""

    volume: int
    from_seq: int
    to_seq: int | None
    code: str
    text: str

    def withholds(self, seq: int) -> bool:
        return self.from_seq <= seq and (self.to_seq is None or seq < self.to_seq)


class Rollback(NamedTuple):
    """`end` None: it runs, or was left."""

    begin: int
    end: int | None
    abandoned: bool
    volumes: list[int]
    target_seq: int | None
    bookmark: str


class Bounds(Protocol):
    """The ends of the window, raised by their owners."""

    @property
    def oldest_seq(self) -> int: ...
    @property
    def applied_seq(self) -> int: ...


class Timeline:
    """One group's. Nothing before `bounds.oldest_seq` or after `bounds.applied_seq` is ever answered."""

    def __init__(self, entries: SortedMap, bounds: Bounds) -> None:
        self._entries = entries
        self._bounds = bounds

    # --- ends and times

    def oldest(self) -> Point | None:
        """The first point that can be opened, gaps aside; None when there is none yet."""
        first = next(rows(self._entries.cursor(), b"S"), None)
        if first is None:
            return None
        seq = max(self._bounds.oldest_seq, SEQ.unpack(first[0])[0])
        seq = self._split(seq)[1] or seq
        return Point(seq, self.time_of(seq)) if seq <= self._bounds.applied_seq else None

    def newest(self) -> Point | None:
        """The last point that can be opened, gaps aside."""
        seq = self.whole_request(self._bounds.applied_seq)
        oldest = self.oldest()
        return Point(seq, self.time_of(seq)) if oldest is not None and seq >= oldest.seq else None

    def time_of(self, seq: int) -> int:
        """Order time of a record; 0 when it is not known (before the window, or not there yet)."""
        found = self._batch(seq)
        return found[1] + min(seq - found[0], found[2] - 1) if found else 0

    def seq_at(self, time_ns: int) -> int | None:
        """The last applied record at or before a time; None before the window."""
        low, high = self._bounds.oldest_seq, self._bounds.applied_seq
        best: int | None = None
        while low <= high:
            batch = self._batch((low + high) // 2)
            if batch is None:
                low = (low + high) // 2 + 1
                continue
            first, order_ns, count = batch
            if order_ns > time_ns:
                high = first - 1
            else:
                best = first + min(count - 1, time_ns - order_ns)
                low = first + count
        if best is None:
            return None
        best = min(best, self._bounds.applied_seq)
        return best if best >= self._bounds.oldest_seq and best > 0 else None

    def _batch(self, seq: int) -> tuple[int, int, int] | None:
        """(first seq, order_ns, count) of the batch of a record."""
        found = next(rows_back(self._entries.cursor(), b"S", SEQ.pack(seq)), None) if 0 <= seq <= MAX_SEQ else None
        if found is None:
            return None
        return (SEQ.unpack(found[0])[0], *BATCH_VALUE.unpack(found[1]))

    # --- bookmarks

    def bookmark(self, name: str) -> Point | None:
        """Where a bookmark is; None if it expired, never was, or cannot be opened yet."""
        found = self._entries.get(b"N" + name.encode())
        if found is None or not self._inside(seq := SEQ.unpack(found)[0]):
            return None
        return Point(seq, self.time_of(seq))

    def was_bookmark(self, name: str) -> bool:
        """Whether a name was a bookmark that has left the window."""
        raw = name.encode()
        if self._entries.get(b"E" + raw) is not None:
            return True
        found = self._entries.get(b"N" + raw)
        return found is not None and bool(SEQ.unpack(found)[0] < self._bounds.oldest_seq)

    def bookmarks(self) -> list[tuple[str, Point]]:
        """Those inside the window, oldest first; the newest MAX_LISTED."""
        newest = rows_back(self._entries.cursor(), b"n", SEQ.pack(self._bounds.applied_seq))
        found = [(name.decode(), SEQ.unpack(key)[0]) for key, name in islice(newest, MAX_LISTED)]
        oldest = self._bounds.oldest_seq
        return [(name, Point(seq, self.time_of(seq))) for name, seq in reversed(found) if seq >= oldest]

    def _inside(self, seq: int) -> bool:
        return self._bounds.oldest_seq <= seq <= self._bounds.applied_seq

    # --- barriers and requests

    def barriers(self, volume: int | None, limit: int, gaps: Sequence[Gap] = ()) -> list[Point]:
        """The newest `limit` barriers of a volume (None: of any) that lie in none of `gaps`, newest first."""
        found = self._barriers(self._bounds.applied_seq, volume)
        offered = (seq for seq in found if not any(gap.withholds(seq) for gap in gaps))
        return [Point(seq, self.time_of(seq)) for seq in islice(offered, min(limit, MAX_LISTED))]

    def barrier_before(self, seq: int, volume: int | None) -> Point | None:
        """The last barrier at or before a seq."""
        found = next(self._barriers(min(seq, self._bounds.applied_seq), volume), None)
        return Point(found, self.time_of(found)) if found is not None else None

    def _barriers(self, last_seq: int, volume: int | None) -> Iterator[int]:
        which = list(volumes_of(self._entries.cursor(), b"V")) if volume is None else [volume]
        found = (self._barriers_of(v, last_seq) for v in which)
        return heapq.merge(*found, reverse=True)

    def _barriers_of(self, volume: int, last_seq: int) -> Iterator[int]:
        for key, _ in rows_back(self._entries.cursor(), b"V", VOLUME_SEQ.pack(volume, last_seq)):
            of, seq = VOLUME_SEQ.unpack(key)
            if of != volume or seq < self._bounds.oldest_seq:
                return
            yield seq

    def whole_request(self, seq: int) -> int:
        """`seq`, or the point before a split request that it lies inside of."""
        first, last = self._split(seq)
        return first - 1 if last else seq

    def _split(self, seq: int) -> tuple[int, int]:
        """(first, last) record of the split request that `seq` lies inside of; (0, 0) if in none."""
        found = next(rows_back(self._entries.cursor(), b"W", SEQ.pack(seq)), None)
        if found is None or SEQ.unpack(found[1])[0] <= seq:
            return 0, 0
        return SEQ.unpack(found[0])[0], SEQ.unpack(found[1])[0]

    # --- gaps and rollbacks

    def gaps(self, volume: int | None) -> list[Gap]:
        """What is withheld of a volume (None: of any), rollbacks too, by from_seq; the newest MAX_LISTED."""
        found = [gap for gap in self._gap_rows() if volume is None or gap.volume == volume]
        for rollback in self.rollbacks():
            target = f"to seq {rollback.target_seq}" if rollback.target_seq else "to an earlier point"
            before = f"; {rollback.bookmark} is the state before it" if rollback.bookmark else ""
            text = f"a rollback {target} was being copied{before}"
            for of in rollback.volumes:
                if (volume is None or of == volume) and (rollback.end is None or rollback.end > rollback.begin + 1):
                    found.append(Gap(of, rollback.begin + 1, rollback.end, "rollback", text))
        found = [g for g in found if g.from_seq <= self._bounds.applied_seq + 1]
        found = [g for g in found if g.to_seq is None or g.to_seq > self._bounds.oldest_seq]
        return sorted(found, key=lambda g: g.from_seq)[-MAX_LISTED:]

    def _gap_rows(self) -> list[Gap]:
        found = []
        for key, value in rows(self._entries.cursor(), b"G"):
            volume, from_seq = VOLUME_SEQ.unpack(key)
            about = _about(value[GAP_VALUE.size :])
            to_seq = GAP_VALUE.unpack_from(value)[0] or None
            found.append(Gap(volume, from_seq, to_seq, str(about.get("code", "gap")), str(about.get("text", ""))))
        return found

    def rollbacks(self) -> list[Rollback]:
        """Rollbacks in the window, oldest first."""
        found = []
        for key, value in rows(self._entries.cursor(), b"K"):
            end, abandoned = ROLLBACK_VALUE.unpack_from(value)
            about = _about(value[ROLLBACK_VALUE.size :])
            target = about.get("target_seq")
            volumes = [v for v in about.get("volumes", []) if isinstance(v, int)]
            begin = SEQ.unpack(key)[0]
            found.append(
                Rollback(begin, end or None, bool(abandoned), volumes, target, str(about.get("bookmark") or ""))
            )
        return found[-MAX_LISTED:]

    def unfinished_targets(self) -> list[int]:
        """The points that unfinished rollbacks go back to; each BEGIN, which an undo needs, is after its target."""
        return [r.target_seq for r in self.rollbacks() if r.end is None and r.target_seq is not None]

    # --- volumes and clocks

    def size_at(self, volume: int, seq: int) -> int | None:
        """Size in bytes of a volume at a point; None if it did not exist yet."""
        for key, value in rows_back(self._entries.cursor(), b"Z", VOLUME_SEQ.pack(volume, seq)):
            return int(SEQ.unpack_from(value)[0]) if VOLUME_SEQ.unpack(key)[0] == volume else None
        return None

    def exists_from(self, volume: int) -> int | None:
        """The first known seq at which a volume existed; None if there is none yet."""
        for key, _ in rows(self._entries.cursor(), b"Z", VOLUME_SEQ.pack(volume, 0)):
            of, seq = VOLUME_SEQ.unpack(key)
            return int(seq) if of == volume and seq <= self._bounds.applied_seq else None
        return None

    def volumes(self) -> dict[str, int]:
        """The number of each volume by the name that it has now."""
        found: dict[str, int] = {}
        names: dict[int, str] = {}
        for key, value in rows(self._entries.cursor(), b"Z"):
            volume, seq = VOLUME_SEQ.unpack(key)
            if seq <= self._bounds.applied_seq:
                names[volume] = value[SEQ.size :].decode("utf-8", "replace")
        for volume, name in names.items():
            found[name] = volume
        return found

    def clock_steps(self) -> list[tuple[int, int]]:
        """(order_ns, ahead_ns), oldest first: from order_ns on, order time is ahead_ns before the wall clock's."""
        steps = islice(rows_back(self._entries.cursor(), b"C", SEQ.pack(self._bounds.applied_seq)), MAX_LISTED)
        return [STEP_VALUE.unpack(value) for _, value in steps][::-1]


def _about(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
