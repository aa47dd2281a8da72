"""Who still needs the journal: the persistent list of consumers, one small file for each in `consumers/`.

A file has two slots (as in `position.py`): the position, synced, and after that the same once more as *confirmed*.
Only the confirmed one frees segments, because a power cut cannot take it back. Names of consumers are those
of volumes and bookmarks, without dots: files of other purposes have one.
"""

from __future__ import annotations

import os
import re

from cdp import storage
from cdp.errors import CorruptionError, NotFoundError, UsageError
from cdp.journal.position import SLOT_BYTES, DurablePosition, decode_slot, encode_slot

MAGIC = b"CDPC"
FOLDER = "consumers"
SOCKET_SUFFIX = ".sock"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_REGISTER_SECONDS = 10.0  # another process writes and syncs one small file
NO_GROUP = bytes(16)  # registered before the journal had its id


def _path(folder: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a consumer.",
            "Use letters, digits, _ and -, at most 64, not beginning with a digit.",
        )
    return f"{folder}/{FOLDER}/{name}"


def _slot(seq: int, group_id: bytes) -> bytes:
    raw = encode_slot(MAGIC, DurablePosition(0, seq, 0, 0, 0, 0, group_id, 0))
    return raw.ljust(SLOT_BYTES, b"\0")


def make_folder(folder: str) -> None:
    """The journal folder and its list of consumers, if missing, durably."""
    path = f"{folder}/{FOLDER}"
    if not storage.exists(path):
        storage.makedirs(path, exist_ok=True)
        storage.sync_folder(folder)
        storage.sync_folder(os.path.dirname(os.path.abspath(folder)))


def register(folder: str, name: str, seq: int = 0, group_id: bytes = NO_GROUP) -> bool:
    """Adds a consumer that needs everything after `seq`; False if it is registered already (it stays as it is).

    Durable when it returns. Raises UsageError for a bad name, RefusedError, OSError.
    """
    path = _path(folder, name)
    make_folder(folder)
    if storage.exists(path):
        return False
    # At a first start the collector and the consumer itself come here at the same time; the second one must neither
    # take the first one's temporary file nor replace a file that is in use already.
    lock = storage.lock_file(f"{folder}/{FOLDER}/register.lock", _REGISTER_SECONDS, f"The consumers of {folder}")
    try:
        if storage.exists(path):
            return False
        storage.write_file(path, _slot(seq, group_id) * 2)
        return True
    finally:
        storage.close(lock)


def remove(folder: str, name: str) -> None:
    """The journal need not wait for this consumer any more. Raises NotFoundError."""
    path = _path(folder, name)
    try:
        storage.unlink(path)
    except FileNotFoundError:
        raise _unknown(folder, name) from None
    storage.sync_folder(f"{folder}/{FOLDER}")


def names(folder: str) -> list[str]:
    """Registered consumers, sorted."""
    try:
        found = storage.listdir(f"{folder}/{FOLDER}")
    except FileNotFoundError:
        return []
    return sorted(name for name in found if _NAME.fullmatch(name))


def acknowledge(folder: str, name: str, seq: int) -> None:
    """The consumer needs nothing up to `seq` any more, durably on its own side. Never moves back.

    Raises NotFoundError when it was removed from the list, OSError.
    """
    path = _path(folder, name)
    try:
        fd = storage.open_file(path)
    except FileNotFoundError:
        raise _unknown(folder, name) from None
    try:
        known, _, group_id = _read(fd, path)
        if seq > known:
            slot = _slot(seq, group_id)
            storage.pwrite(fd, slot, 0)
            storage.fdatasync(fd)
            storage.pwrite(fd, slot, SLOT_BYTES)
    finally:
        storage.close(fd)


def positions(folder: str) -> dict[str, int]:
    """Confirmed position of every consumer: what frees segments. Raises CorruptionError."""
    return {name: confirmed for name, (_, confirmed) in _all(folder).items()}


def highest_positions(folder: str) -> dict[str, int]:
    """The highest seq each consumer is known to have seen: at start, evidence of what was durable."""
    return {name: max(both) for name, both in _all(folder).items()}


def _all(folder: str) -> dict[str, tuple[int, int]]:
    found = {}
    for name in names(folder):
        path = _path(folder, name)
        try:
            fd = storage.open_file(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # removed meanwhile
        try:
            found[name] = _read(fd, path)[:2]
        finally:
            storage.close(fd)
    return found


def _read(fd: int, path: str) -> tuple[int, int, bytes]:
    """Position, confirmed position, group id. A torn slot counts as the other one, which is older."""
    raw = storage.pread(fd, 2 * SLOT_BYTES, 0)
    first, second = (decode_slot(MAGIC, raw[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES))
    known = first or second
    if known is None:
        raise CorruptionError(f"{path}: the consumer's position is damaged.", "Remove the consumer and add it again.")
    return known.seq, min((second or known).seq, known.seq), known.group_id


def _unknown(folder: str, name: str) -> NotFoundError:
    listed = ", ".join(names(folder)) or "none"
    return NotFoundError(f"{name} is no consumer of the journal {folder}.", f"Registered: {listed}.")
