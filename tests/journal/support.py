"""A journal for tests: small segments, batches with known content, crashes that keep what was synced."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from cdp.journal.batch import DESCRIPTOR, WRITE, Batch, Identity
from cdp.journal.chain import Chain
from cdp.journal.reader import EmbeddedReader
from cdp.journal.writer import JournalWriter

GROUP = b"group of 16 byte"
SEGMENT_BYTES = 64 << 10
MAX_BYTES = 64 << 20


def identity(epoch: int, group: bytes = GROUP) -> Identity:
    return Identity(group, epoch, epoch.to_bytes(4, "big") * 4)


def content(seq: int, size: int) -> bytes:
    """What record `seq` carries in these tests."""
    return random.Random(seq).randbytes(size)


def open_writer(folder: Path | str, epoch: int, known_durable_seq: int = 0, **sizes: int) -> JournalWriter:
    return JournalWriter(
        str(folder),
        identity(epoch),
        segment_bytes=sizes.get("segment_bytes", SEGMENT_BYTES),
        max_bytes=sizes.get("max_bytes", MAX_BYTES),
        known_durable_seq=known_durable_seq,
    )


def append(writer: JournalWriter, *sizes: int) -> int:
    """One batch of WRITE records of these sizes; its last seq."""
    first = writer.last_seq + 1
    data = [content(first + i, size) for i, size in enumerate(sizes)]
    descriptors = b"".join(
        DESCRIPTOR.pack(WRITE, 0, 1, len(piece), (first + i) * 4096, len(piece)) for i, piece in enumerate(data)
    )
    assert writer.append(descriptors, data, sum(sizes)) == first
    return writer.last_seq


def sync(writer: JournalWriter) -> int:
    """Everything appended is durable and published."""
    token = writer.begin_sync()
    if token is not None:
        writer.sync(token)
        writer.end_sync(token)
    writer.publish(writer.last_seq)
    return writer.durable_seq


def prepare(writer: JournalWriter) -> None:
    """What a worker would do."""
    while (job := writer.prepare()) is not None:
        job()


def check_batch(batch: Batch) -> None:
    """Every record is the one that `append` made."""
    for record in batch.records():
        assert record.data == content(record.seq, record.length)
        assert record.offset == record.seq * 4096


def read_all(folder: Path | str, after_seq: int = 0, consumer: str = "test_reader") -> Chain:
    """Reads to the end as a consumer would, content checked; the chain at the end."""
    reader = EmbeddedReader(str(folder), consumer, after_seq)
    chain = Chain(b"", after_seq, next_crc(folder, after_seq))
    try:
        while batches := reader.read(1 << 20):
            for batch in batches:
                check_batch(batch)
                assert chain.check(batch)
    finally:
        reader.close()
    return chain


def next_crc(folder: Path | str, after_seq: int) -> int:
    """The checksum that the batch behind `after_seq` must continue."""
    if after_seq == 0:
        return 0
    reader = EmbeddedReader(str(folder), "test_probe", after_seq)
    try:
        batches = reader.read(1)
        return batches[0].prev_crc if batches else 0
    finally:
        reader.close()


def segments(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("segment-*"))


def copy(folder: Path, target: Path) -> Path:
    """The folder as a crash of the process leaves it (its lock is not part of it)."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.sock"))
    return target


def change(path: Path, offset: int, new: Callable[[bytes], bytes] | bytes, length: int = 1) -> None:
    """Overwrites bytes of a file in place."""
    fd = os.open(path, os.O_RDWR)
    try:
        old = os.pread(fd, length, offset)
        os.pwrite(fd, new if isinstance(new, bytes) else new(old), offset)
    finally:
        os.close(fd)


def flip(path: Path, offset: int) -> None:
    """Every bit of one byte; twice is as before."""
    change(path, offset, lambda old: bytes([old[0] ^ 0xFF]))
