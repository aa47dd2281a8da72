"""Cells: one job against one server. fio's nbd engine over a unix socket, a fixed span, a seeded order.

Before a cell the server is drained, the file system synced and the span paged in (or, for the cold job, out). What
disturbs a cell (foreign CPU, write-back, stolen time) is noted beside it, never hidden.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.machine import (
    PAGE,
    Counters,
    Peaks,
    cpu_seconds,
    page_in,
    page_out,
    sync_file_system,
)
from tests.bench.servers import BASE, MIRROR, Target
from tests.support.running import die_with_parent


@dataclass(frozen=True)
class Job:
    """One row of the table. `seconds_max` bounds what a fast server piles up in journal and page cache."""

    name: str
    title: str
    options: tuple[str, ...]
    depth: int
    cold: bool = False
    seconds_max: int = 1000


JOBS = (
    Job("write-qd32", "4 KiB random write, QD 32", ("--rw=randwrite", "--bs=4k", "--norandommap"), 32),
    Job("write-qd1", "4 KiB random write, QD 1", ("--rw=randwrite", "--bs=4k", "--norandommap"), 1),
    Job("read-qd32", "4 KiB random read, QD 32, cached", ("--rw=randread", "--bs=4k", "--norandommap"), 32),
    # Every block once: a block read twice would be a cached one.
    Job("read-cold", "4 KiB random read, QD 32, cold", ("--rw=randread", "--bs=4k"), 32, cold=True),
    Job("write-1m", "1 MiB sequential write, QD 8", ("--rw=write", "--bs=1m"), 8, seconds_max=3),
    Job("write-flush", "4 KiB write + flush each, QD 1",
        ("--rw=randwrite", "--bs=4k", "--norandommap", "--fsync=1"), 1),
)  # fmt: skip


@dataclass
class Cell:
    """What one job did against one server in one round. Rates a second, latencies in µs."""

    round: int
    job: str
    server: str
    iops: float
    mib_s: float
    p50_us: float
    p99_us: float
    cpu_cores: float
    disturbance: str


class Cells:
    """Runs cells in interleaved rounds and keeps every one of them."""

    def __init__(self, folder: Path, targets: Sequence[Target], span: int, seconds: int, peaks: Peaks) -> None:
        self.folder, self.targets, self.span, self.seconds = folder, list(targets), span, seconds
        self.peaks = peaks
        self.cells: list[Cell] = []

    def run(self, jobs: Sequence[Job], rounds: int) -> None:
        for target in self.targets:
            self._warm_up(target)
        for number in range(rounds):
            for index, job in enumerate(jobs):
                order = [t for t in self.targets if not (job.cold and t.name == MIRROR)]
                random.Random(number * 100 + index).shuffle(order)
                for target in order:
                    cell = self._cell(target, job, number)
                    self.cells.append(cell)
                    print(f"round {number + 1} {job.name:12} {target.name:28} {cell.iops:9.0f} IOPS "
                          f"p50 {cell.p50_us:7.0f} µs {cell.disturbance}", file=sys.stderr, flush=True)  # fmt: skip

    def _warm_up(self, target: Target) -> None:
        """Grows the server's buffers and threads; not measured."""
        target.before()
        try:
            for job in JOBS:
                if job.name in ("write-qd32", "write-1m"):
                    self.fio(target.uri, job, 1, 0)
        finally:
            target.after()

    def fio(self, uri: str, job: Job, seconds: int, seed: int, extra: Sequence[str] = ()) -> dict[str, Any]:
        """One fio run; its job's figures. Raises RuntimeError if it failed."""
        output = self.folder / "fio.json"
        command = [
            "fio", "--name=cell", "--ioengine=nbd", f"--uri={uri}", f"--size={self.span}", f"--iodepth={job.depth}",
            f"--runtime={min(seconds, job.seconds_max)}", f"--randseed={1000 + seed}", "--percentile_list=50:99",
            "--output-format=json", f"--output={output}", *([] if job.cold else ["--time_based"]),
            *job.options, *extra,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=die_with_parent)
        text = output.read_text() if output.exists() else ""
        if done.returncode or "{" not in text:
            raise RuntimeError(f"fio failed on {uri}, {job.name}: {done.stderr[-2000:]} {text[-2000:]}")
        result = json.loads(text[text.index("{") :])["jobs"][0]
        if result["error"]:
            raise RuntimeError(f"fio failed on {uri}, {job.name}: error {result['error']}")
        assert isinstance(result, dict)
        return result

    def _cell(self, target: Target, job: Job, number: int) -> Cell:
        sync_file_system(self.folder)
        for path in target.files:
            if job.cold:
                page_out(path)
            else:
                page_in(path, self.span)
        target.before()
        self.peaks.sets[target.name] = target.pids
        try:
            counters, cpu, own = Counters.now(), cpu_seconds(target.pids), os.times()
            result = self.fio(target.uri, job, self.seconds, number)
            after, cpu_after, own_after = Counters.now(), cpu_seconds(target.pids), os.times()
        finally:
            del self.peaks.sets[target.name]
            target.after()
        side = result["write"] if result["write"]["io_bytes"] else result["read"]
        seconds = side["runtime"] / 1000
        latency = (result["sync"]["lat_ns"] if "--fsync=1" in job.options else side["clat_ns"]).get("percentile", {})
        fio_cpu = (own_after[2] + own_after[3]) - (own[2] + own[3])
        other = (after.busy - counters.busy - fio_cpu - (cpu_after - cpu)) / seconds
        return Cell(
            number, job.name, target.name, side["total_ios"] / seconds, side["io_bytes"] / seconds / (1 << 20),
            latency.get("50.000000", 0) / 1000, latency.get("99.000000", 0) / 1000, (cpu_after - cpu) / seconds,
            _disturbance(job, other, after, counters, seconds),
        )  # fmt: skip

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(cell) for cell in self.cells]


def _disturbance(job: Job, other: float, after: Counters, before: Counters, seconds: float) -> str:
    """What else happened in the cell, in words; empty if nothing worth naming."""
    found = []
    if other > 0.25 and "--fsync=1" not in job.options:
        found.append(f"other CPU {other:.2f} cores")
    if (steal := (after.steal - before.steal) / seconds) > 0.05:
        found.append(f"steal {steal:.2f} cores")
    read_mib = (after.read_kib - before.read_kib) / 1024
    if read_mib > 20 and not job.cold:
        found.append(f"{read_mib:.0f} MiB read from disk")
    written_mib = (after.written_pages - before.written_pages) * PAGE / (1 << 20)
    if written_mib > 100:
        found.append(f"{written_mib:.0f} MiB written back")
    return ", ".join(found)


def ratio(cells: Sequence[Cell], job: str, server: str, base: str = BASE) -> float | None:
    """Median over the rounds of (server's IOPS / base's IOPS in the same round)."""
    of = {(c.round, c.server): c.iops for c in cells if c.job == job}
    ratios = sorted(v / of[r, base] for (r, s), v in of.items() if s == server and of.get((r, base)))
    if not ratios:
        return None
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
