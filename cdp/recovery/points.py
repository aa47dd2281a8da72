"""What a point expression means in a timeline: one exact seq, or a refusal (promise 8).

A time means the last record at or before it. What cannot be recovered is never offered: before any work starts the
answer is a RefusedError that says why, names the nearest points on both sides, and the zone that it was read in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import Any, NoReturn, Protocol

from cdp.errors import NotFoundError, PointSyntaxError, RefusedError
from cdp.recovery.grammar import EXAMPLES, Ago, Bookmark, Expression, Now, Seq, Written, parse
from cdp.recovery.times import EXAMPLE, SECOND_NS, both_zones, iso_local, iso_utc, read_in, zone_name

__all__ = ["EXAMPLES", "Resolved", "TimelineLike", "parse", "point_json", "resolve"]

# A wall clock that was set back by less than this and never forward again leaves order time ahead of it for good:
# an offset that nobody reading a clock can see must not make every later time ambiguous.
TOLERATED_AHEAD_NS = SECOND_NS
# A request of 32 MiB is split into 32 records: the end of a split request is never further away.
MAX_PIECES = 64


class PointLike(Protocol):
    """A seq and its order time."""

    @property
    def seq(self) -> int: ...
    @property
    def time_ns(self) -> int: ...


class GapLike(Protocol):
    """Points from `from_seq` up to, but not including, `to_seq` (None: still open) are withheld."""

    @property
    def from_seq(self) -> int: ...
    @property
    def to_seq(self) -> int | None: ...
    @property
    def code(self) -> str: ...
    @property
    def text(self) -> str: ...


class TimelineLike(Protocol):
    """What resolving needs of a timeline (`cdp.history.timeline.Timeline`)."""

    def oldest(self) -> PointLike | None: ...
    def newest(self) -> PointLike | None: ...
    def time_of(self, seq: int, /) -> int: ...
    def seq_at(self, time_ns: int, /) -> int | None: ...
    def bookmark(self, name: str, /) -> PointLike | None: ...
    def was_bookmark(self, name: str, /) -> bool: ...
    def barrier_before(self, seq: int, volume: int | None, /) -> PointLike | None: ...
    def gaps(self, volume: int | None, /) -> Sequence[GapLike]: ...
    def whole_request(self, seq: int, /) -> int: ...
    def size_at(self, volume: int, seq: int, /) -> int | None: ...
    def clock_steps(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class Resolved:
    """One exact point; `asked_ns` is the time that was asked for, where one was."""

    seq: int
    time_ns: int
    expression: str
    zone: str
    asked_ns: int | None = None

    def to_json(self) -> dict[str, Any]:
        return point_json(self.seq, self.time_ns)


def point_json(seq: int, time_ns: int) -> dict[str, Any]:
    """A point as every answer carries it."""
    return {"seq": seq, "time": iso_utc(time_ns)}


def resolve(
    expression: Expression | str, timeline: TimelineLike, volume_id: int | None, now_ns: int, zone: tzinfo | None
) -> Resolved:
    """The point that an expression means for a volume (None: for the whole group).

    `now_ns` is the wall clock; `zone` reads times that carry none, and None refuses those.
    Raises PointSyntaxError, NotFoundError (no such bookmark) or RefusedError.
    """
    if isinstance(expression, str):
        expression = parse(expression)
    return _Resolution(expression, timeline, volume_id, now_ns, zone).run()


class _Resolution:
    """One expression on its way to a seq. The timeline's ends are read once: it moves while this runs."""

    def __init__(
        self, expression: Expression, timeline: TimelineLike, volume: int | None, now_ns: int, zone: tzinfo | None
    ) -> None:
        self.expression, self.timeline, self.volume, self.zone = expression, timeline, volume, zone
        # Order time may be ahead of the wall clock; "now" and what is counted from it are in order time.
        steps = timeline.clock_steps()
        self.now_ns = now_ns + (steps[-1][1] if steps else 0)
        self.gaps = sorted(timeline.gaps(volume), key=lambda gap: gap.from_seq)
        oldest, newest = timeline.oldest(), timeline.newest()
        if oldest is None or newest is None:
            raise RefusedError("Nothing has been replayed yet: there is no point.", "Try again in a moment.",
                               code="outside_window")  # fmt: skip
        self.oldest, self.newest = oldest, newest

    def run(self) -> Resolved:
        seq, asked_ns = self._place()
        if self.expression.barrier:
            barrier = self._guests_barrier(seq)
            if barrier is None or barrier.seq < self.oldest.seq:
                why = "there is no barrier at or before it inside the window"
                self._refuse("outside_window", why, self.oldest.seq - 1)
            seq, asked_ns = barrier.seq, None
        self._check_recoverable(seq, asked_ns)
        return Resolved(seq, self.timeline.time_of(seq), self.expression.text, zone_name(self.zone), asked_ns)

    def _place(self) -> tuple[int, int | None]:
        place = self.expression.place
        if isinstance(place, Now):
            return self.timeline.whole_request(self.newest.seq), None
        if isinstance(place, Seq):
            return self._at_seq(place.seq), None
        if isinstance(place, Bookmark):
            return self._at_bookmark(place.name), None
        time_ns = max(0, self.now_ns - place.ns) if isinstance(place, Ago) else self._read(place)
        return self._at_time(time_ns), time_ns

    def _guests_barrier(self, seq: int) -> PointLike | None:
        """The last one at or before a seq that is not a rollback's own: no guest said anything while it copied."""
        barrier = self.timeline.barrier_before(seq, self.volume)
        while barrier is not None and (gap := self._gap_of(barrier.seq)) is not None and _is_rollback(gap):
            barrier = self.timeline.barrier_before(gap.from_seq - 1, self.volume)
        return barrier

    # --- the kinds of place

    def _at_seq(self, seq: int) -> int:
        if seq > self.newest.seq:
            self._refuse("beyond_newest", f"the newest point is seq {self.newest.seq}", seq)
        if seq < self.oldest.seq:
            self._refuse("outside_window", f"the window begins at seq {self.oldest.seq}", seq)
        if self.timeline.whole_request(seq) != seq:
            self._refuse("inside_request", "it is inside a request that was split into several records", seq)
        return seq

    def _at_bookmark(self, name: str) -> int:
        found = self.timeline.bookmark(name)
        if found is not None and self.oldest.seq <= found.seq <= self.newest.seq:
            return found.seq
        if found is not None and found.seq > self.newest.seq:
            self._refuse("beyond_newest", "it is in the journal but not replayed yet", found.seq)
        if found is not None or self.timeline.was_bookmark(name):
            self._refuse("expired", "that bookmark left the window", self.oldest.seq - 1)
        raise NotFoundError(f"There is no bookmark {name!r}.", "`cdp points` lists those there are.")

    def _at_time(self, time_ns: int) -> int:
        if time_ns > self.now_ns:
            self._refuse("future", f"that is {both_zones(time_ns, self.zone)}, which is in the future", None)
        if time_ns > self.newest.time_ns:
            self._refuse("beyond_newest", f"{both_zones(time_ns, self.zone)} is after the newest replayed point", None)
        seq = self.timeline.seq_at(time_ns) if time_ns >= self.oldest.time_ns else None
        if seq is None or seq < self.oldest.seq:
            self._refuse(
                "outside_window", f"{both_zones(time_ns, self.zone)} is before the window", self.oldest.seq - 1
            )
        return self.timeline.whole_request(seq)

    def _read(self, place: Written) -> int:
        """The one time that was written, or a refusal with the candidates."""
        written = place.time
        if written.offset is None and self.zone is None:
            raise PointSyntaxError(
                f"{self.expression.text!r} does not say its time zone.", f"In an export's name it must: {EXAMPLE}."
            )
        reading = read_in(written, self.zone or UTC)
        if reading.around is not None:
            self._refuse_times("the clocks of the zone skip that time", reading.around)
        if len(reading.times_ns) > 1:
            self._refuse_times("the clocks of the zone show that time twice", reading.times_ns)
        return self._order_time(reading.times_ns[0])

    def _order_time(self, time_ns: int) -> int:
        """The order time of what a wall clock showed; a record's exact order time, as printed, is never ambiguous."""
        steps = self.timeline.clock_steps()
        seq = self.timeline.seq_at(time_ns) if steps else None
        if not steps or (seq is not None and self.timeline.time_of(seq) == time_ns):
            return time_ns
        stretches = zip([(0, 0), *steps], [*(start for start, _ in steps), None], strict=True)
        shown = [
            time_ns + ahead
            for (start, ahead), end in stretches
            if start <= time_ns + ahead and (end is None or time_ns + ahead < end)
        ]
        if len(shown) == 1 and abs(shown[0] - time_ns) > TOLERATED_AHEAD_NS:
            shown.append(time_ns)
        if len(shown) > 1:
            self._refuse_times("a clock that was set back showed that time twice", sorted(shown))
        return time_ns

    # --- refusals

    def _check_recoverable(self, seq: int, asked_ns: int | None) -> None:
        if seq < self.oldest.seq:
            self._refuse("outside_window", "it is before the window", self.oldest.seq - 1)
        for gap in self.gaps:
            if gap.from_seq <= seq and (gap.to_seq is None or seq < gap.to_seq):
                self._refuse_gap(gap, seq)
            # Nothing is known of the time between the last record before a gap and the one that began it.
            if gap.from_seq == seq + 1 and not _is_rollback(gap) and (asked_ns or 0) > self.timeline.time_of(seq):
                self._refuse_gap(gap, gap.from_seq)
        if self.volume is not None and self.timeline.size_at(self.volume, seq) is None:
            self._refuse("outside_window", "the volume did not exist yet", seq)

    def _refuse_gap(self, gap: GapLike, seq: int) -> NoReturn:
        if _is_rollback(gap):
            self._refuse("in_rollback", "it lies inside the copying of a rollback", seq)
        self._refuse("in_gap", f"it lies inside a gap ({gap.text or gap.code})", seq)

    def _refuse(self, code: str, why: str, seq: int | None) -> NoReturn:
        """`seq` is where the neighbours are looked for; None: after the newest point."""
        before = self._nearest_before(self.newest.seq if seq is None else seq)
        after = None if seq is None else self._nearest_after(seq)
        near = [
            f"the nearest point {side} is {self._describe(point)}"
            for side, point in (("before", before), ("after", after))
            if point is not None
        ]
        raise RefusedError(
            f"{self.expression.text!r} is not offered: {why} (read in {zone_name(self.zone)}).",
            "; ".join(near).replace("the", "The", 1) + "." if near else "No point can be opened now.",
            code=code,
            before=None if before is None else point_json(*before),
            after=None if after is None else point_json(*after),
        )

    def _refuse_times(self, why: str, times_ns: Sequence[int]) -> NoReturn:
        points = [self._nearest_to(time_ns) for time_ns in (times_ns[0], times_ns[-1])]
        written = " or ".join(f"{iso_local(t, self.zone or UTC)} ({iso_utc(t)})" for t in times_ns)
        raise RefusedError(
            f"{self.expression.text!r} is ambiguous: {why} (read in {zone_name(self.zone)}).",
            f"Write one of these: {written}.",
            code="ambiguous",
            before=None if points[0] is None else point_json(*points[0]),
            after=None if points[1] is None else point_json(*points[1]),
        )

    def _describe(self, point: tuple[int, int]) -> str:
        return f"seq {point[0]} at {both_zones(point[1], self.zone)}"

    # --- neighbours

    def _nearest_to(self, time_ns: int) -> tuple[int, int] | None:
        seq = None if time_ns < self.oldest.time_ns else self.timeline.seq_at(time_ns)
        return self._nearest_after(self.oldest.seq) if seq is None else self._nearest_before(seq)

    def _nearest_before(self, seq: int) -> tuple[int, int] | None:
        seq = min(seq, self.newest.seq)
        floor = self._floor()
        while seq >= floor:  # each turn leaves a gap or a request behind
            seq, start = self.timeline.whole_request(seq), seq
            gap = self._gap_of(seq)
            if gap is not None:
                seq = gap.from_seq - 1
            elif seq <= start and seq >= floor:
                return seq, self.timeline.time_of(seq)
        return None

    def _nearest_after(self, seq: int) -> tuple[int, int] | None:
        seq, pieces = max(seq, self._floor()), 0
        while seq <= self.newest.seq and pieces < MAX_PIECES:
            gap = self._gap_of(seq)
            if gap is not None:
                if gap.to_seq is None:
                    return None
                seq = gap.to_seq
            elif self.timeline.whole_request(seq) != seq:
                seq, pieces = seq + 1, pieces + 1
            else:
                return seq, self.timeline.time_of(seq)
        return None

    def _floor(self) -> int:
        """The first seq inside the window at which the volume exists; beyond the newest if there is none."""
        low, high = self.oldest.seq, self.newest.seq + 1
        while self.volume is not None and low < high:  # a volume that exists goes on existing
            middle = (low + high) // 2
            if self.timeline.size_at(self.volume, middle) is None:
                low = middle + 1
            else:
                high = middle
        return low

    def _gap_of(self, seq: int) -> GapLike | None:
        for gap in self.gaps:
            if gap.from_seq <= seq and (gap.to_seq is None or seq < gap.to_seq):
                return gap
        return None


def _is_rollback(gap: GapLike) -> bool:
    return gap.code == "rollback"
