"""The history of one group: undo log, index and timeline as one thing (promises 4 to 9).

The undo log is the truth; index and timeline are derived and carry their own position. Order of life::

    history = History(folder, …); for extent in history.recover(committed): …; sync the replica; history.cut(committed)
    pending = history.append(batches, extents, fast); history.sync(pending); history.publish(pending)
    change the replica; history.applied_seq = …
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from cdp import storage
from cdp.errors import CorruptionError, StorageError
from cdp.history import retention
from cdp.history.blobs import AnyExtent, Extent
from cdp.history.changed import changed_blocks, to_extents
from cdp.history.fetch import Fetcher
from cdp.history.index import Place, Position, keys_of, position_put, puts_of, read_position, volumes_with_runs
from cdp.history.index_map import RocksMap, SortedMap
from cdp.history.timeline import Timeline
from cdp.history.timeline_rows import TimelineWriter
from cdp.history.touched import Touched
from cdp.history.undo import UndoLog, Written
from cdp.history.undo_format import BLOCK_BYTES, RUN_BIT, VOLUME_SHIFT, Array, Bundle
from cdp.history.view import View
from cdp.history.way_back import Step, extents_back
from cdp.journal.batch import Batch

__all__ = ["Extent", "History", "Pending", "Retained"]

log = logging.getLogger(__name__)
Raw = bytes  # the name is a property here
# Segments whose rows are removed from the index by one write: a window that is made shorter, or a pin that held it
# for days, frees thousands of them in one round.
_DROPPED_AT_ONCE = 8
# What is kept to be recycled counts as history, so it may take this part of a window that is limited by size.
_SPARE_PART = 8
_NO_MORE: AbstractContextManager[Iterable[int]] = nullcontext(())


def whole_seq(bundle: Bundle) -> int:
    """The last record that a bundle and those before it hold entirely; 0 if it is only a part of one: parts share a
    seq, so one that is durable says nothing of the next."""
    if not bundle.header.batch_count:
        return 0
    last = bundle.batches[-1]
    return int(last["first_seq"]) + int(last["record_count"]) - 1


class Pending:
    """A bundle on its way: appended, then synced, then published."""

    __slots__ = ("written", "synced", "whole_seq")

    def __init__(self, written: Written) -> None:
        self.written = written
        self.synced = False
        self.whole_seq = whole_seq(written.bundle)


class Retained(NamedTuple):
    """What a round of retention did. `short`: a point younger than the window is gone, and it is not refilled yet."""

    oldest_seq: int
    dropped: int
    freed_bytes: int
    short: bool
    pinned: bool


class History:
    """Written by one thread (`sync` by any), read by any. `applied_seq` is raised by whoever changes the replica."""

    def __init__(
        self, folder: str, *, segment_bytes: int, compress: bool = True, entries: SortedMap | None = None
    ) -> None:
        """Opens what is there. Raises CorruptionError, StorageError, OSError."""
        storage.makedirs(folder, exist_ok=True)
        self.log = UndoLog(os.path.join(folder, "undo"), segment_bytes=segment_bytes, compress=compress)
        self.entries: SortedMap = entries if entries is not None else RocksMap(os.path.join(folder, "index"))
        self.applied_seq = 0
        self.closed = False
        self._oldest_path = os.path.join(folder, "oldest")
        self._origin_seq = 0
        self.oldest_seq = 0
        self._begun = self._read_oldest()
        self._check_whole()
        self.run_volumes = volumes_with_runs(self.entries.cursor())
        self.touched = Touched(self.log.last_seq)
        self._rows = TimelineWriter(self.entries)
        self._torn: Bundle | None = None
        self._flushed_ordinal = 0
        self.timeline = Timeline(self.entries, self)

    # --- starting again

    def recover(self, committed_seq: int) -> Iterator[Extent]:
        """What must be written to the replica, in this order, for it to be at `committed_seq`.

        Verifies the tail first: above what is known to be durable a torn bundle is where the log ends; below it,
        CorruptionError.
        """
        self._check_reaches(committed_seq)
        steps = [Step.of(bundle) for bundle in self._sound_tail(committed_seq)]
        yield from extents_back(self.log, steps, committed_seq)

    def cut(self, committed_seq: int) -> None:
        """To be called once the replica is durable at `committed_seq`: what is above is gone, the index is whole."""
        self._check_reaches(committed_seq)
        bundles = self._sound_tail(committed_seq)
        if (first := next(bundles, None)) is not None:
            # The index first, and durably: it may say less than the log, never more.
            position = read_position(self.entries)
            if position is not None and position[:2] > (first.ordinal, first.start):
                position = Position(first.ordinal, first.start, committed_seq)
            puts = [position_put(position)] if position is not None else []
            self.entries.write(puts, keys_of(first.rows["code"], first.rows["seq"]))
            for bundle in bundles:
                self.entries.write((), keys_of(bundle.rows["code"], bundle.rows["seq"]))
            self._rows.cut(min(committed_seq, first.header.first_seq - 1))
            self.entries.flush()
            self.log.cut(first, committed_seq)
        elif self._torn is not None:
            self.log.cut(self._torn, committed_seq)
        self._torn = None
        self.log.free_left()
        self._catch_up()
        if not self._begun and not self.log.segments:
            self.oldest_seq = self._origin_seq = committed_seq
        self.applied_seq = committed_seq
        self.run_volumes = volumes_with_runs(self.entries.cursor())

    def _sound_tail(self, committed_seq: int) -> Iterator[Bundle]:
        """Bundles with anything above `committed_seq`, blobs verified, up to the first torn one."""
        position = read_position(self.entries)
        durable = max(self.log.synced_seq, committed_seq, position.seq if position else 0)
        if position is not None and position.seq > self.log.last_seq:
            raise CorruptionError(
                f"The undo log ends at seq {self.log.last_seq}, but had reached {position.seq}.", "Resync the volumes."
            )
        fetch = Fetcher(self.log)
        for bundle in self.log.bundles_after(committed_seq):
            try:
                for code, seq, offset, crc, length in bundle.rows.tolist():
                    fetch.whole(code, seq, Place(bundle.ordinal, offset, crc, length))
            except CorruptionError:
                published = position is not None and (bundle.ordinal, bundle.end) <= position[:2]
                if published or bundle.header.last_seq <= durable:
                    raise
                self._torn = bundle
                return
            yield bundle

    def _catch_up(self) -> None:
        """Indexes what the log has beyond the index's position."""
        position = read_position(self.entries) or Position(0, 0, 0)
        for segment in list(self.log.segments.values()):
            if segment.ordinal >= position.ordinal:
                start = position.offset if segment.ordinal == position.ordinal else 0
                for bundle in self.log.bundles_of(segment, start):
                    self._index(bundle)

    def _check_reaches(self, committed_seq: int) -> None:
        if self._begun and max(self.log.last_seq, self._origin_seq) < committed_seq:
            raise CorruptionError(
                f"The undo log ends at seq {self.log.last_seq}, but the replica is at {committed_seq}.",
                "Restore the history's folder, or resync the group's volumes.",
            )

    # --- writing

    def append(self, batches: Sequence[Batch], extents: Sequence[AnyExtent], fast: bool) -> Pending:
        """Writes a bundle, not synced; `fast` without compression.

        The extents of a batch may be spread over several bundles; the last of them carries the batch. Raises OSError
        (nothing was appended), StorageError after a sync that failed.
        """
        if not self._begun:
            first = batches[0].first_seq if batches else extents[0][3]
            self._origin_seq = self.oldest_seq = first - 1
            self._write_oldest()
            self._begun = True
        return Pending(self.log.append(batches, extents, fast))

    def sync(self, pending: Pending) -> None:
        """Makes it durable: system calls only, from any thread. After an OSError the history takes nothing more."""
        self.log.sync(pending.written)
        pending.synced = True

    def publish(self, pending: Pending) -> None:
        """Index and timeline know it: from here the replica may change. In the order of `append`. After an OSError (no
        space) it may be tried again."""
        if not pending.synced:
            raise StorageError("A bundle was published before it was synced.")
        self.log.synced_seq = max(self.log.synced_seq, pending.whole_seq)
        self._index(pending.written.bundle)

    def _index(self, bundle: Bundle) -> None:
        rows = bundle.rows
        self.run_volumes |= set((rows["code"][rows["code"] & RUN_BIT != 0] >> VOLUME_SHIFT).tolist())
        self.touched.note(rows["code"], bundle.header.last_seq)
        puts = puts_of(bundle)
        puts += self._rows.puts_of(bundle)
        puts.append(position_put(Position(bundle.ordinal, bundle.end, max(self.log.synced_seq, whole_seq(bundle)))))
        try:
            self.entries.write(puts)
        except OSError:
            self._rows.reload()  # what it remembers of this bundle is not in the map: another attempt makes it again
            raise

    # --- retention

    def retain(
        self, window_ns: int | None, window_bytes: int | None, pins: Iterable[int], now_ns: int,
        still: AbstractContextManager[Iterable[int]] = _NO_MORE,
    ) -> Retained:  # fmt: skip
        """Drops the oldest segments that neither the window nor a pin needs. None: no such limit.

        The replica's committed seq must be among the pins: putting it back needs every entry after that. `still`
        gives more of them, and lets nobody add one while it is decided what goes.
        """
        facts = [
            retention.SegmentFacts(s.ordinal, s.last_seq, s.last_order_ns, s.file_bytes)
            for s in self.log.segments.values()
        ]
        if window_bytes is not None:
            self.log.give_back(window_bytes // _SPARE_PART)
        other = self.bytes - sum(f.bytes for f in facts)
        with still as more:
            wanted = retention.decide(facts, window_ns, window_bytes, [*pins, *more], now_ns, other)
            self.oldest_seq = max(self.oldest_seq, wanted.oldest_seq or 0)
        freed = sum(f.bytes for f in facts if f.ordinal in set(wanted.drop))
        if wanted.drop:
            self._write_oldest()
            for at in range(0, len(wanted.drop), _DROPPED_AT_ONCE):
                self._drop(wanted.drop[at : at + _DROPPED_AT_ONCE])
        return Retained(self.oldest_seq, len(wanted.drop), freed, self._is_short(window_ns, now_ns), wanted.pinned)

    def _drop(self, ordinals: Sequence[int]) -> None:
        self._rows.expire(self.log.segments[ordinals[-1]].last_seq)
        if ordinals[-1] >= self._flushed_ordinal and (newest := self.log.newest) is not None:
            # Names of bookmarks must outlive the segments that say them.
            self.entries.flush()
            self._flushed_ordinal = newest.ordinal
        for ordinal in ordinals:
            try:
                codes, seqs = self.log.columns(self.log.segments[ordinal])
            except StorageError as e:  # damaged; no look-up asks for what is at or before the oldest point
                log.warning("Entries of a dropped part of the history stay in the index: %s", e)
                continue
            self.entries.write((), keys_of(codes, seqs))
        self.log.drop(ordinals)

    def _is_short(self, window_ns: int | None, now_ns: int) -> bool:
        if window_ns is None or self.oldest_seq <= self._origin_seq:
            return False
        oldest = self.timeline.time_of(self.oldest_seq)
        return oldest > now_ns - window_ns

    def _read_oldest(self) -> bool:
        try:
            found = json.loads(storage.read_file(self._oldest_path))
            self.oldest_seq, self._origin_seq = int(found["oldest_seq"]), int(found["origin_seq"])
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptionError(f"{self._oldest_path} is not what was written: {e}.") from e
        return True

    def _write_oldest(self) -> None:
        content = {"oldest_seq": self.oldest_seq, "origin_seq": self._origin_seq}
        storage.write_file(self._oldest_path, json.dumps(content).encode() + b"\n")

    def _check_whole(self) -> None:
        """What the window needs must be there."""
        first = next(iter(self.log.segments.values()), None)
        if first is not None and not self._begun:  # without its file the window begins where the log does
            self.oldest_seq = self._origin_seq = first.opening.prev_seq
            self._write_oldest()
            self._begun = True
        if first is not None and first.opening.prev_seq > self.oldest_seq:
            raise CorruptionError(
                f"The undo log begins after seq {first.opening.prev_seq}, but the window at {self.oldest_seq}.",
                "Restore the missing files, or resync the group's volumes.",
            )

    # --- reading

    @property
    def bytes(self) -> int:
        """Space that the history takes, index included."""
        return self.log.bytes + self.entries.bytes()

    @property
    def incarnations(self) -> list[tuple[int, Raw]]:
        """(epoch, id) of the lives of the collector whose batches are in the log, oldest first; the newest 96."""
        return list(self.log.newest.incarnations) if self.log.newest else []

    @property
    def last_crc(self) -> int:
        """Checksum of the last batch in the log, for the chain."""
        return self.log.newest.last_crc if self.log.newest else 0

    @property
    def group_id(self) -> Raw:
        """The journal that the log follows; b"" if it is empty."""
        return self.log.newest.group_id if self.log.newest else b""

    def view(self, replica_fd: int, volume: int, seq: int, size: int, applied_seq: int) -> View:
        """A volume at a point. `size` is the volume's there, `applied_seq` what `View.changed` compares with."""
        return View(self, replica_fd, volume, seq, size, applied_seq)

    def changed_blocks(self, volume: int, after_seq: int, up_to_seq: int) -> tuple[Array, Array]:
        """(first blocks, counts) of what was written in (after_seq, up_to_seq], in order and apart.

        Raises StorageError when `after_seq` is not in the window.
        """
        found = changed_blocks(self.log, volume, after_seq, up_to_seq)
        if after_seq < self.oldest_seq:
            raise StorageError(f"Seq {after_seq} has left the window, which begins at seq {self.oldest_seq}.")
        return found

    def changed(self, volume: int, after_seq: int, up_to_seq: int) -> list[tuple[int, int]]:
        """The same as (offset, length): as many as there are."""
        return to_extents(*self.changed_blocks(volume, after_seq, up_to_seq))

    def close(self) -> None:
        """Makes the index durable and lets go of everything. No view of it answers any more: close it before the
        replica's files."""
        self.closed = True
        self.entries.close()
        self.log.close()


assert BLOCK_BYTES == storage.PAGE_BYTES
