"""What production notices of a broker that fails: p99 of 4 KiB random writes at 5,000 a second, queue depth 32.

Four cells, in an order of its own in each round: nothing fails; the broker is killed (kill -9) a quarter into the cell;
it is frozen (SIGSTOP) then; it is away from the beginning, for relay and replayer too, which were started without it.
Latency is fio's, from submission to completion of each write, `ack = "local"`. A cell's p99 over that of the cell of
the same round in which nothing fails; medians over the rounds. All on the same cores, with the replayer: where nothing
fails the broker's own work is in that p99. Afterwards the broker is back, and all that was written is replayed.
"""

from __future__ import annotations

import random
import signal
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.bench.carrier.feeding import say
from tests.bench.carrier.line import Line, line
from tests.bench.cells import JOBS, Cells
from tests.bench.report import Figure
from tests.kafka.broker import Broker

RATE = 5_000
RATIO_MAX = 1.5
CALM, KILLED, FROZEN, AWAY = "nothing fails", "killed", "frozen", "away"
BEHIND = ("relay", "replayer")


class Cell(NamedTuple):
    """fio's latencies of one cell in µs, and the rate it reached."""

    p99_us: float
    max_us: float
    rate: float

    def __str__(self) -> str:
        return f"p99 {self.p99_us:.0f} µs, longest {self.max_us / 1000:.1f} ms, {self.rate:,.0f}/s"


def _load(made: Line, cells: Cells, seconds: int, seed: int, fail: Callable[[], None]) -> Cell:
    """Loads the collector; `fail` is called a quarter into it."""
    timer = threading.Timer(seconds / 4, fail)
    timer.start()
    try:
        uri = made.appliance.uri(made.volume)
        write = cells.fio(uri, JOBS[0], seconds, seed, [f"--rate_iops={RATE}"])["write"]
    finally:
        timer.cancel()
        timer.join()
    clat = write["clat_ns"]
    rate = write["total_ios"] / (write["runtime"] / 1000)
    return Cell(clat["percentile"]["99.000000"] / 1000, clat["max"] / 1000, rate)


def _cell(made: Line, cells: Cells, broker: Broker, what: str, seconds: int, seed: int) -> Cell:
    """One cell, from and to a broker that is there and a line at rest."""
    made.settle()
    if what == AWAY:
        made.halt(*BEHIND)
        broker.kill()
        made.appliance.start(*BEHIND)
    failures: dict[str, Callable[[], None]] = {KILLED: broker.kill, FROZEN: lambda: broker.signal(signal.SIGSTOP)}
    try:
        return _load(made, cells, seconds, seed, failures.get(what, lambda: None))
    finally:
        if what == FROZEN:
            broker.signal(signal.SIGCONT)
        elif what in (KILLED, AWAY):
            broker.kill()  # where it did not come to that
            broker.start()


def measure(folder: Path, broker: Broker, rounds: int, seconds: int) -> list[Figure]:
    """Four cells a round; a broker's new start and what was held up come to some 15 s each."""
    found: dict[str, list[Cell]] = {what: [] for what in (CALM, KILLED, FROZEN, AWAY)}
    with line(folder / "outage", broker.address) as (made, cells):
        _cell(made, cells, broker, CALM, seconds, 0)  # not measured: buffers and caches
        for number in range(rounds):
            order = list(found)
            random.Random(number).shuffle(order)
            for what in order:
                cell = _cell(made, cells, broker, what, seconds, number)
                found[what].append(cell)
                say(f"round {number + 1} outage, {what}: {cell}")
        made.drain()
    return [_figure(what, found[what], found[CALM]) for what in (KILLED, FROZEN, AWAY)]


def _figure(what: str, cells: list[Cell], calm: list[Cell]) -> Figure:
    ratio = statistics.median(a.p99_us / b.p99_us for a, b in zip(cells, calm, strict=True))
    ours, base = (statistics.median(c.p99_us for c in some) for some in (cells, calm))
    longest = statistics.median(c.max_us for c in cells) / 1000, statistics.median(c.max_us for c in calm) / 1000
    return Figure(
        f"production's p99 with the broker {what}, against none of that ({RATE:,} 4 KiB writes/s, QD 32)",
        f"{ours:,.0f} against {base:,.0f} µs, {ratio:.2f} × (longest {longest[0]:.1f} against {longest[1]:.1f} ms)",
        f"≤ {RATIO_MAX:g} ×", ratio <= RATIO_MAX and min(c.rate for c in cells) >= 0.98 * RATE,
    )  # fmt: skip
