"""Writes that a primary refused: read back, journaled as they are, and the time between withheld (promise 2).

The refused write's record stands in the journal. What the primary really holds there follows as SYNC records, and a
GAP from the refused record to these, so no point is offered where journal and primary differed. Nothing from the
refused record on is published to readers before that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cdp import storage
from cdp.collector.volume import Reason, Volume, Watch
from cdp.errors import StorageError
from cdp.journal import batch

if TYPE_CHECKING:
    from cdp.collector.group import Group, NewRecord

# The largest region that is read back at once; only a ZERO can be longer, and then the whole volume is compared.
READ_BACK_BYTES = 32 << 20
SYNC_BYTES = 1 << 20
# A volume that refuses again within this time is in one gap until it has not for as long: a gap for each of thousands
# of writes a second would make every look at the timeline slow for as long as the window is.
STORM_NS = 1_000_000_000

Content = Callable[[bytes | None, BaseException | None], None]


@dataclass(slots=True, eq=False)
class Refused:
    """One refused write that is not dealt with yet."""

    volume: Volume
    offset: int
    length: int
    seq: int
    reading: bool = False


def read_as_journaled(volume: Volume, offset: int, length: int, done: Content) -> None:
    """The region as every write that is in the journal by now left it: when `done` runs, that is still so.

    From an asynchronous primary it is read again for as long as writes to it keep coming in between.
    """
    if volume.primary.inline:
        try:
            payload = volume.primary.read(offset, length)
        except (OSError, StorageError) as e:
            return done(None, e)
        return done(payload, None)
    watch = Watch(offset, offset + length)
    volume.watches.append(watch)

    def answered(payload: bytes | None, error: BaseException | None) -> None:
        if watch.touched and error is None:
            watch.touched = False
            volume.primary.read_later(offset, length, answered)
            return
        volume.watches.remove(watch)
        done(payload, error)

    volume.primary.read_later(offset, length, answered)


def sync_records(volume: int, offset: int, content: bytes) -> list[NewRecord]:
    """SYNC records of a region, zeros told apart from content."""
    records: list[NewRecord] = []
    view = memoryview(content)
    for at in range(0, len(content), SYNC_BYTES):
        piece = view[at : at + SYNC_BYTES]
        if piece == _ZEROS[: len(piece)]:
            records.append((batch.SYNC, batch.ZEROS, volume, offset + at, len(piece), b""))
        else:
            records.append((batch.SYNC, 0, volume, offset + at, len(piece), piece))
    return records


_ZEROS = memoryview(bytes(SYNC_BYTES))


def gap_open(volume: Volume, reason: Reason, from_seq: int = 0) -> NewRecord:
    """From `from_seq` (0: this record) on no point of the volume is offered."""
    return batch.GAP, batch.OPEN, volume.id, from_seq, 0, json.dumps(reason).encode()


def _reason(volume: Volume) -> Reason:
    return {"code": "refused_write", "text": f"The primary of {volume.name} refused a write."}


def _gap(volume: Volume, flags: int, from_seq: int) -> NewRecord:
    return batch.GAP, flags, volume.id, from_seq, 0, json.dumps(_reason(volume)).encode()


class RefusedWrites:
    """The refused writes of a group. Owned by the loop's thread."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._open: list[Refused] = []
        self._told: list[tuple[int, int]] = []  # seq of a refused write, seq of the last record about it

    def add(self, volume: Volume, offset: int, length: int, seq: int) -> None:
        """Call `settle` when the requests that were journaled together with it have been executed."""
        self._open.append(Refused(volume, offset, length, seq))

    @property
    def first_seq(self) -> int | None:
        """Readers may not see this record yet; None: nothing is open."""
        return min(r.seq for r in self._open) if self._open else None

    def reason_of(self, volume: Volume) -> Reason | None:
        """Why the volume's points of now will be withheld; None: nothing of it is open."""
        return _reason(volume) if any(r.volume is volume for r in self._open) else None

    def settle(self) -> None:
        """Deals with all that are open; what cannot be stops the group, and is tried again by it."""
        for refused in list(self._open):
            if refused.length > READ_BACK_BYTES:
                self._compare_all(refused)
            elif not refused.reading:
                refused.reading = True
                read_as_journaled(refused.volume, refused.offset, refused.length, partial(self._read, refused))

    def _read(self, refused: Refused, content: bytes | None, error: BaseException | None) -> None:
        refused.reading = False
        volume, group = refused.volume, self._group
        if content is None:
            group.stop("read_back", f"What {volume.name} holds after a refused write cannot be read: {error}.")
            return
        again = storage.monotonic_ns() - volume.refused_ns < STORM_NS
        # A batch for each, which any carrier can hold; readers see none of them before the last one is durable.
        records = sync_records(volume.id, refused.offset, content)
        if not volume.in_gap:  # else this is withheld already, and another GAP would end that
            records.append(_gap(volume, batch.OPEN if again else 0, refused.seq))
        if not all(group.try_append([record]) for record in records):
            return
        self._dealt_with(refused)
        volume.refused_ns = storage.monotonic_ns()
        if again and not volume.in_gap:
            volume.in_gap, volume.storm, volume.storm_seq = True, _reason(volume), refused.seq
            group.save_state()

    def end_storms(self, at_once: bool = False) -> None:
        """Once a second: a gap that was left open ends when nothing has been refused for a while."""
        group = self._group
        for volume in group.volumes:
            quiet = at_once or storage.monotonic_ns() - volume.refused_ns >= STORM_NS
            if volume.storm is None or not quiet or self.reason_of(volume) is not None:
                continue
            if volume.sync is None:  # else the pass ends the gap
                if not group.try_append([_gap(volume, 0, volume.storm_seq)]):
                    return
                volume.in_gap = False
            volume.storm = None
            group.save_state()

    def _dealt_with(self, refused: Refused) -> None:
        self._open.remove(refused)
        self._told.append((refused.seq, self._group.journal.last_seq))

    def visible(self, seq: int) -> int:
        """Readers may see up to `seq`, or less: a refused write not before what was journaled about it is durable."""
        durable_seq = self._group.journal.durable_seq
        self._told = [(first, told) for first, told in self._told if told > durable_seq]
        return min([seq, *(first - 1 for first, _ in self._told)])

    def _compare_all(self, refused: Refused) -> None:
        volume = refused.volume
        reason = {"code": "refused_zero", "text": f"The primary of {volume.name} refused to zero a large region."}
        if self._group.start_resync(volume, reason, refused.seq):
            self._dealt_with(refused)
