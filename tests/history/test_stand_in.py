"""The index on another sorted map: nothing in the history knows which one it has."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from sortedcontainers import SortedDict

from cdp.errors import StorageError
from cdp.history.history import History
from cdp.journal import batch as journal
from tests.history.support import BLOCK, Group, bookmark, resize, write


class MemoryMap:
    """A map that forgets everything when its process ends."""

    def __init__(self) -> None:
        self._rows: SortedDict[bytes, bytes] = SortedDict()

    def get(self, key: bytes) -> bytes | None:
        return self._rows.get(key)

    def cursor(self) -> MemoryCursor:
        return MemoryCursor(list(self._rows.items()))

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes] = ()) -> None:
        for key in deletes:
            self._rows.pop(key, None)
        self._rows.update(puts)

    def flush(self) -> None:
        """Nothing outlives it anyway."""

    def bytes(self) -> int:
        return sum(len(k) + len(v) for k, v in self._rows.items())

    def close(self) -> None:
        self._rows.clear()


class MemoryCursor:
    """Over a copy, as the contract says: a snapshot."""

    def __init__(self, rows: list[tuple[bytes, bytes]]) -> None:
        self._rows = SortedDict(rows)
        self._keys = self._rows.keys()
        self._at = -1

    def seek(self, key: bytes) -> None:
        self._at = self._rows.bisect_left(key)

    def seek_for_prev(self, key: bytes) -> None:
        self._at = self._rows.bisect_right(key) - 1

    def valid(self) -> bool:
        return 0 <= self._at < len(self._rows)

    def status(self) -> None:
        """Memory can be read."""

    def key(self) -> bytes:
        return self._keys[self._at]

    def value(self) -> bytes:
        return self._rows[self._keys[self._at]]

    def next(self) -> None:
        self._at += 1

    def prev(self) -> None:
        self._at -= 1


class FullMap(MemoryMap):
    """Refuses writes while `full`."""

    full = False

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes] = ()) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(puts, deletes)


class CountedMap(MemoryMap):
    """Keeps the number of rows that the largest write removed."""

    most = 0

    def write(self, puts: Iterable[tuple[bytes, bytes]], deletes: Iterable[bytes] = ()) -> None:
        deletes = list(deletes)
        self.most = max(self.most, len(deletes))
        super().write(puts, deletes)


class Standing(Group):
    """A group whose index is in memory."""

    def open(self) -> History:
        folder = str(self.folder / "history")
        return History(folder, segment_bytes=1 << 17, compress=True, entries=MemoryMap())


def test_same_life_on_another_map(tmp_path: Path) -> None:
    group = Standing(tmp_path, 40)
    group.bundle([resize(40 * BLOCK, "db"), bookmark("first")])
    for i in range(12):
        group.bundle([write(i, os.urandom(BLOCK) * 20)], [write(i, bytes(BLOCK)), bookmark(f"b{i}")])
    middle = group.batches[len(group.batches) // 2].last_seq
    group.history.close()
    group.history = group.open()  # with an empty map: all of it is made again
    group.put_back(middle)
    assert os.pread(group.fd, 40 * BLOCK, 0) == group.versions[middle]
    assert group.history.retain(None, 1 << 17, [middle], 0).dropped
    oldest = group.history.oldest_seq
    assert 0 < oldest <= middle
    assert all(group.read(seq) == v for seq, v in group.versions.items() if seq >= oldest)
    assert group.history.timeline.was_bookmark("first")
    group.close()


def test_what_leaves_the_window_in_one_round_goes_in_pieces(tmp_path: Path) -> None:
    """Promise 9: a pin that was held for days has kept millions of rows."""

    class Counted(Group):
        def open(self) -> History:
            folder = str(self.folder / "history")
            return History(folder, segment_bytes=1 << 14, compress=True, entries=CountedMap())

    group = Counted(tmp_path, 8)
    for _ in range(120):
        group.bundle([write(0, os.urandom(BLOCK))])
    kept = group.history.retain(None, 0, [], 0)
    assert kept.dropped > 32 and kept.oldest_seq > 90
    assert isinstance(group.history.entries, CountedMap) and group.history.entries.most < 40
    assert all(group.read(seq) == v for seq, v in group.versions.items() if seq >= kept.oldest_seq)
    group.close()


def test_a_pin_at_the_committed_seq_keeps_what_putting_back_needs(tmp_path: Path) -> None:
    """Promise 5: retention by size takes nothing that the replica may still have to be put back with."""
    group = Group(tmp_path, 40, segment_bytes=1 << 16)
    committed = group.bundle([write(0, os.urandom(BLOCK) * 20)])
    for i in range(8):
        group.bundle([write(i, os.urandom(BLOCK) * 20)])
    kept = group.history.retain(None, 0, [committed], 0)
    assert kept.pinned and kept.oldest_seq <= committed
    group.history.close()
    group.history = group.open()
    group.put_back(committed)
    assert os.pread(group.fd, 40 * BLOCK, 0) == group.versions[committed]
    group.close()


def test_a_cut_inside_of_a_batch_is_refused(tmp_path: Path) -> None:
    group = Group(tmp_path, 40)
    group.bundle([write(0, bytes([1]) * BLOCK), write(1, bytes([2]) * BLOCK)])
    with pytest.raises(StorageError, match="not the end of a batch"):
        group.put_back(1)
    group.close()


def test_a_reset_history_begins_behind_the_journal_so_far(tmp_path: Path) -> None:
    """Killed between the first append's note of the window and the append itself."""
    group = Group(tmp_path, 40)
    group.history.close()
    (tmp_path / "history" / "oldest").write_text('{"oldest_seq": 70, "origin_seq": 70}')
    group.history = group.open()
    group.history.cut(70)
    assert (group.history.oldest_seq, group.history.applied_seq) == (70, 70)
    group.close()


def test_a_bundle_that_found_no_room_in_the_index_is_published_whole_later(tmp_path: Path) -> None:
    """Promise 8: a size, the end of a gap and the end of a rollback are not forgotten with the write that failed."""
    group = Group(tmp_path, 8)
    group.history.close()
    entries = FullMap()
    group.history = History(str(tmp_path / "history"), segment_bytes=1 << 20, entries=entries)
    group.history.cut(0)
    about, volumes = b'{"code": "resync", "text": ""}', {"volumes": [0], "target_seq": 1, "bookmark": "b"}
    for end in (False, True):
        said = {"begin": 3, "volumes": [0]} if end else volumes
        pieces = [
            resize(8 * BLOCK, "db") if end else write(0, bytes(BLOCK)),
            (journal.GAP, 0 if end else journal.OPEN, 0, 0, 0, about),
            (journal.ROLLBACK_END if end else journal.ROLLBACK_BEGIN, 0, 0, 0, 0, json.dumps(said).encode()),
        ]
        batch = group.stream.batch(pieces)
        pending = group.history.append([batch], group.plan(batch), False)
        group.history.sync(pending)
        entries.full = True
        with pytest.raises(OSError, match="No space"):
            group.history.publish(pending)
        entries.full = False
        group.history.publish(pending)
        group.apply([batch])
    timeline = group.history.timeline
    assert timeline.size_at(0, 6) == 8 * BLOCK
    assert [(gap.code, gap.from_seq, gap.to_seq) for gap in timeline.gaps(0)] == [("resync", 2, 5), ("rollback", 4, 6)]
    group.close()
