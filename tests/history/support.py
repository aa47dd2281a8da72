"""A group's stream for tests: batches that chain, a replica that is a plain file, a model of every version."""

from __future__ import annotations

import os
from pathlib import Path

from cdp.history.history import Extent, History
from cdp.journal import batch as journal

BLOCK = 4096
SECOND_NS = 1_000_000_000
START_NS = 1_700_000_000 * SECOND_NS
Piece = tuple[int, int, int, int, int, bytes]  # kind, flags, volume, offset, length, data


class Stream:
    """Makes batches as a collector does: seqs, order times and checksums go on."""

    def __init__(self, epoch: int = 1) -> None:
        self.identity = journal.Identity(b"g" * 16, epoch, bytes([epoch]) * 16)
        self.next_seq, self.crc, self.order_ns = 1, 0, START_NS

    def batch(self, pieces: list[Piece], after_ns: int = SECOND_NS, behind_ns: int = 0) -> journal.Batch:
        """`after_ns` after the batch before; the wall clock is `behind_ns` behind order time."""
        self.order_ns += after_ns
        descriptors = b"".join(journal.DESCRIPTOR.pack(k, f, v, len(d), o, n) for k, f, v, o, n, d in pieces)
        data = [d for *_, d in pieces]
        head, self.crc = journal.encode(
            self.identity, self.next_seq, 0, self.order_ns - behind_ns, self.order_ns, self.crc, descriptors, data,
            sum(map(len, data)),
        )  # fmt: skip
        self.next_seq += len(pieces)
        return journal.decode(head + b"".join(data))

    def rewind(self, batch: journal.Batch | None) -> None:
        """The next batch follows `batch`."""
        self.next_seq = batch.last_seq + 1 if batch else 1
        self.crc = batch.crc if batch else 0
        self.order_ns = batch.order_ns + batch.record_count if batch else START_NS


def write(block: int, data: bytes, volume: int = 0, flags: int = 0) -> Piece:
    """A WRITE of whole blocks."""
    return (journal.WRITE, flags, volume, block * BLOCK, len(data), data)


def resize(size: int, name: str, volume: int = 0) -> Piece:
    return (journal.RESIZE, 0, volume, 0, size, name.encode())


def bookmark(name: str) -> Piece:
    return (journal.BOOKMARK, 0, journal.NO_VOLUME, 0, 0, name.encode())


class Group:
    """One volume's replica, its history, and what every version of it was."""

    def __init__(self, folder: Path, blocks: int, *, segment_bytes: int = 1 << 20, compress: bool = True) -> None:
        self.folder, self.blocks = folder, blocks
        self.segment_bytes, self.compress = segment_bytes, compress
        folder.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(folder / "replica", os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, blocks * BLOCK)
        self.state = bytearray(blocks * BLOCK)
        self.versions: dict[int, bytes] = {0: bytes(self.state)}
        self.batches: list[journal.Batch] = []
        self.stream = Stream()
        self.history = self.open()
        self.history.cut(0)

    def open(self) -> History:
        return History(str(self.folder / "history"), segment_bytes=self.segment_bytes, compress=self.compress)

    def plan(self, batch: journal.Batch) -> list[Extent]:
        """What a batch of whole-block writes replaces; the model moves on, record by record."""
        extents = []
        for record in batch.records():
            if record.kind in (journal.WRITE, journal.ZERO):
                end = record.offset + record.length
                before = bytes(self.state[record.offset : end])
                extents.append(Extent(record.volume, record.offset // BLOCK, record.length // BLOCK, record.seq,
                                      before if any(before) else None))  # fmt: skip
                self.state[record.offset : end] = record.data if len(record.data) else bytes(record.length)
            self.versions[record.seq] = bytes(self.state)
        return extents

    def apply(self, batches: list[journal.Batch]) -> None:
        """The replica has these batches."""
        for batch in batches:
            for record in batch.records():
                if record.kind == journal.WRITE:
                    os.pwrite(self.fd, record.data, record.offset)
                elif record.kind == journal.ZERO:
                    os.pwrite(self.fd, bytes(record.length), record.offset)
        self.batches += batches
        self.history.applied_seq = batches[-1].last_seq

    def bundle(self, *batches: list[Piece], fast: bool = False) -> int:
        """Appends, syncs, publishes and applies; the last seq."""
        made = [self.stream.batch(pieces) for pieces in batches]
        extents = [extent for batch in made for extent in self.plan(batch)]
        pending = self.history.append(made, extents, fast)
        self.history.sync(pending)
        self.history.publish(pending)
        self.apply(made)
        return made[-1].last_seq

    def read(self, seq: int, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a point."""
        view = self.history.view(self.fd, 0, seq, self.blocks * BLOCK, self.history.applied_seq)
        target = bytearray(self.blocks * BLOCK - offset if length is None else length)
        view.read_into(offset, memoryview(target))
        view.close()
        return bytes(target)

    def put_back(self, committed_seq: int) -> None:
        """What a replayer does at its start."""
        for extent in self.history.recover(committed_seq):
            os.pwrite(self.fd, extent.before or bytes(extent.count * BLOCK), extent.block * BLOCK)
        self.history.cut(committed_seq)
        self.batches = [b for b in self.batches if b.last_seq <= committed_seq]
        self.stream.rewind(self.batches[-1] if self.batches else None)
        self.versions = {seq: v for seq, v in self.versions.items() if seq <= committed_seq}
        self.state = bytearray(self.versions[committed_seq])

    def close(self) -> None:
        self.history.close()
        os.close(self.fd)
