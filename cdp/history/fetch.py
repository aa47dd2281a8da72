"""Content of entries: read from the undo log and verified before anybody sees it."""

from __future__ import annotations

from crc32c import crc32c

from cdp.errors import CorruptionError
from cdp.history.blobs import ZERO_BLOCK, Buffer, Unpacker, run_parts
from cdp.history.index import Place
from cdp.history.undo import UndoLog
from cdp.history.undo_format import BLOCK_BYTES, RUN_BIT, RUN_BLOCKS, RUN_HEADER, RUN_MIXED, RUN_RAW, RUN_ZERO, mix

_RAW_RUN_BYTES = RUN_HEADER.size + RUN_BLOCKS * BLOCK_BYTES


class Fetcher:
    """One for each thread."""

    def __init__(self, log: UndoLog) -> None:
        self._log = log
        self._unpacker = Unpacker()

    def block(self, code: int, seq: int, place: Place) -> Buffer | None:
        """The 4 KiB of an entry of one block; None: zeros. Raises CorruptionError."""
        ordinal, offset, crc, length = place
        if not length:
            return None
        stored = self._log.read(ordinal, offset, length)
        if crc32c(stored) ^ mix(code, seq, self._log.salt_of(ordinal)) != crc or len(stored) != length:
            raise _corrupt(code, seq)
        return self._unpacker.block(stored)

    def run(self, code: int, seq: int, place: Place, first: int, count: int) -> list[Buffer | None]:
        """Blocks `first` to `first + count` of a run's entry. Raises CorruptionError."""
        if place.length == RUN_ZERO:
            return [None] * count
        blobs, lengths, crcs = self._blobs(code, seq, place, first, count)
        found: list[Buffer | None] = []
        at = 0
        for i, (length, crc) in enumerate(zip(lengths, crcs, strict=True)):
            stored = blobs[at : at + length]
            if len(stored) != length or (length and crc32c(stored) != crc):
                raise _corrupt(code + first + i, seq)
            found.append(self._unpacker.block(stored) if length else None)
            at += length
        return found

    def stretch(self, code: int, seq: int, place: Place, first: int, count: int) -> Buffer:
        """As `run`, in one piece; zeros are written out. Raises CorruptionError."""
        if place.length != RUN_RAW:
            return b"".join([ZERO_BLOCK if b is None else b for b in self.run(code, seq, place, first, count)])
        blobs, lengths, crcs = self._blobs(code, seq, place, first, count)
        sums = [crc32c(blobs[at : at + BLOCK_BYTES]) for at in range(0, count * BLOCK_BYTES, BLOCK_BYTES)]
        if sums != crcs or len(blobs) != count * BLOCK_BYTES or min(lengths) != BLOCK_BYTES:
            raise _corrupt(code + first, seq)
        return blobs

    def _blobs(
        self, code: int, seq: int, place: Place, first: int, count: int
    ) -> tuple[memoryview, list[int], list[int]]:
        """(stored bytes, lengths, crcs) of those blocks; that of the run's header is verified."""
        ordinal, offset, crc, length = place
        whole = length == RUN_RAW and count > RUN_BLOCKS // 2
        raw = memoryview(self._log.read(ordinal, offset, _RAW_RUN_BYTES if whole else RUN_HEADER.size))
        header = raw[: RUN_HEADER.size]
        sound = len(header) == RUN_HEADER.size and length in (RUN_RAW, RUN_MIXED)
        if not sound or crc32c(header) ^ mix(code, seq, self._log.salt_of(ordinal)) != crc:
            raise _corrupt(code, seq)
        offsets, lengths, crcs = run_parts(header)
        start, end = offsets[first], offsets[first + count - 1] + lengths[first + count - 1]
        blobs = raw[start:end] if whole else memoryview(self._log.read(ordinal, offset + start, end - start))
        return blobs, lengths[first : first + count], crcs[first : first + count]

    def whole(self, code: int, seq: int, place: Place) -> list[Buffer | None]:
        """Every block of an entry, of one block or of a run."""
        if code & RUN_BIT:
            return self.run(code, seq, place, 0, RUN_BLOCKS)
        return [self.block(code, seq, place)]


def _corrupt(code: int, seq: int) -> CorruptionError:
    return CorruptionError(
        f"What seq {seq} replaced in block {code & (RUN_BIT - 1)} of volume {code >> 48} is damaged in the undo log.",
        "Points before that seq cannot be read there; check the disk.",
    )
