"""The write-intent map of a volume: which regions may differ between journal and primary after a power cut (promise 2).

A region's bit is durable before the first write to it is journaled, and is cleared when its last write is well
behind a durable checkpoint. So after a power cut only the regions that are set need to be compared. Owned by the
loop's thread; the syncs run on a worker.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from cdp import storage
from cdp.collector.intent_file import IntentFile, regions_of, shift_of

log = logging.getLogger(__name__)

# A mark is a byte: the turn of the region's last write, from 1 on; at the last one all are moved back.
_LAST_TURN, _MOVED_TURNS = 255, 128
# Turns (checkpoints: 10 s under load) without a write before a bit is cleared: a region that is written now and then
# must not cost a sync each time.
IDLE_TURNS = 30
# After a region that is written in this very turn come others: set with it, so that a stream costs a sync for each so
# many regions, not for each one.
AHEAD_REGIONS = 64

Set = Callable[[BaseException | None], None]
Region = tuple[int, int]  # first and last number


class IntentMap:
    """`marks[offset >> shift]` is 0 for a region that must be asked for with `want` before it is written; a write to
    any other notes `turn` there. Both are attributes because the batch loop looks at them for each request."""

    def __init__(self, path: str, size: int, worker: storage.Worker, is_new: bool) -> None:
        """Raises OSError."""
        self._file = IntentFile(path, size, is_new)
        self._size, self._worker = size, worker
        self.shift = shift_of(size)
        self._regions = regions_of(size, self.shift)
        self.marks = bytearray(self._file.bits)
        self.known = is_new or self._file.known  # else nobody knows which regions were written
        self.turn = 2  # what was found is of turn 1
        self._turns: deque[tuple[int, int]] = deque()  # (turn, the journal's last seq when it ended)
        self._wanted: list[tuple[list[Region], Set]] = []
        self._syncing = False

    def touched(self) -> list[tuple[int, int]]:
        """(offset, length) of the stretches whose bits are set, in order."""
        stretches = []
        flat = self.marks.translate(_IS_SET)
        first = flat.find(1)
        while first >= 0:
            end = flat.find(0, first)
            end = self._regions if end < 0 else end
            offset = first << self.shift
            stretches.append((offset, min(end << self.shift, self._size) - offset))
            first = flat.find(1, end)
        return stretches

    def missing(self, ranges: Iterable[tuple[int, int]]) -> list[Region]:
        """The regions of these (offset, length) that must be wanted first. Notes the turn of all others."""
        lacking, marks, shift, turn = [], self.marks, self.shift, self.turn
        for offset, length in ranges:
            first, last = offset >> shift, (offset + length - 1) >> shift
            if 0 in marks[first : last + 1]:
                lacking.append((first, last))
            else:
                marks[first : last + 1] = bytes((turn,)) * (last + 1 - first)
        return lacking

    def want(self, regions: list[Region], done: Set) -> None:
        """`done` when these are durably set, and may be written; or with the error. One sync serves all who wait."""
        self._wanted.append((regions, done))
        if not self._syncing:
            self._sync()

    def want_now(self, regions: list[Region]) -> None:
        """The same at once; blocks. Raises OSError."""
        marks = self._with(regions)
        self._file.put(self._file.encode(marks))
        self._set(regions)

    def _sync(self) -> None:
        wanted, self._wanted = self._wanted, []
        regions = [self._ahead(region) for found, _ in wanted for region in found]
        slot = self._file.encode(self._with(regions))
        self._syncing = True

        def synced(_: object, error: BaseException | None) -> None:
            self._syncing = False
            if error is None:
                self._set(regions)
            else:
                log.error("the write-intent map cannot be written: %s", error)
            if self._wanted:
                self._sync()
            for _, done in wanted:
                done(error)

        self._worker.submit(synced, self._file.put, slot)

    def _ahead(self, region: Region) -> Region:
        first, last = region
        if first and self.marks[first - 1] == self.turn:
            last = min(max(last, first + AHEAD_REGIONS - 1), self._regions - 1)
        return first, last

    def _with(self, regions: list[Region]) -> bytearray:
        marks = bytearray(self.marks)
        for first, last in regions:
            marks[first : last + 1] = b"\1" * (last + 1 - first)
        return marks

    def _set(self, regions: list[Region]) -> None:
        for first, last in regions:
            self.marks[first : last + 1] = bytes((self.turn,)) * (last + 1 - first)

    # --- clearing

    def end_turn(self, last_seq: int) -> None:
        """A round that syncs everything begins; `last_seq` is the journal's."""
        self._turns.append((self.turn, last_seq))
        self.turn += 1
        if self.turn > _LAST_TURN:
            self.turn -= _MOVED_TURNS
            self.marks = self.marks.translate(_MOVED_BACK)
            self._turns = deque((turn - _MOVED_TURNS, seq) for turn, seq in self._turns if turn > _MOVED_TURNS)

    def checkpointed(self, seq: int) -> None:
        """A checkpoint at `seq` is durable: what was last written long before it needs no bit any more."""
        covered = 0
        while self._turns and self._turns[0][1] <= seq:
            covered, _ = self._turns.popleft()
        idle = min(covered, self.turn - IDLE_TURNS)
        if self._syncing or idle < 1:
            return  # the next one does it
        marks = self.marks.translate(bytes(0 if mark <= idle else mark for mark in range(256)))
        if marks != self.marks:
            self.marks = marks
            self._sync()

    def close(self) -> None:
        self._file.close()


class NoIntent:
    """Of a volume that is never compared: all of it is one region, which is set."""

    def __init__(self) -> None:
        self.marks, self.shift, self.turn = bytearray(b"\1"), 63, 1

    def missing(self, ranges: Iterable[tuple[int, int]]) -> list[Region]:
        return []

    def want(self, regions: list[Region], done: Set) -> None:
        raise AssertionError("nothing is ever missing")

    def want_now(self, regions: list[Region]) -> None:
        raise AssertionError("nothing is ever missing")


_IS_SET = b"\0" + b"\1" * 255
_MOVED_BACK = bytes(0 if mark == 0 else max(1, mark - _MOVED_TURNS) for mark in range(256))

