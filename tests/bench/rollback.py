"""Rollback of what changed in a 1 TiB sparse volume: the time must follow the change, not the size."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.bench.machine import Peaks
from tests.bench.ours import Ours
from tests.bench.report import Figure
from tests.support.running import die_with_parent

SIZE = 1 << 40
CHANGES_MIB = (64, 256)
RATE_MIN_MIB = 100.0


def change(ours: Ours, mib: int, seed: int) -> None:
    """`mib` MiB in pieces of 256 KiB, spread over the whole volume, then until they are replayed."""
    subprocess.run([
        "fio", "--name=change", "--ioengine=nbd", f"--uri={ours.appliance.uri(ours.volume)}", f"--size={SIZE}",
        "--rw=randwrite", "--bs=256k", "--iodepth=8", "--norandommap", f"--io_size={mib << 20}",
        f"--randseed={seed}",
    ], check=True, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)  # fmt: skip
    ours.drain()


def measure(folder: Path, peaks: Peaks) -> list[Figure]:
    """One rollback for each size of change, timed from the command's start to its end."""
    ours = Ours(folder / "rollback", SIZE, peaks, window_size="16GiB")
    ours.start()
    figures = []
    try:
        for number, mib in enumerate(CHANGES_MIB):
            change(ours, mib, 2 * number + 1)  # so that there is something to go back to
            ours.appliance.bookmark(f"before-{mib}")
            change(ours, mib, 2 * number + 2)
            began = time.perf_counter()
            answer = ours.appliance.json("rollback", ours.volume, "--to", f"before-{mib}", "--yes")
            seconds = time.perf_counter() - began
            copied = answer["bytes"] / (1 << 20)
            ours.drain()
            figures.append(Figure(
                f"rollback of {mib} MiB changed in a 1 TiB sparse volume, proof and command included",
                f"{seconds:.1f} s, {copied / seconds:.0f} MiB/s", f"≥ {RATE_MIN_MIB:g} MiB/s for 256 MiB",
                copied / seconds >= RATE_MIN_MIB if mib == CHANGES_MIB[-1] else None,
            ))  # fmt: skip
        ours.appliance.stop()
        return figures
    finally:
        ours.stop()
