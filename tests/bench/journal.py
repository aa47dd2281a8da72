"""Measures the embedded journal alone: `python -m tests.bench.journal [--folder DIR] [--seconds S] [--rounds N]`.

Appends as the collector's loop does: batches of slices of a large buffer, a sync on a worker's thread at least every
50 ms, segments freed as they fill; then reads back. `append` is the time inside the call, its system call included;
`floor` is one pwritev of the same bytes, joined before, into the same kind of file. Medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

from cdp import storage
from cdp.journal import consumers
from cdp.journal.batch import DESCRIPTOR, WRITE, Identity
from cdp.journal.reader import EmbeddedReader
from cdp.journal.writer import JournalWriter

# name, records in a batch, bytes of each
CELLS = [("4 KiB x 1", 1, 4096), ("4 KiB x 32", 32, 4096), ("512 B x 32", 32, 512), ("1 MiB x 8", 8, 1 << 20)]
SEGMENT_BYTES = 64 << 20
MAX_BYTES = 2 << 30
SYNC_NS = 50_000_000
GROUP = b"journal benchmrk"


def pieces(count: int, size: int) -> list[memoryview]:
    """Payloads as they lie in a receive buffer, a request header of 28 bytes in front of each."""
    buffer = memoryview(bytearray(os.urandom(count * (size + 28))))
    return [buffer[i * (size + 28) + 28 :][:size] for i in range(count)]


class Appending:
    """A journal that is appended to for a while; what it measured."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._worker = storage.Worker(2, "bench")
        self._epoch = 0

    def run(self, count: int, size: int, seconds: float) -> tuple[int, list[int]]:
        """Appended batches, and ns inside each call of append."""
        self._epoch += 1
        writer = JournalWriter(
            self.folder, Identity(GROUP, self._epoch, os.urandom(16)), segment_bytes=SEGMENT_BYTES, max_bytes=MAX_BYTES
        )
        data = pieces(count, size)
        descriptors = b"".join(DESCRIPTOR.pack(WRITE, 0, 1, size, i * size, size) for i in range(count))
        taken: list[int] = []
        self._syncing = False
        end = time.monotonic_ns() + int(seconds * 1e9)
        next_sync = 0
        while (now := time.monotonic_ns()) < end:
            before = time.perf_counter_ns()
            writer.append(descriptors, data, count * size)
            taken.append(time.perf_counter_ns() - before)
            if now >= next_sync and not self._syncing:
                next_sync = now + SYNC_NS
                self._background(writer)
            self._worker.drain()
        while self._syncing:
            self._worker.drain()
        writer.close()
        return len(taken), taken

    def _background(self, writer: JournalWriter) -> None:
        token = writer.begin_sync()
        if token is not None:
            self._syncing = True
            self._worker.submit(lambda result, error: self._synced(writer, token, error), writer.sync, token)
        if (job := writer.prepare()) is not None:
            self._worker.submit(_raise, job)

    def _synced(self, writer: JournalWriter, token: object, error: BaseException | None) -> None:
        _raise(None, error)
        self._syncing = False
        writer.publish(writer.end_sync(token))  # type: ignore[arg-type]
        consumers.acknowledge(self.folder, "primary", max(0, writer.durable_seq - 1))
        writer.release()

    def close(self) -> None:
        self._worker.close()


def _raise(result: object, error: BaseException | None) -> None:
    if error is not None:
        raise error


def floor(folder: str, count: int, size: int, seconds: float) -> list[int]:
    """ns of one pwritev of the same length, whole pages, over and over in a file of a segment's size."""
    fd = storage.open_file(f"{folder}/floor", os.O_RDWR | os.O_CREAT)
    data = [b"".join(pieces(count, size)), bytes(4096)]
    step = len(data[0]) + 4096
    step -= step % 4096
    taken, at, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        before = time.perf_counter_ns()
        os.pwritev(fd, data, at)
        taken.append(time.perf_counter_ns() - before)
        at = at + step if at + 2 * step < SEGMENT_BYTES else 0
    os.close(fd)
    return taken


def read_back(folder: str) -> float:
    """MiB a second that a reader checks and decodes, from the oldest segment on."""
    first = min(int(name[8:]) for name in os.listdir(folder) if name.startswith("segment-"))
    reader = EmbeddedReader(folder, "bench", first - 1)
    total, begin = 0, time.monotonic()
    while batches := reader.read(8 << 20):
        total += sum(batch.batch_bytes for batch in batches)
    seconds = time.monotonic() - begin
    reader.close()
    consumers.remove(folder, "bench")
    return total / seconds / (1 << 20)


def median_us(values: list[int], rank: float = 0.5) -> float:
    return sorted(values)[int(len(values) * rank)] / 1000


def measure(folder: str, seconds: float, rounds: int) -> None:
    journal = f"{folder}/journal"
    consumers.register(journal, "primary")
    appending = Appending(journal)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name, _, _ in CELLS}
    for _ in range(rounds):
        for name, count, size in CELLS:
            lowest = median_us(floor(folder, count, size, seconds / 4))
            batches, taken = appending.run(count, size, seconds)
            figures = (batches * count / seconds, batches * count * size / seconds / (1 << 20))
            tail = (median_us(taken, 0.999), max(taken) / 1e6)
            results[name].append((*figures, median_us(taken), lowest, *tail, read_back(journal)))
    appending.close()
    print(f"{os.cpu_count()} CPUs, Python {platform.python_version()}, Linux {platform.release()}")
    print("batch         writes/s   MiB/s  append us  floor us  p99.9 us  max ms read MiB/s")
    show: Callable[..., str] = "{:12} {:9.0f} {:7.0f} {:10.1f} {:9.1f} {:9.0f} {:7.1f} {:10.0f}".format
    for name, rows in results.items():
        print(show(name, *(statistics.median(column) for column in zip(*rows, strict=True))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to measure (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="cdp-journal-bench-", dir=options.folder)
    try:
        measure(folder, options.seconds, options.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
