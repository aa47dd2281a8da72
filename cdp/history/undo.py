"""The undo log: what each write replaced, in recycled segment files, first in first out.

Owns the files of its folder. Promises: what `sync` returned for survives a power cut; a stored block whose checksum
does not fit its place is never returned; a cut or a torn tail never takes what was kept before it.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from cdp import storage
from cdp.errors import CorruptionError, StorageError
from cdp.history.blobs import AnyExtent, Buffer, Extent, Packed, Packer
from cdp.history.meta import Parts, describe, header_of, kept_of
from cdp.history.undo_format import (
    CLOSING_AT,
    INCARNATIONS_AT,
    MAX_INCARNATIONS,
    PAGE_BYTES,
    ROW,
    Array,
    Bundle,
    BundleHeader,
    Closing,
    Opening,
    mix_many,
)
from cdp.history.undo_segment import Descriptor, Segment, Written, compress_meta
from cdp.journal.batch import Batch

__all__ = ["Extent", "UndoLog", "Written"]

_NAME = re.compile(r"undo-(\d{20})-(\d{10})")
# Offsets in a segment are u32.
_MAX_SEGMENT_BYTES = 3 << 30
# An entry of zeros has no blob: without this a segment of them could hold millions, whose codes are in memory.
_MAX_SEGMENT_ENTRIES = 1 << 18
# Kept to be written again (a new file takes writes at an eighth of the speed); more than what a second of replay frees
# is given back to the file system.
_MAX_SPARES = 8
# Open files of one log (24 GiB of it); a read of another segment opens it again.
_MAX_DESCRIPTORS = 384


class UndoLog:
    """One writer thread; `read`, `columns` and `segments` from any thread."""

    def __init__(self, folder: str, *, segment_bytes: int, compress: bool) -> None:
        """Opens what is there: a torn tail is left out (`cut` ends it). Raises CorruptionError, OSError."""
        storage.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.segments: OrderedDict[int, Segment] = OrderedDict()
        self.newest: Segment | None = None  # the last of them
        self.synced_seq = 0
        self._segment_bytes = min(segment_bytes, _MAX_SEGMENT_BYTES)
        self._packer = Packer(compress)
        self._descriptors: OrderedDict[int, Descriptor] = OrderedDict()
        self._writing: Descriptor | None = None  # of the newest segment, once this process writes it
        self._next_ordinal = 1
        self._broken = False
        self._unsynced: list[Descriptor] = []
        self._folder_unsynced = False
        self._opening = b""  # of the newest segment, until its first bundle is synced
        self._load()

    # --- what is there

    @property
    def last_seq(self) -> int:
        """The highest seq that the log has anything of. Asked with every read of the past."""
        newest = self.newest
        return newest.last_seq if newest is not None else 0

    @property
    def bytes(self) -> int:
        """Space that the files take."""
        return sum(s.file_bytes for s in list(self.segments.values())) + self._spare_bytes

    def read(self, ordinal: int, offset: int, length: int) -> Buffer:
        """Bytes of a blob; shorter if the segment is gone or its file recycled. Raises OSError."""
        file = self._descriptors.get(ordinal) or self._open(ordinal)
        return storage.pread(file.fd, length, offset) if file else b""

    def salt_of(self, ordinal: int) -> int:
        """The salt of a segment; 0 if it is gone."""
        segment = self.segments.get(ordinal)
        return segment.opening.salt if segment is not None else 0

    def columns(self, segment: Segment) -> tuple[Array, Array]:
        """(codes, seqs) of a segment's entries; made from its bundles where they were not put together."""
        file = self._descriptors.get(segment.ordinal) or self._open(segment.ordinal)
        if file is None:
            raise StorageError(f"{segment.path} has left the window.")
        try:
            return segment.read_columns(file.fd)
        except CorruptionError:  # the power went before they were synced, which nobody waits for
            tables = [bundle.rows for bundle in self.bundles_of(segment)]
        return np.concatenate([rows["code"] for rows in tables]), np.concatenate([rows["seq"] for rows in tables])

    def bundles_after(self, seq: int) -> Iterator[Bundle]:
        """Every bundle that has anything of a record beyond `seq`, in order."""
        for segment in list(self.segments.values()):
            if segment.last_seq > seq:
                for bundle in self.bundles_of(segment):
                    if bundle.header.last_seq > seq:
                        yield bundle

    def bundles_of(self, segment: Segment, at: int = PAGE_BYTES) -> Iterator[Bundle]:
        """The bundles of a segment from offset `at`. Raises CorruptionError if they end before the segment does."""
        file = self._open(segment.ordinal)
        assert file is not None
        reached = PAGE_BYTES
        for bundle in segment.bundles(file.fd):
            if bundle.end > segment.end:
                break
            reached = bundle.end
            if bundle.start >= at:
                yield bundle
        if reached < segment.end:
            raise CorruptionError(
                f"{segment.path}: the bundle at offset {reached} is not what was written.",
                "Restore the folder from a copy, or resync the group's volumes.",
            )

    def _open(self, ordinal: int) -> Descriptor | None:
        segment = self.segments.get(ordinal)
        if segment is None:
            return None
        try:
            file = Descriptor(segment.path, os.O_RDWR)
        except FileNotFoundError:
            return None
        self._descriptors[ordinal] = file
        while len(self._descriptors) > _MAX_DESCRIPTORS:
            try:
                self._descriptors.popitem(last=False)
            except KeyError:  # another thread took the last one
                break
        return file

    # --- opening

    def _load(self) -> None:
        found: dict[int, Segment] = {}
        self._spares: list[str] = []
        self._left: set[str] = set()  # files that are no part of the log: a kill came before they were begun, or freed
        for name in sorted(storage.listdir(self.folder)):
            path = os.path.join(self.folder, name)
            if name.startswith("spare-"):
                self._spares.append(path)
            elif (match := _NAME.fullmatch(name)) is not None:
                self._next_ordinal = max(self._next_ordinal, int(match[2]) + 1)
                self._left.add(path)
                file = Descriptor(path, os.O_RDONLY)
                opening = Opening.parse(storage.pread(file.fd, PAGE_BYTES, 0))
                if opening is not None and opening.ordinal == int(match[2]):
                    found[opening.ordinal] = Segment(path, opening)
        self._spare_bytes = sum(storage.stat(path).st_size for path in self._spares)
        self._link(found)
        self._left -= {segment.path for segment in self.segments.values()}

    def _link(self, found: dict[int, Segment]) -> None:
        """Follows the segments back from the newest: each says which one it continues, and where that one ended."""
        chain: list[Segment] = []
        ordinal, end = max(found, default=0), 0
        while (segment := found.get(ordinal)) is not None:
            self._fill(segment, end)
            chain.append(segment)
            ordinal, end = segment.opening.prev_ordinal, segment.opening.prev_end
        for segment in reversed(chain):
            self.segments[segment.ordinal] = self.newest = segment
            self.synced_seq = max(self.synced_seq, segment.synced_seq)

    def _fill(self, segment: Segment, end: int) -> None:
        """What a segment holds: from its closing if that is the one its successor (`end`, 0: none) speaks of."""
        file = Descriptor(segment.path, os.O_RDWR)
        segment.file_bytes = storage.fstat(file.fd).st_size
        closing = Closing.parse(storage.pread(file.fd, PAGE_BYTES, 0), segment.opening.salt)
        if end and closing is not None and closing.end == end:
            segment.take_closing(closing)
            return
        for bundle in segment.bundles(file.fd):
            if end and bundle.end > end:
                break
            segment.advance(bundle)
        if end and segment.end != end:
            raise CorruptionError(f"{segment.path}: its bundles end at {segment.end}, not at {end} as they did.")
        if end:
            segment.close(file.fd)

    # --- appending

    def append(self, batches: Sequence[Batch], extents: Sequence[AnyExtent], fast: bool) -> Written:
        """Writes a bundle, not synced. Raises OSError (nothing was appended), StorageError after a failed sync."""
        packed = self._packer.pack(extents, fast)
        headers, descriptors, notes = describe(batches)
        parts = (headers, descriptors, notes)
        return self._write(header_of(parts, packed, self.synced_seq), parts, packed)

    def _write(self, header: BundleHeader, parts: Parts, packed: Packed) -> Written:
        if self._broken:
            raise StorageError("A sync of the undo log failed; it cannot be trusted any more.", "Restart the replayer.")
        meta = compress_meta(*parts)
        header.meta_bytes = len(meta)
        segment, file = self._room(header)
        rows = np.empty(len(packed.codes), ROW)
        rows["code"], rows["seq"], rows["length"] = packed.codes, packed.seqs, packed.lengths
        base = segment.end + header.total_bytes - header.blob_bytes
        rows["offset"] = packed.offsets(base)
        rows["crc"] = np.array(packed.crcs, np.uint32) ^ mix_many(rows["code"], rows["seq"], segment.opening.salt)
        bundle = segment.append(file.fd, header, meta, rows, packed.blobs)
        bundle.headers, bundle.descriptors, bundle.notes = parts
        segment.advance(bundle)
        files, self._unsynced = [*self._unsynced, file], []
        folder, self._folder_unsynced = (self.folder if self._folder_unsynced else None), False
        opening, self._opening = self._opening, b""
        return Written(bundle, files, folder, opening)

    def _room(self, header: BundleHeader) -> tuple[Segment, Descriptor]:
        """The segment that takes a bundle of that size."""
        segment, file = self.newest, self._writing
        if segment is not None and file is not None and segment.columns is not None:
            fits = segment.end + header.total_bytes <= self._segment_bytes
            if segment.end == PAGE_BYTES or (fits and segment.entries + header.entry_count <= _MAX_SEGMENT_ENTRIES):
                return segment, file
        return self._begin(header.first_seq, segment)

    def _begin(self, first_seq: int, before: Segment | None, close: bool = True) -> tuple[Segment, Descriptor]:
        """Closes the newest segment and begins the next."""
        if close and before is not None and before.columns is not None:
            old = self._writing or Descriptor(before.path, os.O_RDWR)
            before.close(old.fd)
            self._unsynced.append(old)
        opening = Opening(
            int.from_bytes(storage.random_bytes(8), "little"), self._next_ordinal, first_seq,
            before.ordinal if before else 0, before.end if before else 0, before.last_seq if before else first_seq - 1,
            before.last_crc if before else 0, before.group_id if before else bytes(16),
            before.incarnations[-MAX_INCARNATIONS:] if before else [],
        )  # fmt: skip
        path = os.path.join(self.folder, f"undo-{first_seq:020d}-{self._next_ordinal:010d}")
        if self._spares:
            spare = self._spares.pop()
            self._spare_bytes -= storage.stat(spare).st_size
            storage.rename(spare, path)
        file = Descriptor(path, os.O_RDWR | os.O_CREAT)
        segment = Segment(path, opening)
        # Room for the opening. It vouches for the segments before, so `sync` writes it, when they are durable.
        storage.pwrite(file.fd, bytes(PAGE_BYTES), 0)
        self._opening = opening.pack()
        segment.chain_crc = opening.crc
        segment.file_bytes = max(PAGE_BYTES, storage.fstat(file.fd).st_size)
        self._next_ordinal += 1
        self._writing = file
        self._folder_unsynced = True
        self._descriptors[segment.ordinal] = file
        self.segments[segment.ordinal] = self.newest = segment
        return segment, file

    def sync(self, written: Written) -> None:
        """Makes a bundle durable, those before it being so; from any thread. After an OSError the log takes nothing
        more."""
        try:
            if written.opening:
                # Not over the closing between its parts, which another thread may have written already.
                storage.pwrite(written.files[-1].fd, written.opening[:CLOSING_AT], 0)
                storage.pwrite(written.files[-1].fd, written.opening[INCARNATIONS_AT:], INCARNATIONS_AT)
            for file in written.files:
                storage.fdatasync(file.fd)
            if written.folder is not None:
                storage.sync_folder(written.folder)
        except OSError:
            self._broken = True
            raise

    # --- removing

    def drop(self, ordinals: Sequence[int]) -> None:
        """Removes the oldest segments; nobody may need them any more."""
        for ordinal in ordinals:
            segment = self.segments.pop(ordinal)
            self._descriptors.pop(ordinal, None)
            self._free(segment.path)
        if not self.segments:
            self.newest = None
        storage.sync_folder(self.folder)

    def _free(self, path: str) -> None:
        if len(self._spares) >= _MAX_SPARES:
            return storage.unlink(path)
        spare = os.path.join(self.folder, f"spare-{storage.random_bytes(8).hex()}")
        storage.rename(path, spare)
        self._spares.append(spare)
        self._spare_bytes += storage.stat(spare).st_size

    def free_left(self) -> None:
        """To be called when a start has found what it needs: the files that an earlier life left behind go."""
        while self._left:
            self._free(self._left.pop())

    def give_back(self, kept_bytes: int = 0) -> None:
        """Removes what is kept to be recycled beyond that: on a full disk the segment being written needs the space."""
        while self._spares and self._spare_bytes > kept_bytes:
            self._spare_bytes -= storage.stat(self._spares[-1]).st_size
            storage.unlink(self._spares.pop())

    def cut(self, bundle: Bundle, committed_seq: int) -> None:
        """Ends the log before `bundle`, save for what that one has of records up to `committed_seq`; durable on return.

        What is kept goes to a new segment, whose header says where the old one ended: only once that is durable is
        anything overwritten or removed. Raises StorageError when a batch lies across `committed_seq`.
        """
        parts, packed = kept_of(self, bundle, committed_seq)
        later = [segment for ordinal, segment in self.segments.items() if ordinal > bundle.ordinal]
        old = Segment(self.segments[bundle.ordinal].path, self.segments[bundle.ordinal].opening)
        old_file = Descriptor(old.path, os.O_RDWR)
        for earlier in old.bundles(old_file.fd):
            if earlier.start >= bundle.start:
                break
            old.advance(earlier)
        old.file_bytes = storage.fstat(old_file.fd).st_size
        self.segments[bundle.ordinal] = old
        for segment in later:
            del self.segments[segment.ordinal]
            self._descriptors.pop(segment.ordinal, None)
        self.synced_seq = min(self.synced_seq, committed_seq)
        if parts[0] or packed.codes:
            header = header_of(parts, packed, self.synced_seq)
            self._begin(header.first_seq, old, close=False)
            written = self._write(header, parts, packed)
            # First what is kept: the opening, which `sync` writes, takes it away from the old segment.
            storage.fdatasync(written.files[-1].fd)
            self.sync(written)
        else:
            _, file = self._begin(committed_seq + 1, old, close=False)
            self.sync(Written(bundle, [file], self.folder, self._opening))
            self._folder_unsynced, self._opening = False, b""
        old.close(old_file.fd)
        storage.fdatasync(old_file.fd)
        for segment in later:
            self._free(segment.path)

    def close(self) -> None:
        """Lets go of the files."""
        self._descriptors.clear()
        self._writing = None
