"""The timeline's rows in the sorted map, and how bundles, cuts and retention change them.

Big-endian keys, so that rows stand in the order of their seqs::

    S first_seq            order_ns u64, count u32          a batch
    N name                 seq                              a bookmark;   n seq -> name
    E name                 seq                              an expired bookmark;   e seq name -> nothing
    V volume seq           nothing                          a barrier of that volume
    W first_seq            last seq                         a request that was split: inside of it is no point; while
                                                            its last piece is not there, beyond the last record
    Z volume seq           size u64, name                   a volume's size from here on
    G volume from_seq      to_seq u64 (0: open), seq of the record that made the row u64, JSON {"code", "text"}
    K begin_seq            end_seq u64 (0: runs), flags u8, JSON of ROLLBACK_BEGIN
    C seq                  order_ns u64, ahead_ns i64       a clock step
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from cdp.history.index_map import Cursor, SortedMap
from cdp.history.meta import DESCRIBING
from cdp.history.undo_format import DESCRIPTOR, Array, Bundle
from cdp.journal.batch import BARRIER, BOOKMARK, CONTINUED, FUA, GAP, OPEN, RESIZE, ROLLBACK_BEGIN, WRITE, ZERO

SEQ = struct.Struct(">Q")
VOLUME_SEQ = struct.Struct(">HQ")
BATCH_VALUE = struct.Struct(">QI")
GAP_VALUE = struct.Struct(">QQ")
ROLLBACK_VALUE = struct.Struct(">QB")
STEP_VALUE = struct.Struct(">Qq")
MAX_SEQ = (1 << 64) - 1
# The code of the first gap of a volume that was not empty.
INITIAL_SYNC = "initial_sync"
# Expired names that are still known to have been bookmarks.
MAX_EXPIRED = 10_000
# Wall and order time drift apart by less when nobody sets a clock.
CLOCK_STEP_NS = 1_000_000_000

_BATCH_KEYS = np.dtype([("prefix", "S1"), ("seq", ">u8")])
_BATCH_VALUES = np.dtype([("order_ns", ">u8"), ("count", ">u4")])
Puts = list[tuple[bytes, bytes]]
Rows = Iterator[tuple[bytes, bytes]]


def rows(cursor: Cursor, prefix: bytes, start: bytes = b"") -> Rows:
    """(key without prefix, value) of the rows under `prefix`, from `prefix + start` on."""
    cursor.seek(prefix + start)
    while cursor.valid() and (key := cursor.key()).startswith(prefix):
        yield key[len(prefix) :], cursor.value()
        cursor.next()
    if not cursor.valid():
        cursor.status()


def rows_back(cursor: Cursor, prefix: bytes, last: bytes) -> Rows:
    """As `rows`, from `prefix + last` back."""
    cursor.seek_for_prev(prefix + last)
    while cursor.valid() and (key := cursor.key()).startswith(prefix):
        yield key[len(prefix) :], cursor.value()
        cursor.prev()
    if not cursor.valid():
        cursor.status()


class TimelineWriter:
    """Makes the rows; the writer's thread alone. What it remembers is bounded by volumes and open gaps."""

    def __init__(self, entries: SortedMap) -> None:
        self._entries = entries
        self.reload()

    def reload(self) -> None:
        """Takes its memory from the rows again."""
        cursor = self._entries.cursor()
        self._sizes: dict[int, bytes] = {}
        self._declared: dict[int, int] = {}  # the first seq of each
        for key, value in rows(cursor, b"Z"):
            volume, seq = VOLUME_SEQ.unpack(key)
            self._sizes[volume] = value
            self._declared.setdefault(volume, seq)
        self._open_gaps = {key: value for key, value in rows(cursor, b"G") if not GAP_VALUE.unpack_from(value)[0]}
        self._rollbacks = {key: value for key, value in rows(cursor, b"K") if not ROLLBACK_VALUE.unpack_from(value)[0]}
        step = next(rows_back(cursor, b"C", SEQ.pack(MAX_SEQ)), None)
        self._ahead_ns = STEP_VALUE.unpack(step[1])[1] if step else 0
        self._expired = sum(1 for _ in rows(cursor, b"e"))
        self._open_split = _open_split(cursor)

    # --- bundles

    def puts_of(self, bundle: Bundle) -> Puts:
        """The rows that a bundle adds or changes."""
        if not bundle.header.batch_count:
            return []
        batches = bundle.batches
        puts = self._batch_rows(batches)
        self._clock_steps(batches, puts)
        described = np.frombuffer(bundle.descriptors, DESCRIPTOR)
        kinds, flags = described["kind"], described["flags"]
        first_seq = int(batches["first_seq"][0])
        split = self._go_on_with_split(first_seq, flags, puts) if self._open_split else 0
        telling = ((kinds != WRITE) & (kinds != ZERO)) | ((flags & (FUA | CONTINUED)) != 0)
        if telling.any():
            self._records(bundle, first_seq, split, described, np.flatnonzero(telling), puts)
        return puts

    def _go_on_with_split(self, first_seq: int, flags: Array, puts: Puts) -> int:
        """The request that the bundle before left unfinished: its end. Where its collector died in the middle, that is
        whatever record comes next: what stands before it is what the primary got, too."""
        end = first_seq + _end_of_split(flags, 0)
        puts.append((b"W" + SEQ.pack(self._open_split), SEQ.pack(end)))
        if end < first_seq + len(flags):
            self._open_split = 0
        return end

    def _batch_rows(self, batches: Array) -> Puts:
        keys, values = np.empty(len(batches), _BATCH_KEYS), np.empty(len(batches), _BATCH_VALUES)
        keys["prefix"], keys["seq"] = b"S", batches["first_seq"]
        values["order_ns"], values["count"] = batches["order_ns"], batches["record_count"]
        return list(zip(keys.view("V9").tolist(), values.view("V12").tolist(), strict=True))

    def _clock_steps(self, batches: Array, puts: Puts) -> None:
        ahead = batches["order_ns"].astype(np.int64) - batches["wall_ns"].astype(np.int64)
        if int(np.abs(ahead - self._ahead_ns).max()) <= CLOCK_STEP_NS:
            return
        for seq, order_ns, now in zip(batches["first_seq"].tolist(), batches["order_ns"].tolist(), ahead.tolist(),
                                      strict=True):  # fmt: skip
            if abs(now - self._ahead_ns) > CLOCK_STEP_NS:
                self._ahead_ns = now if abs(now) > CLOCK_STEP_NS else 0
                puts.append((b"C" + SEQ.pack(seq), STEP_VALUE.pack(order_ns, self._ahead_ns)))

    def _records(
        self, bundle: Bundle, first_seq: int, split: int, described: Array, telling: Array, puts: Puts
    ) -> None:
        """`split`: where a request from the bundle before ends."""
        notes, at = memoryview(bundle.notes), 0
        for i, (kind, flags, volume, data_bytes, offset, length) in zip(
            telling.tolist(), described[telling].tolist(), strict=True
        ):
            seq = first_seq + i
            data = b""
            if kind in DESCRIBING:
                data = bytes(notes[at : at + data_bytes])
                at += data_bytes
            if kind == BARRIER or (flags & FUA and kind in (WRITE, ZERO)):
                puts.append((b"V" + VOLUME_SEQ.pack(volume, seq), b""))
            elif kind in DESCRIBING:
                self._describing(kind, flags, volume, offset, length, seq, data, puts)
            if flags & CONTINUED and kind in (WRITE, ZERO) and seq > split:
                split = first_seq + _end_of_split(described["flags"], i)
                puts.append((b"W" + SEQ.pack(seq), SEQ.pack(split)))
                if split == first_seq + len(described):
                    self._open_split = seq

    def _describing(
        self, kind: int, flags: int, volume: int, offset: int, length: int, seq: int, data: bytes, puts: Puts
    ) -> None:
        if kind == BOOKMARK:
            puts += [(b"N" + data, SEQ.pack(seq)), (b"n" + SEQ.pack(seq), data)]
        elif kind == RESIZE:
            size = SEQ.pack(length) + data
            if self._sizes.get(volume) != size:
                self._sizes[volume] = size
                self._declared.setdefault(volume, seq)
                puts.append((b"Z" + VOLUME_SEQ.pack(volume, seq), size))
        elif kind == GAP:
            self._gap(flags, volume, offset, seq, data, puts)
        elif kind == ROLLBACK_BEGIN:
            name = f"rollback-{seq}".encode()
            puts += [(b"N" + name, SEQ.pack(seq)), (b"n" + SEQ.pack(seq), name)]
            value = ROLLBACK_VALUE.pack(0, 0) + data
            self._rollbacks[SEQ.pack(seq)] = value
            puts.append((b"K" + SEQ.pack(seq), value))
        else:
            begin = SEQ.pack(int(_json(data).get("begin", 0)))
            if (value := self._rollbacks.pop(begin, b"")) != b"":
                puts.append((b"K" + begin, ROLLBACK_VALUE.pack(seq, flags) + value[ROLLBACK_VALUE.size :]))

    def _gap(self, flags: int, volume: int, from_seq: int, seq: int, data: bytes, puts: Puts) -> None:
        key = VOLUME_SEQ.pack(volume, from_seq or seq)
        if flags & OPEN:
            if not from_seq and _json(data).get("code") == INITIAL_SYNC:
                # It held data before it was declared: the record of that is no point of it either.
                key = VOLUME_SEQ.pack(volume, self._declared.get(volume, seq))
            value = self._open_gaps.get(key) or GAP_VALUE.pack(0, seq) + data
            self._open_gaps[key] = value
            puts.append((b"G" + key, value))
            return
        closed = [k for k in self._open_gaps if VOLUME_SEQ.unpack(k)[0] == volume]
        for k in closed:
            value = self._open_gaps.pop(k)
            made = GAP_VALUE.unpack_from(value)[1]
            puts.append((b"G" + k, GAP_VALUE.pack(seq, made) + value[GAP_VALUE.size :]))
        if 0 < from_seq < seq and not any(k <= key for k in closed):
            puts.append((b"G" + key, GAP_VALUE.pack(seq, seq) + data))

    # --- cuts

    def cut(self, last_seq: int) -> None:
        """The rows are as they were when `last_seq` was the newest."""
        cursor, after = self._entries.cursor(), SEQ.pack(last_seq + 1)
        gone = [p + key for p in (b"S", b"W", b"C", b"K") for key, _ in rows(cursor, p, after)]
        for key, name in rows(cursor, b"n", after):
            gone += [b"n" + key, b"N" + name]
        puts: Puts = []
        for prefix in (b"V", b"Z"):
            gone += [prefix + key for key in _beyond(cursor, prefix, last_seq)]
        for key, value in list(rows(cursor, b"G")):
            to_seq, made = GAP_VALUE.unpack_from(value)
            if made > last_seq:
                gone.append(b"G" + key)
            elif to_seq > last_seq:
                puts.append((b"G" + key, GAP_VALUE.pack(0, made) + value[GAP_VALUE.size :]))
        for key, value in list(rows(cursor, b"K")):
            end = ROLLBACK_VALUE.unpack_from(value)[0]
            if SEQ.unpack(key)[0] <= last_seq < end:
                puts.append((b"K" + key, ROLLBACK_VALUE.pack(0, 0) + value[ROLLBACK_VALUE.size :]))
        self._entries.write(puts, gone)
        self.reload()

    # --- retention

    def expire(self, oldest_seq: int) -> None:
        """Drops what only says something about points before `oldest_seq`; names that go are remembered."""
        cursor, at = self._entries.cursor(), SEQ.pack(oldest_seq)
        holder = next(rows_back(cursor, b"S", at), (at, b""))[0]
        gone = [b"S" + key for key, _ in _until(rows(cursor, b"S"), holder)]
        for key, value in rows(cursor, b"W"):
            if SEQ.unpack(value)[0] > oldest_seq:
                break
            gone.append(b"W" + key)
        steps = [key for key, _ in _until(rows(cursor, b"C"), SEQ.pack(oldest_seq + 1))]
        gone += [b"C" + key for key in steps[:-1]]
        gone += _barriers_before(cursor, oldest_seq) + _sizes_before(cursor, oldest_seq)
        for prefix, value_format in ((b"G", GAP_VALUE), (b"K", ROLLBACK_VALUE)):
            gone += [prefix + k for k, v in rows(cursor, prefix) if 0 < value_format.unpack_from(v)[0] <= oldest_seq]
        self._entries.write(self._expire_names(cursor, at, gone), gone)

    def _expire_names(self, cursor: Cursor, oldest: bytes, gone: list[bytes]) -> Puts:
        puts: Puts = []
        for key, name in list(_until(rows(cursor, b"n"), oldest)):
            gone += [b"n" + key, b"N" + name]
            puts += [(b"E" + name, key), (b"e" + key + name, b"")]
            self._expired += 1
        for key, _ in rows(cursor, b"e"):
            if self._expired <= MAX_EXPIRED:
                break
            gone += [b"e" + key, b"E" + key[SEQ.size :]]
            self._expired -= 1
        return puts


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _end_of_split(flags: Array, i: int) -> int:
    """Index of the last piece of the request that goes on at `i`; behind the end if it is not there. The pieces of a
    request follow each other, in one batch or several."""
    for j in range(i, len(flags)):
        if not int(flags[j]) & CONTINUED:
            return j
    return len(flags)


def _open_split(cursor: Cursor) -> int:
    """The first seq of the request of which the newest record is a piece, and not the last one; 0 if there is none."""
    batch = next(rows_back(cursor, b"S", SEQ.pack(MAX_SEQ)), None)
    split = next(rows_back(cursor, b"W", SEQ.pack(MAX_SEQ)), None)
    if batch is None or split is None:
        return 0
    last_seq = SEQ.unpack(batch[0])[0] + BATCH_VALUE.unpack(batch[1])[1] - 1
    return int(SEQ.unpack(split[0])[0]) if SEQ.unpack(split[1])[0] > last_seq else 0


def _until(found: Rows, end: bytes) -> Rows:
    for key, value in found:
        if key[: len(end)] >= end:
            return
        yield key, value


def volumes_of(cursor: Cursor, prefix: bytes) -> Iterator[int]:
    """Volumes that have rows under `prefix`."""
    volume = 0
    while volume <= 0xFFFF:
        found = next(rows(cursor, prefix, VOLUME_SEQ.pack(volume, 0)), None)
        if found is None:
            return
        volume = VOLUME_SEQ.unpack(found[0])[0]
        yield volume
        volume += 1


def _beyond(cursor: Cursor, prefix: bytes, last_seq: int) -> list[bytes]:
    found: list[bytes] = []
    for volume in list(volumes_of(cursor, prefix)):
        after = VOLUME_SEQ.pack(volume, last_seq + 1)
        found += [key for key, _ in _until(rows(cursor, prefix, after), VOLUME_SEQ.pack(volume, MAX_SEQ))]
    return found


def _barriers_before(cursor: Cursor, oldest_seq: int) -> list[bytes]:
    found: list[bytes] = []
    for volume in list(volumes_of(cursor, b"V")):
        first, end = VOLUME_SEQ.pack(volume, 0), VOLUME_SEQ.pack(volume, oldest_seq)
        found += [b"V" + key for key, _ in _until(rows(cursor, b"V", first), end)]
    return found


def _sizes_before(cursor: Cursor, oldest_seq: int) -> list[bytes]:
    """Sizes that were replaced at or before `oldest_seq`."""
    found: list[bytes] = []
    for volume in list(volumes_of(cursor, b"Z")):
        first, end = VOLUME_SEQ.pack(volume, 0), VOLUME_SEQ.pack(volume, oldest_seq + 1)
        found += [b"Z" + key for key, _ in list(_until(rows(cursor, b"Z", first), end))[:-1]]
    return found
