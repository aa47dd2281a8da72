"""Blocks on their way into the undo log: zeros found, the rest compressed where it pays, each with its checksum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import zstandard
from crc32c import crc32c

from cdp.errors import CorruptionError
from cdp.history.undo_format import (
    BLOCK_BYTES,
    RUN_BIT,
    RUN_BLOCKS,
    RUN_HEADER,
    RUN_MIXED,
    RUN_RAW,
    RUN_ZERO,
    VOLUME_SHIFT,
    Array,
)

Buffer = bytes | bytearray | memoryview
ZERO_BLOCK = bytes(BLOCK_BYTES)
_ZERO_CRC = crc32c(ZERO_BLOCK)
# A block that does not shrink by an eighth is stored raw: reading it then needs no decompression.
_WORTH_BYTES = BLOCK_BYTES - BLOCK_BYTES // 8
# After this many blocks in a row that did not shrink only every 64th is tried: trying costs 4 µs, as much as
# everything else that is done to a block.
_PATIENCE_BLOCKS = 16
_SAMPLE_EVERY = 64
_SAMPLE_RUNS = _SAMPLE_EVERY // RUN_BLOCKS
_RUN_OFFSETS = range(0, RUN_BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
_RAW_LENGTHS = (BLOCK_BYTES,) * RUN_BLOCKS

_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, source_size=BLOCK_BYTES, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False
)


class Extent(NamedTuple):
    """What record `seq` replaces: `count` blocks of 4 KiB from `block`; `before` None means all zeros."""

    volume: int
    block: int
    count: int  # type: ignore[assignment]  # the word of the contract; nobody counts in an extent
    seq: int
    before: Buffer | None


# The same, also without its name: a bare tuple is made twice as fast.
AnyExtent = tuple[int, int, int, int, Buffer | None]


class Packer:
    """Turns extents into entry columns and blobs. One writer thread; remembers whether compression paid lately."""

    def __init__(self, compress: bool) -> None:
        self._compress = compress
        self._zstd = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self._failures = 0

    def pack(self, extents: Sequence[AnyExtent], fast: bool) -> Packed:
        """`fast` stores raw. Offsets count from the first blob."""
        packed = Packed()
        try_zstd = self._compress and not fast
        codes, seqs, crcs, lengths = packed.codes, packed.seqs, packed.crcs, packed.lengths
        blobs, sizes = packed.blobs, packed.sizes
        # One turn for each 4 KiB that is written: nothing is called here that can be avoided.
        for volume, block, count, seq, before in extents:
            if count > 1:
                self._pack_many(packed, volume << VOLUME_SHIFT | block, count, seq, before, try_zstd)
                continue
            codes.append(volume << VOLUME_SHIFT | block)
            seqs.append(seq)
            if before is None:
                crc = length = 0
            else:
                crc, length = crc32c(before), BLOCK_BYTES
                if crc == _ZERO_CRC and bytes(before) == ZERO_BLOCK:
                    crc = length = 0
                else:
                    # The crc is as good as random, so that no regular pattern of writes can hide from the sample.
                    if try_zstd and (self._failures < _PATIENCE_BLOCKS or not crc % _SAMPLE_EVERY):
                        before, crc, length = self._shrink(before, crc)
                    blobs.append(before)
            crcs.append(crc)
            lengths.append(length)
            sizes.append(length)
        return packed

    def _pack_many(
        self, packed: Packed, code: int, count: int, seq: int, before: Buffer | None, try_zstd: bool
    ) -> None:
        view = None if before is None else memoryview(before)
        at = 0
        while count:
            run = count >= RUN_BLOCKS and not code % RUN_BLOCKS
            blocks = RUN_BLOCKS if run else 1
            part = None if view is None else view[at : at + blocks * BLOCK_BYTES]
            if run:
                packed.add(code | RUN_BIT, seq, *self._store_run(part, try_zstd))
            else:
                packed.add(code, seq, *self._store(part, try_zstd))
            code += blocks
            at += blocks * BLOCK_BYTES
            count -= blocks

    def _store(self, before: Buffer | None, try_zstd: bool) -> tuple[Buffer | None, int, int]:
        """(stored bytes, crc, length field) of one block."""
        if before is None:
            return None, 0, 0
        crc = crc32c(before)
        if crc == _ZERO_CRC and bytes(before) == ZERO_BLOCK:
            return None, 0, 0
        if try_zstd and (self._failures < _PATIENCE_BLOCKS or not crc % _SAMPLE_EVERY):
            return self._shrink(before, crc)
        return before, crc, BLOCK_BYTES

    def _shrink(self, before: Buffer, crc: int) -> tuple[Buffer, int, int]:
        """As `_store`: compressed if that pays."""
        small: bytes = self._zstd.compress(before)
        if len(small) <= _WORTH_BYTES:
            self._failures = 0
            return small, crc32c(small), len(small)
        self._failures += 1
        return before, crc, BLOCK_BYTES

    def _worth_trying(self, first: memoryview, crc: int) -> bool:
        """Whether a run's blocks are compressed one by one: while nothing shrinks, only if a sample of them does."""
        if self._failures < _PATIENCE_BLOCKS:
            return True
        if crc % _SAMPLE_RUNS or len(self._zstd.compress(first)) > _WORTH_BYTES:
            return False
        self._failures = 0
        return True

    def _store_run(
        self, view: memoryview | None, try_zstd: bool
    ) -> tuple[Buffer | None, int, int, *tuple[Buffer, ...]]:
        """As `_store`, with the stored blocks behind: the run's header is the first stored part."""
        if view is None:
            return None, 0, RUN_ZERO
        sums = [crc32c(view[at : at + BLOCK_BYTES]) for at in _RUN_OFFSETS]
        if _ZERO_CRC not in sums and not (try_zstd and self._worth_trying(view[:BLOCK_BYTES], sums[0])):
            header = RUN_HEADER.pack(*_RAW_LENGTHS, *sums)
            return header, crc32c(header), RUN_RAW, view
        stored, crcs, lengths = zip(
            *(self._store(view[at : at + BLOCK_BYTES], try_zstd) for at in _RUN_OFFSETS), strict=True
        )
        if not any(lengths):
            return None, 0, RUN_ZERO
        header = RUN_HEADER.pack(*lengths, *crcs)
        if min(lengths) == BLOCK_BYTES:
            return header, crc32c(header), RUN_RAW, view
        return header, crc32c(header), RUN_MIXED, *(s for s in stored if s is not None)


class Packed:
    """Columns of entries, and the blobs in the order of their entries; `sizes` are the bytes of each entry's blobs."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.seqs: list[int] = []
        self.crcs: list[int] = []
        self.lengths: list[int] = []
        self.sizes: list[int] = []
        self.blobs: list[Buffer] = []

    @property
    def blob_bytes(self) -> int:
        return sum(self.sizes)

    def add(self, code: int, seq: int, stored: Buffer | None, crc: int, length: int, *more: Buffer) -> None:
        self.codes.append(code)
        self.seqs.append(seq)
        self.crcs.append(crc)
        self.lengths.append(length)
        blobs = (*more,) if stored is None else (stored, *more)
        self.blobs += blobs
        self.sizes.append(sum(map(len, blobs)))

    def offsets(self, base: int) -> Array:
        """Where each entry's blobs begin if the first stand at `base`; u32."""
        sizes = np.array(self.sizes, np.uint32)
        found: Array = np.cumsum(sizes, dtype=np.uint32) - sizes + np.uint32(base)
        return found


class Unpacker:
    """Stored blocks back into blocks. One for each thread: a decompressor has state."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)

    def block(self, stored: Buffer) -> Buffer:
        """The 4 KiB of a stored block whose checksum was verified. Raises CorruptionError."""
        if len(stored) == BLOCK_BYTES:
            return stored
        try:
            data: bytes = self._zstd.decompress(stored, max_output_size=BLOCK_BYTES)
        except zstandard.ZstdError as e:
            raise CorruptionError(f"A stored block cannot be decompressed: {e}.") from e
        if len(data) != BLOCK_BYTES:
            raise CorruptionError(f"A stored block has {len(data)} bytes when decompressed.")
        return data


def run_parts(header: Buffer) -> tuple[list[int], list[int], list[int]]:
    """(offsets from the run's blob, lengths, crcs) of a run's blocks."""
    fields = RUN_HEADER.unpack(header)
    lengths, crcs = list(fields[:RUN_BLOCKS]), list(fields[RUN_BLOCKS:])
    return list(accumulate(lengths[:-1], initial=RUN_HEADER.size)), lengths, crcs
