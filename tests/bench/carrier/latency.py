"""How long a write takes to Kafka, and to the replayer: at 5,000 random 4 KiB writes a second, all on the same cores.

At random moments of the load the relay is asked for its `carried_seq`, and the replayer for its `applied_seq`, which is
then opened over NBD as `db@seq:N` and read. Each answer gives an age: from the moment when the batch that ends there
was appended to the collector's journal (its wall time) until the answer is here. A write of x ms ago has not come that
far at such a moment exactly when the age is more than x, so at a steady rate these ages are distributed as the times
that writes take; and no interval of asking is in them (a process answers at most ten times a second). All samples of
all rounds count together. What the answer's own way takes, some ms, is in it.

After a round the topic is read for the seqs and wall times of all batches. With them stands the broker's own time of
each message (LogAppendTime, the same clock, in ms): exact and of every write, but without the relay's hearing of it.
Where the lag grows, ages under the load are too short, and this is not: so a row is met only if this is within it too.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cdp.journal.kafka.carried import messages
from cdp.journal.kafka.messages import decode_claim, split
from tests.bench.carrier import tools
from tests.bench.carrier.feeding import say
from tests.bench.carrier.line import Line, line
from tests.bench.cells import JOBS, Cells
from tests.bench.report import Figure
from tests.kafka.broker import Broker
from tests.support.nbd import NbdClient

RATE = 5_000
# Between two questions, at random so as not to fall in with anyone's own rhythm. Asked sooner, a process lets us wait.
PAUSE_SECONDS = (0.10, 0.16)
# The first part of a load holds the burst of its start.
SETTLE_NS = 10**9
# A question that found nothing new to know for so long: then something else is wrong.
MOST_SECONDS = 30.0
# Of p50 and p99.
ACKNOWLEDGED_MS_MAX, OPENABLE_MS_MAX = (50.0, 500.0), (150.0, 1000.0)


class Sample(NamedTuple):
    """At `at_ns` it was known that `seq` had been reached."""

    at_ns: int
    seq: int


class Asking:
    """Asks one question again and again at random moments, in a thread, from `with` to its end."""

    def __init__(self, question: Callable[[], int], seed: int) -> None:
        self.samples: list[Sample] = []
        self.error: BaseException | None = None
        self._question, self._chance, self._end = question, random.Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._end.wait(self._chance.uniform(*PAUSE_SECONDS)):
                seq = self._question()
                self.samples.append(Sample(time.time_ns(), seq))
        except BaseException as e:
            self.error = e

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end.set()
        self._thread.join(MOST_SECONDS)
        if self.error is not None and kind is None:
            raise self.error


class Written(NamedTuple):
    """A batch of writes as the topic has it."""

    last_seq: int
    wall_ns: int
    broker_ms: int
    records: int


@dataclass
class Found:
    """Ages and times in ms, of all rounds."""

    rates: list[float] = field(default_factory=list)
    acknowledged: list[float] = field(default_factory=list)
    openable: list[float] = field(default_factory=list)
    broker: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        named = {"acknowledged": self.acknowledged, "openable": self.openable, "by the broker's clock": self.broker}
        parts = (f"{name} {text(percentiles(ms))} of {len(ms):,}" for name, ms in named.items())
        return f"{self.rates[-1]:,.0f} writes/s; " + "; ".join(parts)


def percentiles(ms: Iterable[float]) -> tuple[float, float]:
    """p50 and p99."""
    ordered = sorted(ms)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


def text(ms: tuple[float, float]) -> str:
    return f"p50 {ms[0]:.0f} ms, p99 {ms[1]:.0f} ms"


def ages_ms(samples: Iterable[Sample], batches: list[Written]) -> list[float]:
    """How old the newest batch that had come whole was, in the samples that were taken under the load."""
    ends = [b.last_seq for b in batches]
    begin_ns, end_ns = batches[0].wall_ns + SETTLE_NS, batches[-1].wall_ns
    return [
        (at_ns - batches[max(0, bisect_right(ends, seq) - 1)].wall_ns) / 1e6
        for at_ns, seq in samples if begin_ns <= at_ns <= end_ns
    ]  # fmt: skip


def written(made: Line, begin: int) -> list[Written]:
    """Every batch of writes in the topic from offset `begin` on."""
    end = tools.ends(made.cluster)[1]
    consumer, found = made.cluster.consumer(), []
    try:
        for message in messages(consumer, made.cluster.partition, begin, end):
            if decode_claim(message.value, "claim") is None:
                for b in split(message.value, f"offset {message.offset}"):
                    if b.data_bytes:
                        found.append(Written(b.last_seq, b.wall_ns, message.timestamp, b.record_count))
    finally:
        consumer.close()
    return found


def one_round(made: Line, cells: Cells, seconds: int, seed: int, found: Found) -> None:
    """Loads the line and asks. Raises RuntimeError (fio), NbdRefused (what is applied cannot be opened), CdpError."""

    def opened() -> int:
        seq = made.position("replayer")
        with NbdClient(made.appliance.socket("replayer"), f"{made.volume}@seq:{seq}") as past:
            past.read(0, 4096)
        return seq

    made.settle()
    begin = tools.ends(made.cluster)[1]
    with Asking(lambda: made.position("relay"), seed) as carried, Asking(opened, -1 - seed) as openable:
        result = cells.fio(made.appliance.uri(made.volume), JOBS[0], seconds, seed, [f"--rate_iops={RATE}"])
    made.drain()
    batches = written(made, begin)
    found.rates.append(result["write"]["total_ios"] / (result["write"]["runtime"] / 1000))
    found.acknowledged += ages_ms(carried.samples, batches)
    found.openable += ages_ms(openable.samples, batches)
    for b in batches:
        found.broker += [b.broker_ms - b.wall_ns / 1e6] * b.records


def measure(folder: Path, broker: Broker, rounds: int, seconds: int) -> list[Figure]:
    """Each round loads for three times `seconds`."""
    found = Found()
    with line(folder / "latency", broker.address) as (made, cells):
        for number in range(rounds):
            one_round(made, cells, 3 * seconds, number, found)
            say(f"latency after round {number + 1}: {found}")
    rate = statistics.median(found.rates)
    at = f"{rate:,.0f} 4 KiB writes/s, everything on the same cores"
    clock = text(percentiles(found.broker))
    return [
        _figure(f"a write until it is acknowledged by Kafka, {at} (by the broker's clock {clock})", found,
                found.acknowledged, ACKNOWLEDGED_MS_MAX),
        _figure(f"a write until it can be opened at the replayer, {at}", found, found.openable, OPENABLE_MS_MAX),
    ]  # fmt: skip


def _figure(what: str, found: Found, ms: list[float], most: tuple[float, float]) -> Figure:
    half, tail = percentiles(ms)
    within = [h < most[0] and t < most[1] for h, t in ((half, tail), percentiles(found.broker))]
    met = all(within) and statistics.median(found.rates) >= 0.98 * RATE
    asked = f"p50 < {most[0]:.0f} ms, p99 < {most[1]:.0f} ms"
    return Figure(what, f"{text((half, tail))}, of {len(ms):,} samples", asked, met)
