"""One file of the undo log: its pages, its bundles one after another, its codes and seqs once it is closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard
from crc32c import crc32c

from cdp import storage
from cdp.errors import CorruptionError
from cdp.history.blobs import Buffer
from cdp.history.undo_format import (
    BATCH_HEADER,
    BUNDLE_BYTES,
    CLOSING_AT,
    DESCRIPTOR,
    PAGE_BYTES,
    ROW,
    Array,
    Bundle,
    BundleHeader,
    Closing,
    Opening,
)

# pwritev takes at most this many buffers (IOV_MAX of Linux).
_IOV_MAX = 1024
# Headers, descriptors and descriptive data of one bundle: far above what 34 MiB of journal can hold of them.
MAX_META_BYTES = 256 << 20
_zstd = zstandard.ZstdCompressor(level=1)


class Descriptor:
    """A file descriptor, closed when the last who uses it lets go: no reader's is reused under it."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        self.fd = -1
        self.fd = storage.open_file(path, flags)

    def __del__(self) -> None:
        if self.fd >= 0:
            storage.close(self.fd)


@dataclass(slots=True)
class Written:
    """A bundle that was written; `files` make it durable."""

    bundle: Bundle
    files: list[Descriptor]
    folder: str | None
    opening: bytes = b""  # of the last of `files`, when its segment begins with this bundle


def write_all(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Every byte of `buffers`, at `offset`. Raises OSError."""
    for at in range(0, len(buffers), _IOV_MAX):
        part = buffers[at : at + _IOV_MAX]
        wanted, written = sum(map(len, part)), storage.pwritev(fd, part, offset)
        if written < wanted:  # a nearly full disk, or more than 2 GiB: the rest, or the error, comes in one piece
            rest = memoryview(b"".join(part))[written:]
            at_rest = offset + written
            while rest:
                written = storage.pwrite(fd, rest, at_rest)
                rest, at_rest = rest[written:], at_rest + written
        offset += wanted


class Segment:
    """`end` is where the bundles end. While it is open its codes and seqs are in memory, bounded by its size."""

    def __init__(self, path: str, opening: Opening) -> None:
        self.path = path
        self.opening = opening
        self.end = PAGE_BYTES
        self.entries = 0
        self.last_seq = opening.prev_seq
        self.last_crc = opening.prev_crc
        self.first_order_ns = 0
        self.last_order_ns = 0
        self.synced_seq = 0
        self.file_bytes = PAGE_BYTES
        self.closing: Closing | None = None
        self.columns: list[tuple[Array, Array]] | None = []
        self.chain_crc = opening.crc
        self.page = b""  # bytes of the last, unfinished page
        self.incarnations = list(opening.incarnations)
        self.group_id = opening.group_id

    @property
    def ordinal(self) -> int:
        return self.opening.ordinal

    # --- writing

    def append(self, fd: int, header: BundleHeader, meta: bytes, rows: Array, blobs: list[Buffer]) -> Bundle:
        """Writes one bundle behind the last. Raises OSError; the segment is then as before."""
        header.salt, header.prev_crc = self.opening.salt, self.chain_crc
        table = rows.tobytes()
        header.body_crc = crc32c(table, crc32c(meta))
        buffers: list[Buffer] = [self.page, header.pack(), meta, table, *blobs]
        start, end = self.end, self.end + header.total_bytes
        padding = -end % PAGE_BYTES
        buffers.append(bytes(padding))
        write_all(fd, buffers, start - len(self.page))
        self.page = _last_bytes(buffers[:-1], end % PAGE_BYTES)
        return Bundle(self.ordinal, start, end, header, rows, b"", b"", b"")

    def advance(self, bundle: Bundle) -> None:
        """The bundle at the end belongs to the segment now."""
        header = bundle.header
        self.end = bundle.end
        self.file_bytes = max(self.file_bytes, -(-bundle.end // PAGE_BYTES) * PAGE_BYTES)
        self.chain_crc = header.crc
        self.entries += header.entry_count
        self.last_seq = max(self.last_seq, header.last_seq)
        self.synced_seq = max(self.synced_seq, header.synced_seq)
        if header.batch_count:
            self._note_batches(bundle)
        if self.columns is not None:
            self.columns.append((bundle.rows["code"].copy(), bundle.rows["seq"].copy()))

    def _note_batches(self, bundle: Bundle) -> None:
        header, batches = bundle.header, bundle.batches
        self.first_order_ns = self.first_order_ns or header.first_order_ns
        self.last_order_ns = header.last_order_ns
        self.last_crc = int(batches["crc"][-1])
        self.group_id = batches["group_id"][0].tobytes()
        newest = self.incarnations[-1][0] if self.incarnations else -1
        if int(batches["epoch"][-1]) != newest:
            for epoch, name in zip(batches["epoch"].tolist(), batches["incarnation"], strict=True):
                if epoch != newest:
                    self.incarnations.append((epoch, name.tobytes()))
                    newest = epoch

    def close(self, fd: int) -> None:
        """Puts codes and seqs together behind the bundles; not synced here. What is lost of it is made again."""
        assert self.columns is not None
        codes = np.concatenate([c for c, _ in self.columns]) if self.columns else np.empty(0, "<u8")
        seqs = np.concatenate([s for _, s in self.columns]) if self.columns else np.empty(0, "<u8")
        tail = codes.tobytes() + seqs.tobytes()
        write_all(fd, [self.page, tail], self.end - len(self.page))
        closing = Closing(
            self.opening.salt, self.end, self.entries, self.last_seq, self.first_order_ns, self.last_order_ns,
            self.last_crc, crc32c(tail),
        )  # fmt: skip
        storage.ftruncate(fd, self.end + len(tail))
        write_all(fd, [closing.pack()], CLOSING_AT)
        self.file_bytes = self.end + len(tail)
        self.take_closing(closing)

    # --- reading

    def take_closing(self, closing: Closing) -> None:
        """The segment is closed, and this is what is known of it."""
        self.closing = closing
        self.end, self.entries, self.last_seq = closing.end, closing.entries, closing.last_seq
        self.first_order_ns, self.last_order_ns = closing.first_order_ns, closing.last_order_ns
        self.last_crc = closing.last_crc
        self.columns, self.page = None, b""

    def read_columns(self, fd: int) -> tuple[Array, Array]:
        """(codes, seqs) of every entry, in the order they were appended. Raises CorruptionError."""
        if (columns := self.columns) is not None:
            columns = list(columns)
            if not columns:
                return np.empty(0, "<u8"), np.empty(0, "<u8")
            return np.concatenate([c for c, _ in columns]), np.concatenate([s for _, s in columns])
        assert self.closing is not None
        tail = storage.pread(fd, self.entries * 16, self.end)
        if len(tail) != self.entries * 16 or crc32c(tail) != self.closing.tail_crc:
            raise CorruptionError(f"{self.path}: the list of its entries is not what was written.")
        return np.frombuffer(tail, "<u8", self.entries), np.frombuffer(tail, "<u8", self.entries, self.entries * 8)

    def bundles(self, fd: int, at: int = PAGE_BYTES, chain: int | None = None) -> Iterator[Bundle]:
        """Whole bundles from offset `at` (the header before it has checksum `chain`) up to the first that is none."""
        prev_crc = self.opening.crc if chain is None else chain
        while (bundle := self.read_bundle(fd, at, prev_crc)) is not None:
            yield bundle
            at, prev_crc = bundle.end, bundle.header.crc

    def read_bundle(self, fd: int, at: int, prev_crc: int) -> Bundle | None:
        """The bundle at `at` without its blobs; None if none that is whole stands there."""
        header = BundleHeader.parse(storage.pread(fd, BUNDLE_BYTES, at), self.opening.salt, prev_crc)
        if header is None:
            return None
        table_bytes = header.entry_count * ROW.itemsize
        body = storage.pread(fd, header.meta_bytes + table_bytes, at + BUNDLE_BYTES)
        if len(body) != header.meta_bytes + table_bytes or crc32c(body) != header.body_crc:
            return None
        meta = zstandard.ZstdDecompressor().decompress(body[: header.meta_bytes], max_output_size=MAX_META_BYTES)
        headers_end = header.batch_count * BATCH_HEADER.itemsize
        descriptors_end = headers_end + header.record_count * DESCRIPTOR.itemsize
        rows = np.frombuffer(body, ROW, header.entry_count, header.meta_bytes)
        return Bundle(
            self.ordinal, at, at + header.total_bytes, header, rows,
            meta[:headers_end], meta[headers_end:descriptors_end], meta[descriptors_end:],
        )  # fmt: skip


def compress_meta(*parts: bytes) -> bytes:
    """What `read_bundle` takes apart again."""
    packed: bytes = _zstd.compress(b"".join(parts))
    return packed


def _last_bytes(buffers: Sequence[Buffer], count: int) -> bytes:
    """The last `count` bytes of all buffers."""
    found: list[bytes] = []
    for buffer in reversed(buffers):
        if not count:
            break
        part = bytes(memoryview(buffer)[max(0, len(buffer) - count) :])
        found.append(part)
        count -= len(part)
    return b"".join(reversed(found))
