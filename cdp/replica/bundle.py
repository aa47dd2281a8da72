"""Plans bundles: which blocks a stretch of batches replaces, what they held before, and what they will hold.

A bundle is what one sync of the undo log covers. While one is being synced and applied, the next is planned over it:
a block's content is what this bundle made of it, else what the pending bundle will (the overlay), else the replica's.
So a block written twice has the first write's result as the second's pre-image. A bundle is bounded by the bytes of
its pre-images and patched blocks; a batch that exceeds that, or a ZERO that discards more, goes on in the next one,
and only the bundle that a batch ends in carries it. A ZERO costs by the data that it discards: holes are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from cdp import storage
from cdp.errors import CorruptionError
from cdp.history.blobs import AnyExtent, Extent
from cdp.journal.batch import (
    DESCRIPTOR,
    RESIZE,
    SYNC,
    VERIFY,
    WRITE,
    ZERO,
    ZEROS,
    Batch,
    Record,
)
from cdp.replica.course import FOLLOWED
from cdp.replica.replica import BLOCK_BYTES, BLOCK_SHIFT, Content, Replica, ReplicaFile

# Pre-images of one bundle: twice what is read from the journal at once, so that only batches of large requests are
# divided; two bundles are in flight, so this counts twice towards the process's memory.
BUNDLE_BLOCKS = 2048
_POOL_BYTES = BUNDLE_BLOCKS * BLOCK_BYTES
_ZEROS = memoryview(bytes(_POOL_BYTES))
_MASK = BLOCK_BYTES - 1


# Marks a block that neither this bundle nor the pending one has written.
_MISSING: Final = memoryview(b"")
Known = dict[int, Content]


class Bundle:
    """`results` is what the blocks hold after it; `batches` are those that end in it, `followed` their few records
    that change a volume's state, `sizes` the volumes declared in it. Views point into the batches' own bytes."""

    __slots__ = ("batches", "extents", "results", "followed", "sizes")

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.extents: list[AnyExtent] = []
        self.results: dict[int, Known] = {}
        self.followed: list[Record] = []
        self.sizes: dict[int, int] = {}


class Target:
    """One volume as seen by the bundle that is being planned."""

    __slots__ = ("file", "results", "overlay", "size")

    def __init__(self, file: ReplicaFile, results: Known, overlay: Known, size: int) -> None:
        self.file, self.results, self.overlay, self.size = file, results, overlay, size

    def known(self, first: int, end: int) -> list[int]:
        """Blocks of [first, end) that this bundle or the pending one has written."""
        results, overlay = self.results, self.overlay
        if end - first <= len(results) + len(overlay):
            return [b for b in range(first, end) if b in results or b in overlay]
        return sorted({b for known in (results, overlay) for b in known if first <= b < end})

    def content(self, block: int) -> Content:
        """Of a known block."""
        return self.results[block] if block in self.results else self.overlay[block]


class Planner:
    """One for each group; `verify(seq, record, target)` is called where a VERIFY record stands."""

    def __init__(self, replica: Replica, verify: Callable[[Record, Target], None]) -> None:
        self._replica = replica
        self._verify = verify
        self._pool = bytearray(_POOL_BYTES)
        self._view = memoryview(self._pool)
        # Prepared once: slicing a view costs as much as half the read.
        self._slots = [(self._view[i : i + BLOCK_BYTES],) for i in range(0, _POOL_BYTES, BLOCK_BYTES)]
        self._sizes = {f.volume: f.size for f in replica.files.values()}
        self._overlay: dict[int, Known] = {}
        self._read_flags = storage.RWF_NOWAIT
        self._begin()

    def _begin(self) -> None:
        self._bundle = Bundle()
        self._used = 0  # blocks of the pool and of patched copies
        self._targets: dict[int, Target] = {}

    def _cut(self) -> Bundle:
        """Ends the bundle. It becomes the overlay of the next, and the pool is used again: the caller has appended
        its extents to the history before it asks for the next."""
        done = self._bundle
        self._overlay = done.results
        self._begin()
        return done

    def size(self, volume: int) -> int:
        """Of a volume, in bytes, behind all that was planned."""
        return self._sizes[volume]

    def settled(self, bundle: Bundle) -> None:
        """Its results are in the replica."""
        if self._overlay is bundle.results:
            self._overlay = {}
            for target in self._targets.values():
                target.overlay = {}

    def plan(self, batches: list[Batch]) -> Iterator[Bundle]:
        """Bundles in order, the last ends with the last batch. When the next one is asked for, all but the last
        yielded are in the replica. Raises CorruptionError for a record that contradicts its volume, OSError."""
        slots, pool, zeros, preadv = self._slots, self._pool, bytes(BLOCK_BYTES), storage.preadv
        for batch in batches:
            data, at, seq, current = batch.data, 0, batch.first_seq, -1
            self._warmed = False
            self._batch = batch
            for kind, flags, volume, data_bytes, offset, length in DESCRIPTOR.iter_unpack(batch.descriptors):
                if kind == WRITE and length == BLOCK_BYTES == data_bytes and not offset & _MASK:
                    if self._used >= BUNDLE_BLOCKS:
                        yield self._cut()
                        current = -1
                    if volume != current:
                        target = self._target(volume, seq)
                        results, overlay, fd = target.results, target.overlay, target.file.fd
                        last_offset, current = target.size - BLOCK_BYTES, volume
                        add = self._bundle.extents.append
                    if offset > last_offset:
                        raise _beyond(seq, offset, length, target)
                    block = offset >> BLOCK_SHIFT
                    before = results.get(block, _MISSING)
                    if before is _MISSING:
                        before = overlay.get(block, _MISSING)
                        if before is _MISSING:
                            slot = slots[self._used]
                            before = slot[0]
                            try:
                                if preadv(fd, slot, offset, self._read_flags) != BLOCK_BYTES:
                                    target.file.read_into(before, block)
                            except OSError as e:
                                self._read_cold(target, block, before, e)
                            if pool.startswith(zeros, self._used << BLOCK_SHIFT):
                                before = None
                            else:
                                self._used += 1
                    results[block] = data[at : at + BLOCK_BYTES]
                    add((volume, block, 1, seq, before))
                elif kind in (WRITE, ZERO, SYNC, VERIFY) or kind in FOLLOWED:
                    record = Record(
                        seq, batch.order_ns + seq - batch.first_seq, kind, flags, volume, offset, length,
                        data[at : at + data_bytes],
                    )  # fmt: skip
                    yield from self._general(record)
                    current = -1
                at += data_bytes
                seq += 1
            self._bundle.batches.append(batch)
        yield self._cut()

    # --- everything but aligned 4 KiB writes

    def _general(self, record: Record) -> Iterator[Bundle]:
        kind, volume, offset, length = record.kind, record.volume, record.offset, record.length
        if kind in FOLLOWED:
            if kind == RESIZE:
                yield from self._resize(record)
            self._bundle.followed.append(record._replace(data=memoryview(bytes(record.data))))
            return
        target = self._target(volume, record.seq)
        if offset + length > target.size:
            raise _beyond(record.seq, offset, length, target)
        if kind == VERIFY:
            self._verify(record, target)
        elif kind == ZERO or (kind == SYNC and record.flags & ZEROS):
            yield from self._range(record, offset, offset + length, None)
        elif length != len(record.data):
            raise CorruptionError(f"The record of seq {record.seq} has {len(record.data)} of {length} bytes.")
        else:
            yield from self._range(record, offset, offset + length, record.data)

    def _resize(self, record: Record) -> Iterator[Bundle]:
        """A volume that shrinks loses its end like by a ZERO first; the file follows when the bundle is applied."""
        volume, size = record.volume, record.length
        old = self._sizes.get(volume, 0)
        if size < old:
            yield from self._range(record, size, old, None)
        self._replica.declare(volume, str(bytes(record.data), "utf-8"), size)
        self._sizes[volume] = self._bundle.sizes[volume] = size
        self._targets.pop(volume, None)

    def _range(self, record: Record, offset: int, end: int, data: Content) -> Iterator[Bundle]:
        """New content (None: zeros) for any range inside the volume: patched edges, whole blocks between."""
        volume, seq = record.volume, record.seq
        first = (offset + _MASK) >> BLOCK_SHIFT
        whole_to_end = data is None and end == self._target(volume, seq).size
        last = (end + _MASK if whole_to_end else end) >> BLOCK_SHIFT
        if offset & _MASK:
            stop = min(end, first << BLOCK_SHIFT)
            yield from self._room()
            self._patch(volume, seq, offset, stop, data and data[: stop - offset])
        if last > first:
            if data is None:
                yield from self._discard(volume, seq, first, last)
            else:
                at = (first << BLOCK_SHIFT) - offset
                yield from self._replace(volume, seq, first, last, data[at:])
        if end & _MASK and last >= first and not whole_to_end:
            start = last << BLOCK_SHIFT
            yield from self._room()
            self._patch(volume, seq, start, end, data and data[start - offset :])

    def _room(self) -> Iterator[Bundle]:
        if self._used >= BUNDLE_BLOCKS - 2:  # a pre-image and a patched copy
            yield self._cut()

    def _patch(self, volume: int, seq: int, offset: int, end: int, data: Content) -> None:
        """Part of one block."""
        target, block = self._target(volume, seq), offset >> BLOCK_SHIFT
        if block in target.results or block in target.overlay:
            before = target.content(block)
        else:
            before = self._read(target, block, 1)
        if before is None and data is None:
            return
        content = bytearray(BLOCK_BYTES) if before is None else bytearray(before)
        start = offset & _MASK
        content[start : start + end - offset] = bytes(end - offset) if data is None else data
        self._bundle.extents.append(Extent(volume, block, 1, seq, before))
        target.results[block] = memoryview(content)
        self._used += 1

    def _replace(self, volume: int, seq: int, first: int, last: int, data: memoryview) -> Iterator[Bundle]:
        """Whole blocks with content."""
        at = 0
        while first < last:
            if self._used >= BUNDLE_BLOCKS:
                yield self._cut()
            target = self._target(volume, seq)
            end = min(last, first + BUNDLE_BLOCKS - self._used)
            self._preserve(target, seq, first, end)
            for block in range(first, end):
                target.results[block] = data[at : at + BLOCK_BYTES]
                at += BLOCK_BYTES
            first = end

    def _preserve(self, target: Target, seq: int, first: int, end: int) -> None:
        """Pre-images of [first, end): one for each known block, one for each run that the replica holds."""
        volume, add = target.file.volume, self._bundle.extents.append
        for block in target.known(first, end):
            if block > first:
                add(Extent(volume, first, block - first, seq, self._read(target, first, block - first)))
            add(Extent(volume, block, 1, seq, target.content(block)))
            first = block + 1
        if end > first:
            add(Extent(volume, first, end - first, seq, self._read(target, first, end - first)))

    def _discard(self, volume: int, seq: int, first: int, last: int) -> Iterator[Bundle]:
        """Zeros for whole blocks: only where there is something else."""
        target = self._target(volume, seq)
        # A block's first pre-image at a seq is the true one: those given here are not looked at again below, when
        # their zeros may have reached the replica with an earlier part of this record.
        given = {block for block in target.known(first, last) if target.content(block) is not None}
        for block in given:
            self._bundle.extents.append(Extent(volume, block, 1, seq, target.content(block)))
            target.results[block] = None
        while (run := target.file.data_run(first, last)) is not None:
            first, end = max(first, run[0]), run[1]
            while first < end:
                if self._used >= BUNDLE_BLOCKS:
                    yield self._cut()
                target = self._target(volume, seq)
                stop = min(end, first + BUNDLE_BLOCKS - self._used)
                self._discard_run(target, seq, first, stop, given)
                first = stop

    def _discard_run(self, target: Target, seq: int, first: int, end: int, given: set[int]) -> None:
        """What the replica holds in [first, end); known blocks are zeros already."""
        skipped = sorted({*target.known(first, end), *(b for b in range(first, end) if b in given)})
        for block in [*skipped, end]:
            if block > first:
                before = self._read(target, first, block - first)
                if before is not None:
                    self._bundle.extents.append(Extent(target.file.volume, first, block - first, seq, before))
                    target.results.update(dict.fromkeys(range(first, block)))
            first = block + 1

    def _target(self, volume: int, seq: int) -> Target:
        target = self._targets.get(volume)
        if target is None:
            file, size = self._replica.files.get(volume), self._sizes.get(volume)
            if file is None or size is None:
                raise CorruptionError(f"Seq {seq} writes to volume {volume}, which the journal never declared.")
            results = self._bundle.results.setdefault(volume, {})
            target = Target(file, results, self._overlay.get(volume, {}), size)
            self._targets[volume] = target
        return target

    def _read(self, target: Target, block: int, count: int) -> Content:
        """Blocks of the replica, into the pool; None when all are zeros (then the pool's room is not used)."""
        start = self._used << BLOCK_SHIFT
        view = self._view[start : start + (count << BLOCK_SHIFT)]
        target.file.read_into(view, block)
        if self._pool.startswith(_ZEROS[: len(view)], start):
            return None
        self._used += count
        return view

    def _read_cold(self, target: Target, block: int, into: memoryview, error: OSError) -> None:
        """A block that is not cached: before the loop waits for it, the kernel hears of all the batch's others, so
        that they are read side by side."""
        if not isinstance(error, BlockingIOError):
            if self._read_flags == 0:
                raise error
            self._read_flags = 0  # a file system without RWF_NOWAIT; a true error comes back below
        elif not self._warmed:
            self._warmed = True
            for kind, _, volume, _, offset, length in DESCRIPTOR.iter_unpack(self._batch.descriptors):
                file = self._replica.files.get(volume)
                if kind == WRITE and length == BLOCK_BYTES and file is not None:
                    file.will_need(offset >> BLOCK_SHIFT)
        target.file.read_into(into, block)


def _beyond(seq: int, offset: int, length: int, target: Target) -> CorruptionError:
    return CorruptionError(
        f"Seq {seq} writes {length} bytes at {offset}, beyond the {target.size} bytes of {target.file.name}."
    )
