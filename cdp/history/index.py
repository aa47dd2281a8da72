"""Where the content of a block before each change lies in the undo log.

Keys are b"B", code, seq, big-endian, so that the entries of a block stand in the order of their seqs and neighbours
side by side; values say where the blob is. b"P" is the position: the end of the last bundle that is in here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cdp.history.index_map import Cursor, SortedMap
from cdp.history.undo_format import RUN_BIT, VOLUME_SHIFT, Array, Bundle

_KEY = struct.Struct(">cQQ")
_KEYS = np.dtype([("prefix", "S1"), ("code", ">u8"), ("seq", ">u8")])
_PLACE = struct.Struct("<IIIH")
_PLACES = np.dtype([("ordinal", "<u4"), ("offset", "<u4"), ("crc", "<u4"), ("length", "<u2")])
_POSITION_KEY = b"P"
_POSITION = struct.Struct("<QQQ")
Puts = list[tuple[bytes, bytes]]


class Place(NamedTuple):
    """Where an entry's blob is, and what it must sum to."""

    ordinal: int
    offset: int
    crc: int
    length: int


class Position(NamedTuple):
    """The end of the last bundle indexed, and the highest seq so far."""

    ordinal: int
    offset: int
    seq: int


def puts_of(bundle: Bundle) -> Puts:
    """The entries of a bundle."""
    rows = bundle.rows
    keys, places = np.empty(len(rows), _KEYS), np.empty(len(rows), _PLACES)
    keys["prefix"], keys["code"], keys["seq"] = b"B", rows["code"], rows["seq"]
    places["ordinal"] = bundle.ordinal
    for name in ("offset", "crc", "length"):
        places[name] = rows[name]
    return list(zip(_as_bytes(keys), _as_bytes(places), strict=True))


def keys_of(codes: Array, seqs: Array) -> list[bytes]:
    """The keys of entries."""
    keys = np.empty(len(codes), _KEYS)
    keys["prefix"], keys["code"], keys["seq"] = b"B", codes, seqs
    return _as_bytes(keys)


def _as_bytes(rows: Array) -> list[bytes]:
    found: list[bytes] = rows.view(f"V{rows.dtype.itemsize}").tolist()
    return found


def position_put(position: Position) -> tuple[bytes, bytes]:
    return _POSITION_KEY, _POSITION.pack(*position)


def read_position(entries: SortedMap) -> Position | None:
    found = entries.get(_POSITION_KEY)
    return Position(*_POSITION.unpack(found)) if found is not None else None


def first_after(cursor: Cursor, code: int, seq: int) -> tuple[int, Place] | None:
    """(seq, place) of the entry of exactly this code with the smallest seq > `seq`. Raises Exception when the map is
    damaged there: an entry that cannot be read is not an entry that is not there."""
    key = _KEY.pack(b"B", code, seq + 1)
    cursor.seek(key)
    if not cursor.valid():
        cursor.status()
        return None
    found = cursor.key()
    if found[:9] != key[:9]:
        return None
    return int.from_bytes(found[9:], "big"), Place(*_PLACE.unpack(cursor.value()))


def all_after(cursor: Cursor, first: int, last: int, seq: int) -> Iterator[tuple[int, int, Place]]:
    """For each code in [first, last] that has one: (code, seq, place) of its entry with the smallest seq > `seq`.

    Steps to the neighbour and seeks only over what it must skip, so that codes without entries cost nothing.
    """
    cursor.seek(_KEY.pack(b"B", first, seq + 1))
    done = -1
    while cursor.valid():
        prefix, code, found = _KEY.unpack_from(cursor.key().ljust(_KEY.size))
        if prefix != b"B" or code > last:
            return
        if code == done:
            cursor.seek(_KEY.pack(b"B", code + 1, seq + 1))
        elif found <= seq:
            cursor.seek(_KEY.pack(b"B", code, seq + 1))
        else:
            yield code, found, Place(*_PLACE.unpack(cursor.value()))
            done = code
            cursor.next()
    cursor.status()


def volumes_with_runs(cursor: Cursor) -> set[int]:
    """Volumes that have entries of whole runs: only there a look-up must ask for both."""
    found: set[int] = set()
    volume = 0
    while volume <= 0xFFFF:
        cursor.seek(_KEY.pack(b"B", volume << VOLUME_SHIFT | RUN_BIT, 0))
        if not cursor.valid():
            cursor.status()
            break
        if cursor.key()[:1] != b"B":
            break
        code = int.from_bytes(cursor.key()[1:9], "big")
        if code & RUN_BIT:
            found.add(code >> VOLUME_SHIFT)
            volume = (code >> VOLUME_SHIFT) + 1
        else:
            volume = code >> VOLUME_SHIFT
    return found
