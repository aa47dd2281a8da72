"""What the history alone does: `python -m tests.bench.history [--entries N] [--folder DIR]`. Prints a table.

Each row runs against a fresh history in the folder; no journal, replayer or server takes part. The files are synced
once for each bundle, as a replayer does, and that time counts.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cdp.history.history import Extent, History
from cdp.journal.batch import Batch
from tests.history.support import BLOCK, Stream, write

BUNDLE_ENTRIES = 2048
BATCH_RECORDS = 32
VOLUME_BLOCKS = 1 << 21  # 8 GiB, sparse
SEGMENT_BYTES = 64 << 20


def batches_of(stream: Stream, places: list[tuple[int, int]]) -> Iterator[tuple[list[Batch], list[tuple[int, int]]]]:
    """Batches whose records write no data (the history keeps none of it), a bundle at a time."""
    for at in range(0, len(places), BUNDLE_ENTRIES):
        part = places[at : at + BUNDLE_ENTRIES]
        made = [
            stream.batch([write(block, b"") for block, _ in part[i : i + BATCH_RECORDS]], 1_000_000)
            for i in range(0, len(part), BATCH_RECORDS)
        ]
        yield made, part


def fill(history: History, places: list[tuple[int, int]], content: Callable[[int], memoryview], fast: bool) -> float:
    """Seconds that append, sync and publish took."""
    spent, stream = 0.0, Stream()
    for batches, part in batches_of(stream, places):
        seq = batches[0].first_seq
        extents = [Extent(0, block, count, seq + i, content(count)) for i, (block, count) in enumerate(part)]
        start = time.perf_counter()
        pending = history.append(batches, extents, fast)
        history.sync(pending)
        history.publish(pending)
        spent += time.perf_counter() - start
        history.applied_seq = batches[-1].last_seq
    return spent


class Contents:
    """Blocks to be replaced: random ones, ones that zstd halves, tiny ones; no two neighbours alike."""

    def __init__(self, kind: str) -> None:
        chance = random.Random(kind)
        size = 8 << 20
        if kind == "random":
            raw = chance.randbytes(size)
        elif kind == "half":
            raw = b"".join(chance.randbytes(BLOCK // 2 - 64) + bytes(BLOCK // 2 + 64) for _ in range(size // BLOCK))
        else:
            raw = b"".join(chance.randbytes(16) + bytes(BLOCK - 16) for _ in range(size // BLOCK))
        self._raw, self._at = memoryview(raw), 0

    def __call__(self, count: int) -> memoryview:
        length = count * BLOCK
        if self._at + length > len(self._raw):
            self._at = 0
        self._at += length
        return self._raw[self._at - length : self._at]


def opened(folder: Path, name: str) -> History:
    shutil.rmtree(folder / name, ignore_errors=True)
    history = History(str(folder / name), segment_bytes=SEGMENT_BYTES)
    history.cut(0)
    return history


def writes(folder: Path, count: int) -> None:
    chance = random.Random(7)
    small = [(chance.randrange(VOLUME_BLOCKS), 1) for _ in range(count)]
    for kind, fast in (("random", False), ("random", True), ("half", False)):
        history = opened(folder, "writes")
        seconds = fill(history, small, Contents(kind), fast)
        per_byte = history.bytes / (len(small) * BLOCK)
        print(f"4 KiB writes, {kind}{', fast' if fast else ''}: {len(small) / seconds:,.0f}/s, "
              f"{per_byte:.3f} bytes of history a byte")  # fmt: skip
        start = time.perf_counter()
        kept = history.retain(None, history.bytes // 2, [], 0)
        entries = len(small) * kept.freed_bytes // max(1, history.bytes + kept.freed_bytes)
        print(f"  half of it dropped: {(time.perf_counter() - start) / max(1, entries) * 1e6:.1f} µs an entry")
        history.close()
    large = [(chance.randrange(VOLUME_BLOCKS // 256) * 256, 256) for _ in range(count // 256)]
    for kind in ("random", "half"):
        history = opened(folder, "writes")
        seconds = fill_large(history, large, Contents(kind))
        print(f"1 MiB writes, {kind}: {len(large) / seconds:,.0f} MiB/s, {history.bytes / (len(large) << 20):.3f}")
        history.close()


def fill_large(history: History, places: list[tuple[int, int]], content: Callable[[int], memoryview]) -> float:
    spent, stream = 0.0, Stream()
    for at in range(0, len(places), 8):
        part = places[at : at + 8]
        batches = [stream.batch([write(block, b"")], 1_000_000) for block, _ in part]
        extents = [Extent(0, b, n, batches[0].first_seq + i, content(n)) for i, (b, n) in enumerate(part)]
        start = time.perf_counter()
        pending = history.append(batches, extents, False)
        history.sync(pending)
        history.publish(pending)
        spent += time.perf_counter() - start
    return spent


def reads(folder: Path, entries: int, kind: str) -> None:
    chance = random.Random(9)
    places = [(chance.randrange(VOLUME_BLOCKS), 1) for _ in range(entries)]
    history = opened(folder, "reads")
    seconds = fill(history, places, Contents(kind), False)
    print(f"{entries:,} entries of {kind} blocks: {entries / seconds:,.0f}/s, {history.bytes >> 20} MiB")
    replica = os.open(folder / "replica", os.O_RDWR | os.O_CREAT)
    os.ftruncate(replica, VOLUME_BLOCKS * BLOCK)
    newest, size = history.applied_seq, VOLUME_BLOCKS * BLOCK
    target = memoryview(bytearray(1 << 20))
    touched = [block for block, _ in chance.sample(places, min(100_000, entries))]
    for label in ("first time", "again"):
        start = time.perf_counter()
        view = history.view(replica, 0, 1, size, newest)
        view.read_into(touched[0] * BLOCK, target[:BLOCK])
        opening_ms = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        for block in touched:
            view.read_into(block * BLOCK, target[:BLOCK])
        rate = len(touched) / (time.perf_counter() - start)
        print(f"random 4 KiB reads from undo, {label}: {rate:,.0f}/s; opened in {opening_ms:.2f} ms")
    for point, share in ((1, "all"), (newest - entries // 5, "a fifth"), (newest - 1, "one block")):
        view = history.view(replica, 0, point, size, newest)
        start = time.perf_counter()
        for offset in range(0, 1 << 30, 1 << 20):
            view.read_into(offset, target)
        seconds = time.perf_counter() - start
        print(f"sequential 1 MiB reads, {share} of the entries after the point: {1024 / seconds:,.0f} MiB/s")
    for _ in range(2):
        start = time.perf_counter()
        starts, _counts = history.changed_blocks(0, 1, newest)
        print(f"what changed in all of it: {(time.perf_counter() - start) * 1e3:.0f} ms, {len(starts):,} stretches")
    start = time.perf_counter()
    print(f"time to seq: {history.timeline.seq_at(history.timeline.time_of(newest // 2))}, "
          f"{(time.perf_counter() - start) * 1e6:.0f} µs")  # fmt: skip
    history.close()
    start = time.perf_counter()
    history = History(str(folder / "reads"), segment_bytes=SEGMENT_BYTES)
    history.cut(newest)
    print(f"opened again after a clean stop: {(time.perf_counter() - start) * 1e3:.0f} ms")
    history.close()
    os.close(replica)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries of the histories that are read")
    parser.add_argument("--writes", type=int, default=200_000, help="entries of the histories that are only written")
    parser.add_argument("--kind", choices=["random", "half", "tiny"], default="half", help="content that is read")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cdp-bench-", dir=arguments.folder))
    try:
        if arguments.writes:
            writes(folder, arguments.writes)
        if arguments.entries:
            reads(folder, arguments.entries, arguments.kind)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
