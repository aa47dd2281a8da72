"""The replayer alone, from a backlog in Kafka: under the conditions of `tests.bench.replay`, the embedded journal.

Window full, retention running, random data, the volume filled with 4 KiB writes before. A relay in this process has
carried the backlog into the topic while the replayer was stopped, and is idle. The clock starts when the replayer has
fetched its first message (until then it opens its history and connects: said beside it) and ends when the last record
is applied. Kafka's own ConsumerPerformance then reads the same topic, and throws away what it reads.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path
from typing import NamedTuple

from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.reader import KafkaReader
from cdp.replica.replayer import Replayer
from tests.bench.carrier import tools
from tests.bench.carrier.feeding import Batches, Carried, say
from tests.bench.replay import (
    BLOCK,
    LARGE,
    LIMIT_SECONDS,
    RANDOM,
    SEGMENT_BYTES,
    VOLUME_BYTES,
    WINDOW_BYTES,
    Payloads,
    large_writes,
    small_writes,
)
from tests.bench.report import Figure
from tests.replica.helpers import Rig

WRITES_MIN, MIB_MIN = 30_000, 150
# Of a cell, for each second that it is to take: 16,384 writes.
MIB_A_SECOND = 64
# Looking for the first message: some thousandths of what is timed.
LOOK_SECONDS = 0.002


class Cell(NamedTuple):
    """What one backlog took. `start_seconds` from the replayer's start to its first message."""

    bytes: int
    seconds: float
    start_seconds: float
    cpu_seconds: float

    @property
    def mib_s(self) -> float:
        return self.bytes / self.seconds / (1 << 20)

    def __str__(self) -> str:
        blocks = self.bytes / BLOCK
        return (f"{blocks / self.seconds:,.0f} blocks/s, {self.mib_s:.0f} MiB/s, CPU "
                f"{self.cpu_seconds * 1e6 / blocks:.1f} µs a block, start {self.start_seconds:.2f} s")  # fmt: skip


class KafkaRig(Rig):
    """Replayers that read a topic. `reader` is that of the newest life."""

    reader: KafkaReader | None = None

    def __init__(self, folder: Path, carried: Carried) -> None:
        folder.mkdir(parents=True)
        self.carried = carried
        super().__init__(folder, carried.feed, ["db"], segment_bytes=SEGMENT_BYTES, window_bytes=WINDOW_BYTES)

    def _new(self) -> Replayer:
        return Replayer(self.folder, "group", self._open, volumes=self.volumes, **self.settings)

    def _open(self, after_seq: int) -> KafkaReader:
        self.reader = KafkaReader(self.carried.cluster, f"{self.folder}/place", after_seq)
        return self.reader

    def cell(self, batches: Batches) -> Cell:
        """One backlog, from the topic to the replica. Raises AssertionError, RefusedError when replay has ended."""
        self.replayer.stop()
        tools.forget(self.carried.cluster)  # what the cell before left, all of it applied
        total, _ = self.carried.carry(batches)
        os.sync()
        self.reader = None
        started = time.perf_counter()
        self.start()
        pause = threading.Event()
        while self.reader is None or not self.reader.end()[0]:
            if self.replayer.state in ("stopped", "forked") or time.perf_counter() - started > LIMIT_SECONDS:
                raise AssertionError(f"the replayer reads nothing: {self.replayer.status()}")
            pause.wait(LOOK_SECONDS)
        began, cpu = time.perf_counter(), time.process_time()
        last = self.feed.writer.last_seq
        assert self.replayer.wait_applied(last, LIMIT_SECONDS), f"seq {last} not applied: {self.replayer.status()}"
        return Cell(total, time.perf_counter() - began, began - started, time.process_time() - cpu)


def measure(folder: Path, cluster: Cluster, rounds: int, seconds: int) -> list[Figure]:
    """4 KiB random and 1 MiB writes in order, in turn. Some 25 s to fill the window, then about 40 s a round of 6 s."""
    total = min(seconds, 8) * MIB_A_SECOND << 20
    carried, payloads = Carried(folder / "replay", cluster), Payloads(False)
    rig = KafkaRig(folder / "replay" / "replayer", carried)
    small, large, consumer = list[Cell](), list[Cell](), list[float]()
    try:
        rig.start()
        rig.cell(small_writes(VOLUME_BYTES, payloads, True))
        while not rig.replayer.history.oldest_seq:
            rig.cell(small_writes(VOLUME_BYTES, payloads, True))  # until the window is full
        for number in range(rounds):
            if number:
                rig.cell(small_writes(VOLUME_BYTES, payloads, True))
            small.append(rig.cell(small_writes(total, payloads, False)))
            say(f"round {number + 1} replay {RANDOM}: {small[-1]}")
            large.append(rig.cell(large_writes(2 * total, payloads)))
            say(f"round {number + 1} replay {LARGE}: {large[-1]}")
            rig.replayer.stop()
            consumer.append(tools.consume(cluster))
            say(f"round {number + 1} ConsumerPerformance: {consumer[-1]:.0f} MiB/s")
    finally:
        rig.replayer.stop()
        carried.close()
    writes = statistics.median(c.bytes / BLOCK / c.seconds for c in small)
    mib = statistics.median(c.mib_s for c in large)
    what, theirs = "replayer alone, from a backlog in Kafka", statistics.median(consumer)
    return [
        Figure(f"{what}: {RANDOM}", f"{writes:,.0f} writes/s", f"≥ {WRITES_MIN:,} writes/s", writes >= WRITES_MIN),
        Figure(f"{what}: {LARGE}", f"{mib:,.0f} MiB/s", f"≥ {MIB_MIN} MiB/s", mib >= MIB_MIN),
        Figure("ConsumerPerformance alone over that topic of 1 MiB writes", f"{theirs:,.0f} MiB/s", "–", None),
    ]
