"""The committed position: up to which record the replica is durable, and what a restart must know at that record.

A small JSON file, replaced whole and durably (temporary file, fsync, rename, fsync of the folder), so that there is
always one complete position, the old or the new one. Its first line is the CRC-32C of the rest, in hexadecimal.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from crc32c import crc32c

from cdp import storage
from cdp.errors import CorruptionError

FILE_NAME = "committed"


@dataclass(frozen=True, slots=True)
class Position:
    """`seq` is the last of its batch, `crc` that batch's checksum, `time_ns` the order time of `seq`."""

    group_id: str = ""  # hexadecimal; empty: nothing was applied yet
    seq: int = 0
    crc: int = 0
    epoch: int = 0
    time_ns: int = 0
    volumes: list[tuple[int, str, str, int]] = field(default_factory=list)  # number, name, file, size
    course: dict[str, Any] = field(default_factory=dict)  # open gaps and rollbacks: course.py
    unequal: list[tuple[int, int, int, int]] = field(default_factory=list)  # seq, volume, offset, length: verify.py
    history: str = "history"  # folder; a reset names a new one, and the others are removed at the next start
    # Files kept by a reset of the history until the volume of that name is declared: name -> file.
    kept: dict[str, str] = field(default_factory=dict)


def load(folder: str) -> Position | None:
    """The committed position, None if the group never had one. Raises CorruptionError."""
    path = f"{folder}/{FILE_NAME}"
    try:
        raw = storage.read_file(path)
    except FileNotFoundError:
        return None
    head, _, body = raw.partition(b"\n")
    if head != b"%08x" % crc32c(body):
        raise CorruptionError(f"{path}: the checksum is wrong.", "Resync the group's volumes.")
    try:
        fields = json.loads(body)
        fields["volumes"] = [(int(v), str(n), str(f), int(s)) for v, n, f, s in fields["volumes"]]
        fields["unequal"] = [(int(s), int(v), int(o), int(n)) for s, v, o, n in fields["unequal"]]
        return Position(**fields)
    except (ValueError, TypeError, KeyError) as e:
        raise CorruptionError(f"{path} cannot be read: {e}.", "It was written by another version.") from e


def store(folder: str, position: Position) -> None:
    """Durable when it returns. For a worker thread. Raises OSError."""
    body = json.dumps(asdict(position)).encode()
    storage.write_file(f"{folder}/{FILE_NAME}", b"%08x\n" % crc32c(body) + body)
