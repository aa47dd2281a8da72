"""The replayer alone, from a backlog: `python -m tests.bench.replay [--scratch DIR] [--mib N] [--rounds N]`.

A journal is written first with the real writer (nothing reads it meanwhile), then one replayer applies it with its
window full and retention running. 4 KiB writes are random over a volume that was filled with 4 KiB writes before (large
page-cache folios would slow every later small write), of random data and of data that zstd halves (a little more than
half of each block is zeros); 1 MiB writes run through the volume in order. History is what the undo log and its index
grew by for each byte written, without retention, the index written out before and after.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard

from cdp.journal.batch import DESCRIPTOR, WRITE
from cdp.replica import apply
from tests.bench.report import Figure
from tests.replica.helpers import Feed, Rig

BLOCK = 4096
VOLUME_BYTES = 512 << 20
SEGMENT_BYTES = 64 << 20
# What the collector makes of queue depth 32.
BATCH_WRITES = 32
LIMIT_SECONDS = 600.0
# Of a compressible block, the rest zeros: random bytes that zstd cannot shrink. An exact half would be more than half
# with any frame and index around it.
RANDOM_BYTES = BLOCK // 2 - 128
WINDOW_BYTES = 1 << 30  # full after the first fill and a cell
RANDOM, COMPRESSIBLE = "4 KiB random, random data", "4 KiB random, data that zstd halves"
LARGE = "1 MiB in order, random data"


class Payloads:
    """Pieces of the wanted size that differ from one another: slices of a pool at random places."""

    def __init__(self, compressible: bool) -> None:
        pool = bytearray(os.urandom(16 << 20))
        if compressible:
            for at in range(0, len(pool), BLOCK):
                pool[at + RANDOM_BYTES : at + BLOCK] = bytes(BLOCK - RANDOM_BYTES)
        self._pool = bytes(pool)
        self._step = BLOCK if compressible else 64
        # What zstd alone makes of it, a block at a time: the part of the history that is not ours.
        zstd = zstandard.ZstdCompressor(level=1)
        self.zstd_share = sum(len(zstd.compress(pool[at : at + BLOCK])) for at in range(0, 1 << 20, BLOCK)) / (1 << 20)

    def piece(self, length: int) -> bytes:
        at = random.randrange((len(self._pool) - length) // self._step) * self._step
        return self._pool[at : at + length]


def small_writes(total_bytes: int, payloads: Payloads, in_order: bool) -> Iterator[tuple[bytes, list[bytes]]]:
    """Batches of 4 KiB writes."""
    blocks = VOLUME_BYTES // BLOCK
    for first in range(0, total_bytes // BLOCK, BATCH_WRITES):
        places = [
            (first + i) % blocks if in_order else random.randrange(blocks) for i in range(BATCH_WRITES)
        ]
        yield (
            b"".join(DESCRIPTOR.pack(WRITE, 0, 1, BLOCK, place * BLOCK, BLOCK) for place in places),
            [payloads.piece(BLOCK) for _ in places],
        )


def large_writes(total_bytes: int, payloads: Payloads) -> Iterator[tuple[bytes, list[bytes]]]:
    """Batches of one 1 MiB write."""
    size = 1 << 20
    for i in range(total_bytes // size):
        yield DESCRIPTOR.pack(WRITE, 0, 1, size, i * size % VOLUME_BYTES, size), [payloads.piece(size)]


def backlog(feed: Feed, batches: Iterator[tuple[bytes, list[bytes]]]) -> int:
    """Appends all and publishes at the end; the bytes written."""
    total = 0
    for number, (descriptors, data) in enumerate(batches):
        size = sum(map(len, data))
        feed.append(descriptors, data, size)
        total += size
        if number % 256 == 255 and (work := feed.writer.prepare()) is not None:
            work()
    return total


def memory_mib() -> float:
    """Of this process now (PSS)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def cell(
    rig: Rig, batches: Iterator[tuple[bytes, list[bytes]]], measure_history: bool = False
) -> dict[str, float]:
    """One cell: the backlog is written with the replayer stopped, then timed from its publication to its end."""
    rig.replayer.stop()
    total = backlog(rig.feed, batches)
    os.sync()
    rig.start()
    before = rig.replayer.history.bytes
    cpu, began = time.process_time(), time.perf_counter()
    rig.feed.publish()
    rig.replayer.wait_applied(rig.feed.writer.last_seq, LIMIT_SECONDS)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    if measure_history:  # the index keeps the newest in memory: a stop puts it all on disk, as the one before has
        rig.replayer.stop()
        rig.start()
    return {
        "bytes": total,
        "seconds": seconds,
        "mib_s": total / seconds / (1 << 20),
        "writes_s": total / BLOCK / seconds,
        "cpu_us": cpu * 1e6 / (total / BLOCK),
        "history": (rig.replayer.history.bytes - before) / total,
    }


def cells(total: int) -> dict[str, Iterator[tuple[bytes, list[bytes]]]]:
    plain, halved = Payloads(False), Payloads(True)
    return {
        RANDOM: small_writes(total, plain, False),
        COMPRESSIBLE: small_writes(total, halved, False),
        LARGE: large_writes(2 * total, plain),
    }


Rows = dict[str, dict[str, float]]


def run(scratch: Path, total: int, rounds: int, window_bytes: int | None) -> Rows:
    """Every cell in every round, interleaved; medians."""
    feed = Feed(scratch / "journal", modelled=False, segment_bytes=SEGMENT_BYTES)
    feed.volume(1, "db", VOLUME_BYTES)
    feed.flush()
    rig = Rig(scratch / "replayer", feed, ["db"], segment_bytes=SEGMENT_BYTES, window_bytes=window_bytes)
    rig.start()
    found: dict[str, list[dict[str, float]]] = {}
    cell(rig, small_writes(VOLUME_BYTES, Payloads(False), True))
    while window_bytes is not None and not rig.replayer.history.oldest_seq:
        cell(rig, small_writes(VOLUME_BYTES, Payloads(False), True))  # until the window is full
    for _ in range(rounds):
        for name, batches in cells(total).items():
            if name == COMPRESSIBLE:  # what is replaced must be compressible too
                cell(rig, small_writes(VOLUME_BYTES, Payloads(True), True))
            found.setdefault(name, []).append(cell(rig, batches, window_bytes is None))
            cell(rig, small_writes(VOLUME_BYTES, Payloads(False), True))
    rig.replayer.stop()
    feed.close()
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def show(rows: Rows, window_bytes: int | None) -> None:
    print("window: " + ("none" if window_bytes is None else f"{window_bytes >> 20} MiB, retention running"))
    for name, row in rows.items():
        history = "" if window_bytes else f"  history {row['history']:.3f} of what was written"
        print(
            f"{name:30} {row['writes_s']:9.0f} blocks/s {row['mib_s']:7.0f} MiB/s"
            f"  CPU {row['cpu_us']:.1f} µs a block{history}"
        )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory (with the benchmark's own payloads): {memory_mib():.0f} MiB now, {peak_mib:.0f} MiB at its peak")


def measure(folder: Path, mib: int = 256, rounds: int = 3) -> list[Figure]:
    """For the README's second table."""
    full = run(folder / "replay-full", mib << 20, rounds, WINDOW_BYTES)
    free = run(folder / "replay-free", mib << 20, 1, None)
    figures = []
    for name, unit, least in ((RANDOM, "writes_s", 35_000), (COMPRESSIBLE, "writes_s", 20_000), (LARGE, "mib_s", 300)):
        value, word = full[name][unit], "writes/s" if unit == "writes_s" else "MiB/s"
        what = f"replayer alone, from a backlog: {name}"
        figures.append(Figure(what, f"{value:,.0f} {word}", f"≥ {least:,} {word}", value >= least))
    for name, most in ((RANDOM, 1.05), (COMPRESSIBLE, 0.5)):
        value = free[name]["history"]
        what = f"history per byte written, index included: {name}"
        if name == COMPRESSIBLE:
            what += f" (zstd alone, block by block: {Payloads(True).zstd_share:.3f})"
        figures.append(Figure(what, f"{value:.3f}", f"≤ {most}", value <= most))
    return figures


def profiled(scratch: Path, total: int) -> None:
    """Where the apply thread spends its time."""
    original, profiler = apply.ApplyThread._follow, cProfile.Profile()
    apply.ApplyThread._follow = lambda self: profiler.runcall(original, self)  # type: ignore[method-assign]
    show(run(scratch, total, 1, None), None)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", default=None, help="folder for the files (default: a new temporary one)")
    parser.add_argument("--mib", type=int, default=512, help="backlog of a cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="cdp-replay-", dir=options.scratch))
    try:
        if options.profile:
            profiled(scratch / "profile", options.mib << 20)
            return
        show(run(scratch / "free", options.mib << 20, 1, None), None)
        show(run(scratch / "full", options.mib << 20, options.rounds, WINDOW_BYTES), WINDOW_BYTES)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
