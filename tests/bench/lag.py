"""The steady row: 30,000 writes a second for half a minute, all on the same cores; the lag must not grow."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from tests.bench.cells import JOBS, Cells
from tests.bench.ours import Ours

RATE = 30_000
SECONDS = 30
# Each costs both children a snapshot.
SAMPLE_SECONDS = 2.0
# The first samples hold the burst of the start.
SETTLE_SECONDS = 8.0
# Heartbeat, bundling and the age of the figures are in it; what grows passes it within seconds.
GROWTH_SECONDS_MAX = 1.0


@dataclass
class Steady:
    """The rate that was reached, and (seconds since start, lag in seconds, lag in records) samples."""

    rate: float
    samples: list[tuple[float, float, int]]

    @property
    def growth_seconds(self) -> float:
        """How much longer the lag is in the last sample than in the first settled one."""
        settled = [lag for at, lag, _ in self.samples if at >= SETTLE_SECONDS]
        return settled[-1] - settled[0] if len(settled) > 1 else float("inf")

    @property
    def met(self) -> bool:
        return self.rate >= 0.98 * RATE and self.growth_seconds <= GROWTH_SECONDS_MAX


def steady(cells: Cells, ours: Ours) -> Steady:
    """Runs it. Raises RuntimeError if fio failed."""
    samples: list[tuple[float, float, int]] = []
    end, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not end.wait(SAMPLE_SECONDS):
            at = time.monotonic() - began
            replay = ours.group()["replay"]
            samples.append((at, float(replay["lag_seconds"] or 0), int(replay["lag_seq"] or 0)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = cells.fio(ours.appliance.uri(ours.volume), JOBS[0], SECONDS, 7, [f"--rate_iops={RATE}"])
    finally:
        end.set()
        watcher.join()
        ours.drain()
    return Steady(result["write"]["total_ios"] / (result["write"]["runtime"] / 1000), samples)
