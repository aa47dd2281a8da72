"""What the relay costs production: 4 KiB random writes at queue depth 32 with the relay running, against without.

Pinned: the collector and its client (fio) have one core, relay and broker the others; so what is measured is what
passes from the one to the other: the disk, the page cache, the journal's folder. Not pinned: what the scheduler makes
of all of them on the same cores. There is no replayer (it is on another machine). Without: the relay has been stopped,
the broker idles. Ratios are taken inside a round; medians over the rounds. After each cell the relay carries what was
written, and the topic is deleted: the relay makes it again, and goes on with what the journal has.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterable
from pathlib import Path

from tests.bench.carrier import tools
from tests.bench.carrier.feeding import say
from tests.bench.carrier.line import Line, line
from tests.bench.cells import JOBS, Cells
from tests.bench.machine import pin
from tests.bench.report import Figure
from tests.kafka.broker import Broker

RATIO_MIN = 0.8
# A cell leaves up to 1 GiB that must be carried before the next one.
SECONDS_MAX = 3


class Cores:
    """Which cores production has, and which what is behind the journal."""

    def __init__(self) -> None:
        everything = sorted(os.sched_getaffinity(0))
        self.all = set(everything)
        self.production, self.behind = set(everything[:1]), set(everything[1:])

    def divide(self, made: Line, broker: Broker, pinned: bool) -> list[str]:
        """Gives everyone their cores (or everyone all of them); fio's option that goes with it."""
        parents = made.parents()
        behind = [broker.pid, *(pid for role, pid in parents.items() if role == "relay")]
        pin([parents["collector"]], self.production if pinned else self.all)
        pin(behind, self.behind if pinned else self.all)
        return [f"--cpus_allowed={next(iter(self.production))}"] if pinned else []


def _cell(made: Line, cells: Cells, broker: Broker, seed: int, seconds: int, pinned: bool, relay: bool) -> float:
    """Writes a second in one cell. Raises RuntimeError (fio)."""
    cores = Cores()
    made.settle()
    if not relay:
        made.halt("relay")
    extra = cores.divide(made, broker, pinned)
    try:
        write = cells.fio(made.appliance.uri(made.volume), JOBS[0], seconds, seed, extra)["write"]
    finally:
        if not relay:
            made.appliance.start("relay")
        cores.divide(made, broker, False)
    _empty(made)
    ios, milliseconds = int(write["total_ios"]), int(write["runtime"])
    return 1000 * ios / milliseconds


def _empty(made: Line) -> None:
    """Everything is carried, and the disk has it no more."""
    made.drain()
    made.halt("relay")
    tools.delete(made.cluster)
    made.appliance.start("relay")


def measure(folder: Path, broker: Broker, rounds: int, seconds: int) -> list[Figure]:
    """Four cells a round, some 15 s each with what they leave to be carried."""
    seconds = min(seconds, SECONDS_MAX)
    found: dict[tuple[bool, bool], list[float]] = {}
    with line(folder / "collector", broker.address, ("collector", "relay")) as (made, cells):
        _cell(made, cells, broker, 99, 1, False, True)  # not measured: buffers and caches
        for number in range(rounds):
            order = [(pinned, relay) for pinned in _pinnings() for relay in (True, False)]
            random.Random(number).shuffle(order)
            for pinned, relay in order:
                rate = _cell(made, cells, broker, number, seconds, pinned, relay)
                found.setdefault((pinned, relay), []).append(rate)
                say(f"round {number + 1} collector, {'pinned' if pinned else 'not pinned'}, "
                    f"{'with' if relay else 'without'} the relay: {rate:,.0f}/s")  # fmt: skip
        made.drain()
    return [_figure(pinned, found[pinned, True], found[pinned, False]) for pinned in _pinnings()]


def _pinnings() -> Iterable[bool]:
    """With one core there is nothing to divide."""
    return (True, False) if len(os.sched_getaffinity(0)) > 1 else (False,)


def _figure(pinned: bool, beside: list[float], alone: list[float]) -> Figure:
    ratio = statistics.median(a / b for a, b in zip(beside, alone, strict=True))
    where = "collector and fio on one core, relay and broker on the others" if pinned else "not pinned"
    return Figure(
        f"4 KiB random write, QD 32, with the relay running, against without: {where}",
        f"{statistics.median(beside):,.0f} against {statistics.median(alone):,.0f} /s, {ratio:.2f} ×",
        f"≥ {RATIO_MIN:g} ×" if pinned else "–", ratio >= RATIO_MIN if pinned else None,
    )  # fmt: skip
