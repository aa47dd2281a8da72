"""Measures the appliance and its peers in one run and prints the README's tables.

    python -m tests.bench                                  # everything, about 40 minutes
    python -m tests.bench --parts protection --rounds 1 --seconds 2   # a smoke test
    python -m tests.bench --parts kafka                    # the Kafka carrier, about 12 minutes; not part of everything

Parts: protection (the first table), past, rollback, replay, journal, history; kafka-relay, kafka-replay, kafka-latency,
kafka-outage, kafka-collector (kafka: all of these). Linux; qemu-utils, qemu-system-common, nbdkit and fio; for Kafka a
Java and Maven, which fetches it. Servers run in a fresh folder under --folder, which must be on the disk that is to be
measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.bench import past, replay, rollback
from tests.bench.carrier import parts as carrier
from tests.bench.carrier import tools as kafka_tools
from tests.bench.cells import JOBS, Cells
from tests.bench.lag import Steady, steady
from tests.bench.machine import Peaks, description, fill, processes
from tests.bench.ours import Ours
from tests.bench.report import Figure, disturbances, figures_table, memory_figures, protection_table
from tests.bench.servers import Starter
from tests.kafka import broker as kafka_broker

# Commands of their own, of one room each, without servers; what they print follows the tables.
COMMANDS = ("journal", "history")
PARTS = ("protection", "past", "rollback", "replay", *COMMANDS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--jobs", default=",".join(job.name for job in JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="length of a cell")
    parser.add_argument("--size-mib", type=int, default=2048, help="size of every served file")
    parser.add_argument("--span-mib", type=int, default=1024, help="part of it that is loaded")
    parser.add_argument("--entries", type=int, default=5_000_000, help="writes of history for the past")
    parser.add_argument("--no-mirror", action="store_true", help="without QEMU's mirror")
    parser.add_argument("--no-steady", action="store_true", help="without the 30,000 writes a second")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where to work; not a tmpfs")
    parser.add_argument("--json", type=Path, help="also write every cell to this file")
    return parser.parse_args()


def protection(
    options: argparse.Namespace, folder: Path, starter: Starter, peaks: Peaks
) -> tuple[Cells, Steady | None]:
    """The first table's servers, all up at once, and its cells."""
    size, span = options.size_mib << 20, options.span_mib << 20
    data, source, copy = (folder / f"{name}.raw" for name in ("data", "mirror-source", "mirror-target"))
    ours = Ours(folder / "ours", size, peaks)
    ours.appliance.write_config()
    files = [data, ours.primary] + ([] if options.no_mirror else [source, copy])
    for path in files:
        fill(path, size)
    targets = [starter.base(data), starter.nbdkit(data)]
    if not options.no_mirror:
        targets.append(starter.mirror(source, copy))
    ours.start()
    try:
        targets += ours.targets()
        cells = Cells(folder, targets, span, options.seconds, peaks)
        cells.run([job for job in JOBS if job.name in options.jobs.split(",")], options.rounds)
        result = None if options.no_steady else steady(cells, ours)
        ours.appliance.stop()
        return cells, result
    finally:
        ours.stop()


def room(name: str, folder: Path) -> None:
    """Runs a room's own benchmark; it prints for itself. Raises CalledProcessError."""
    print(f"\n{name}:\n", flush=True)
    subprocess.run([sys.executable, "-m", f"tests.bench.{name}", "--folder", str(folder)], check=True)


def main() -> int:
    options = arguments()
    parts = carrier.expanded(options.parts.split(","))
    known = (*PARTS, *carrier.PARTS)
    if unknown := set(parts) - set(known):
        print(f"Unknown parts {', '.join(sorted(unknown))}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    lines = list[str]()
    if set(parts) & set(carrier.PARTS):
        if why := kafka_broker.missing():
            print(f"{why[:1].upper()}{why[1:]}.", file=sys.stderr)
            return 2
        lines = kafka_tools.description()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers and files go with it
    folder = Path(tempfile.mkdtemp(prefix="cdp-bench-", dir=options.folder))
    peaks, figures = Peaks(), list[Figure]()
    cells: Cells | None = None
    result: Steady | None = None
    peaks.start()
    try:
        with processes() as started:
            starter = Starter(folder, started)
            if "protection" in parts:
                cells, result = protection(options, folder, starter, peaks)
            if "past" in parts:
                figures += past.measure(folder, starter, peaks, options.entries)
            if "rollback" in parts:
                figures += rollback.measure(folder, peaks)
        if "replay" in parts:
            figures += replay.measure(folder)
        figures += carrier.measure(parts, folder, options.rounds, options.seconds)
        peaks.stop()
        show(cells, result, figures + memory_figures(peaks.bytes), options.json, lines)
        for name in COMMANDS:
            if name in parts:
                room(name, folder)
    finally:
        peaks.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def show(
    cells: Cells | None, result: Steady | None, figures: list[Figure], json_path: Path | None, lines: list[str]
) -> None:
    """The tables, as they go into the README; `lines` about what was measured besides."""
    print(f"Measured {time.strftime('%F')} on:\n")
    print("\n".join(f"- {line}" for line in [*description(), *lines]))
    if cells is not None:
        print("\n" + protection_table(cells.cells, result))
        if noted := disturbances(cells.cells):
            print("\nDisturbed cells:\n\n" + noted)
    if figures:
        print("\n" + figures_table(figures))
    if json_path:
        content = {"cells": cells.as_json() if cells else [], "figures": [asdict(f) for f in figures]}
        json_path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    sys.exit(main())
