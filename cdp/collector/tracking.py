"""`tracking`: production goes on without the journal, because that is full or cannot be written (promise 10).

That it begins is noted durably first, in a sector that is there from the group's first start, so that a disk without
space takes it. From then on writes go to the primary alone, the intent map remembers where, and a FLUSH means the
primary. When the journal takes something again, a GAP is opened for every volume that was written, its regions are
read from the primary and journaled, and the GAP ends. The note is taken back only when a checkpoint lies behind that:
until then a start must not write the journal's tail, which is older, over what the primaries took meanwhile.

The note is 512 bytes: magic 4s b"CDPT", version u32, noted u32, reserved u32, last_seq u64, CRC-32C of these.
"""

from __future__ import annotations

import logging
import os
import struct
from functools import partial
from typing import TYPE_CHECKING

from crc32c import crc32c

from cdp import storage
from cdp.collector.refused import gap_open
from cdp.collector.replies import reply
from cdp.collector.volume import INITIAL_SYNC, Reason, Volume
from cdp.errors import CorruptionError
from cdp.nbd import wire

if TYPE_CHECKING:
    from cdp.collector.flusher import Answer
    from cdp.collector.group import Group, NewRecord
    from cdp.nbd.connection import Connection
    from cdp.nbd.contract import Request

log = logging.getLogger(__name__)

MAGIC, VERSION = b"CDPT", 1
_NOTE = struct.Struct("<4sIIIQ")
_CRC = struct.Struct("<I")
NOTE_BYTES = 512  # a sector: no power cut tears it
TRACKING = "tracking"
# Stops that production need not wait for: what the primary holds in the end can be read and journaled.
JOURNAL_FULL, JOURNAL_FAILED = "journal_full", "journal_failed"


class Tracking:
    """Of one group. Owned by the loop's thread. `on`: writes are not journaled now; `noted`: the primaries may have
    what the journal never saw, so its tail is not to be written onto them."""

    def __init__(self, group: Group, path: str) -> None:
        """Raises CorruptionError, OSError."""
        self._group = group
        self.on = False
        self._written: dict[Volume, None] = {}  # in order
        self._ended_seq = 0  # a checkpoint from here on takes the note back
        was_there = storage.exists(path)
        self._fd = storage.open_file(path, os.O_RDWR | os.O_CREAT)
        raw = storage.pread(self._fd, NOTE_BYTES, 0)
        if not raw.strip(b"\0"):
            self.noted = False
            self._write(0)
        else:
            self.noted = _decode(raw, path)
        if not was_there:
            storage.sync_folder(os.path.dirname(path))

    def close(self) -> None:
        storage.close(self._fd)

    def _write(self, noted: int) -> None:
        head = _NOTE.pack(MAGIC, VERSION, noted, 0, self._group.journal.last_seq)
        storage.pwrite(self._fd, (head + _CRC.pack(crc32c(head))).ljust(NOTE_BYTES, b"\0"), 0)
        storage.fdatasync(self._fd)

    def _note(self, noted: int, failing: str) -> bool:
        """Whether it could be written; else `failing` is said."""
        try:
            self._write(noted)
        except OSError as e:
            self._group.said.add("note", logging.ERROR, failing, self._group.name, e)
            return False
        return True

    def begin(self, code: str) -> None:
        """The group stopped for this reason: if it is one of the journal's, production goes on. Blocks for one sync.

        Not where flushes are promised to be replicated, nor when the note cannot be written: then writes are refused.
        """
        if self.on or code not in (JOURNAL_FULL, JOURNAL_FAILED) or self._group.replicated is not None:
            return
        if not self._note(1, "group %s: writes are refused: that they are not journaled cannot be noted: %s"):
            return
        self.on = self.noted = True
        self._ended_seq = 0
        text = "group %s is tracking: writes go to the primaries alone until the journal takes them"
        log.error(text, self._group.name)

    def takes(self, volume: Volume) -> bool:
        """Whether a write that is not journaled may go to this volume: not while a rollback copies onto it, whose
        every write is to be a point, and not where nobody could read it again."""
        return self.on and not volume.refuse and volume.lock is None and volume.primary.readable

    def write(self, volume: Volume, connection: Connection, writes: list[Request]) -> None:
        """One request after the other onto the primary alone. Their regions are set in the intent map."""
        group, flusher = self._group, self._group.flusher
        for command, flags, cookie, offset, length, data in writes:
            answer: Answer = partial(reply, connection, cookie)
            if command == wire.FLUSH:
                flusher.wait(volume, answer)
                continue
            self._written[volume] = None
            volume.dirty = True
            if flags & wire.FUA:
                answer = flusher.behind_write(volume, answer)
            if volume.upstream is not None:
                payload = None if data is None else bytes(data)
                volume.upstream.write_untracked(offset, length, payload, not flags & wire.NO_HOLE, answer)
                continue
            try:
                if data is not None:
                    volume.primary.write(offset, data)
                else:
                    volume.primary.zero(offset, length, not flags & wire.NO_HOLE)
            except OSError as e:
                answer(e)
            else:
                answer(None)
        group.active = True
        flusher.kick()

    # --- and back

    def gaps(self) -> list[NewRecord]:
        """A GAP for every volume that was written: they come before all else."""
        due = [(volume, due_behind(volume)) for volume in self._written]
        return [gap_open(volume, reason) for volume, reason in due if reason is not None]

    def end(self) -> None:
        """The gaps are in the journal, as its last records: what was written is read, and journaled, from here on."""
        if not self.on:
            return
        group, seq = self._group, self._group.journal.last_seq
        log.warning("group %s: writes are journaled again from seq %d on", group.name, seq)
        for gap_seq, volume in enumerate(self._written, seq - len(self._written) + 1):
            volume.in_gap, volume.sync = True, due_behind(volume)
            group.go_on_resync(volume, gap_seq)
        if self._written:
            group.save_state()
        self.on, self._written, self._ended_seq = False, {}, seq
        group.flusher.want_checkpoint()

    def resume(self) -> None:
        """A start has journaled the gaps of what an earlier life noted."""
        self._ended_seq = self._group.journal.last_seq

    def checkpointed(self, seq: int) -> None:
        """Primaries and journal are synced up to `seq`. Blocks for one sync, once behind each tracking."""
        if not self.noted or self.on or not self._ended_seq or seq < self._ended_seq:
            return
        if self._note(0, "group %s: the note of its tracking cannot be taken back: %s"):
            self.noted = False


def due_behind(volume: Volume) -> Reason | None:
    """The comparison that is due behind a time without the journal: of what the intent map names, unless one of the
    whole volume is due anyway. An initial sync passes over holes, and by now there may be some where data was."""
    if not volume.primary.readable or (volume.sync is not None and volume.sync["code"] != INITIAL_SYNC):
        return volume.sync
    text = f"The journal took nothing for a while; what {volume.name} was written meanwhile is read from its primary."
    return {"code": TRACKING if volume.sync is None else "resync", "text": text}


def _decode(raw: bytes, path: str) -> bool:
    whole = len(raw) == NOTE_BYTES and crc32c(raw[: _NOTE.size]) == _CRC.unpack_from(raw, _NOTE.size)[0]
    magic, version, noted = _NOTE.unpack_from(raw)[:3] if whole else (b"", 0, 0)
    if (magic, version) != (MAGIC, VERSION):
        raise CorruptionError(
            f"{path} is damaged: whether the primaries have what the journal never saw is not known.",
            "Remove the file and run `cdp resync` of every volume of the group.",
        )
    return bool(noted)
