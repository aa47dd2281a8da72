"""The past under measurement: opening a point with little and with much history, reads of it, converting it.

A volume of 1 GiB is overwritten at random until its history holds the asked number of entries; the first bookmark
is then a point whose every block comes from undo, the last one a point with a sixth of them from it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from tests.bench.machine import Peaks, fill, page_in
from tests.bench.ours import Ours
from tests.bench.report import Figure
from tests.bench.servers import Starter
from tests.support.nbd import NbdClient
from tests.support.running import die_with_parent

SIZE = 1 << 30
BLOCKS = SIZE // 4096
FEW = 10_000
# Journal and page cache hold this many 4 KiB writes with room to spare; then the replayer catches up.
CHUNK = 1_000_000
OPENINGS = 31
READ_SECONDS = 8
CONVERT_ROUNDS = 3
OPEN_MS_MAX = 20.0


def write(ours: Ours, count: int, seed: int, *extra: str) -> None:
    """`count` random 4 KiB writes of data that zstd shrinks to about a third, then until they are replayed."""
    while count > 0:
        step = min(count, CHUNK)
        subprocess.run([
            "fio", "--name=fill", "--ioengine=nbd", f"--uri={ours.appliance.uri(ours.volume)}", f"--size={SIZE}",
            "--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={step * 4096}", f"--randseed={seed}",
            "--buffer_compress_percentage=67", "--refill_buffers", *extra,
        ], check=True, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)  # fmt: skip
        ours.drain()
        count, seed = count - step, seed + 1


def opening_ms(ours: Ours, point: str) -> float:
    """Median time from connecting to the first 4 KiB of the point."""
    times: list[float] = []
    for i in range(OPENINGS):
        began = time.perf_counter()
        with NbdClient(ours.appliance.socket("replayer"), f"{ours.volume}@{point}") as client:
            client.read(i * 7919 % BLOCKS * 4096, 4096)
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def read_iops(ours: Ours, point: str, folder: Path) -> float:
    """Random 4 KiB reads of a point at queue depth 32."""
    output = folder / "past.json"
    subprocess.run([
        "fio", "--name=past", "--ioengine=nbd", f"--uri={ours.appliance.past(ours.volume, point)}", f"--size={SIZE}",
        "--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap", "--time_based", f"--runtime={READ_SECONDS}",
        "--output-format=json", f"--output={output}",
    ], check=True, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)  # fmt: skip
    text = output.read_text()
    read = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    ios, milliseconds = int(read["total_ios"]), int(read["runtime"])
    return 1000 * ios / milliseconds


def convert_seconds(uri: str, folder: Path) -> float:
    """`qemu-img convert` of an export to a raw file, median."""
    out = folder / "converted.raw"
    times: list[float] = []
    for _ in range(CONVERT_ROUNDS):
        began = time.perf_counter()
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(out)], check=True)
        times.append(time.perf_counter() - began)
        os.unlink(out)
    return statistics.median(times)


def measure(folder: Path, starter: Starter, peaks: Peaks, entries: int) -> list[Figure]:
    """All of it, on an appliance of its own in `folder`."""
    ours = Ours(folder / "past", SIZE, peaks, window_size="40GiB", max_size="16GiB")
    ours.appliance.write_config()
    fill(ours.primary, SIZE)
    ours.start()
    try:
        ours.appliance.bookmark("oldest")
        write(ours, FEW, 1)
        few_ms = opening_ms(ours, "oldest")
        write(ours, entries - FEW, 2)
        many_ms = opening_ms(ours, "oldest")
        history = ours.group()["history"]["bytes"]
        ours.appliance.bookmark("sixth")
        write(ours, BLOCKS // 6, 3)  # fio's random map: every block at most once
        figures = [
            _opening(f"{FEW:,}", few_ms),
            _opening(f"{entries:,}", many_ms),
            _reads(ours, folder, "oldest", f"{entries:,} entries, all from undo", 20_000),
            _reads(ours, folder, "sixth", f"{entries:,} entries, a sixth from undo", 35_000),
        ]
        copy = folder / "plain.raw"
        fill(copy, SIZE)
        base = starter.folder / "convert.sock"
        starter.qemu_nbd(copy, base, "convert")
        page_in(copy, SIZE)
        plain = convert_seconds(f"nbd+unix:///?socket={base}", folder)
        for point, what, target in (("sixth", "a sixth changed", 0.3), ("oldest", "all of it changed", 0.15)):
            reached = plain / convert_seconds(ours.appliance.past(ours.volume, point), folder)
            figures.append(Figure(f"`qemu-img convert` of a past point, {what} since", f"{reached:.2f} × qemu-nbd",
                                  f"≥ {target:g} ×", reached >= target))  # fmt: skip
        figures.append(Figure(f"history of {entries:,} writes of compressible data",
                              f"{history / (entries * 4096):.2f} bytes a byte written", "–", None))  # fmt: skip
        ours.appliance.stop()
        return figures
    finally:
        ours.stop()


def _opening(entries: str, ms: float) -> Figure:
    return Figure(f"opening a point until its first byte, {entries} writes of history", f"{ms:.1f} ms",
                  f"< {OPEN_MS_MAX:g} ms", ms < OPEN_MS_MAX)  # fmt: skip


def _reads(ours: Ours, folder: Path, point: str, what: str, target: int) -> Figure:
    iops = read_iops(ours, point, folder)
    return Figure(f"random 4 KiB reads of a past point, QD 32, {what}", f"{iops:,.0f} IOPS",
                  f"≥ {target:,} IOPS", iops >= target)  # fmt: skip
