"""The tables, in Markdown, as they go into the README: figure, target, met or not, and the machine it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.cells import JOBS, Cell, ratio
from tests.bench.lag import RATE, Steady
from tests.bench.ours import ALONE, TOGETHER
from tests.bench.servers import BASE, MIRROR

# Ratio to qemu-nbd that is to be reached: (replayer stopped, all on the same cores); None: not asked.
TARGETS: dict[str, tuple[float | None, float | None]] = {
    "write-qd32": (2.2, 1.2),
    "write-qd1": (1.2, 0.8),
    "read-qd32": (3.0, 1.5),
    "read-cold": (0.8, None),
    "write-1m": (0.7, 0.3),
    "write-flush": (0.8, 0.6),
}
MIRROR_TARGET = 4.0  # 4 KiB random writes at QD 32, ours with the replayer stopped / the mirror


@dataclass
class Figure:
    """One line of the second table. `met` is None where nothing is asked."""

    what: str
    value: str
    target: str
    met: bool | None


def verdict(met: bool | None) -> str:
    return {True: "met", False: "**not met**", None: "–"}[met]


def _verdict(value: float | None, target: float | None) -> str:
    if value is None:
        return "not measured"
    if target is None:
        return f"{value:.2f} ×"
    return f"{value:.2f} × (≥ {target:g}: {verdict(value >= target)})"


def protection_table(cells: Sequence[Cell], steady: Steady | None) -> str:
    """The first table: ratios to qemu-nbd in the same round, medians."""
    jobs = [job for job in JOBS if any(c.job == job.name for c in cells)]
    servers = [s for s in (BASE, "nbdkit file", MIRROR, ALONE, TOGETHER) if any(c.server == s for c in cells)]
    lines = ["| job | " + " | ".join(f"{s}, /s" for s in servers) + f" | {ALONE}: ratio | {TOGETHER}: ratio |",
             "|---|" + "---:|" * (len(servers) + 2)]  # fmt: skip
    for job in jobs:
        values = [[c.iops for c in cells if c.job == job.name and c.server == s] for s in servers]
        row = [f"{statistics.median(v):,.0f}" if v else "–" for v in values]
        alone, together = TARGETS[job.name]
        row.append(_verdict(ratio(cells, job.name, ALONE), alone))
        row.append(_verdict(ratio(cells, job.name, TOGETHER), together))
        lines.append(f"| {job.title} | " + " | ".join(row) + " |")
    against = ratio(cells, "write-qd32", ALONE, MIRROR)
    if against is not None:
        lines += ["", f"4 KiB random writes, QD 32, against QEMU's mirror: {_verdict(against, MIRROR_TARGET)}"]
    if steady is not None:
        lags = ", ".join(f"{lag:.2f} s at {at:.0f} s" for at, lag, _ in steady.samples)
        lines += ["", f"Steady {RATE:,} writes/s, all on the same cores: {steady.rate:,.0f}/s reached; lag {lags}; "
                      f"it does not grow: {verdict(steady.met)}"]  # fmt: skip
    return "\n".join(lines)


def figures_table(figures: Sequence[Figure]) -> str:
    """The second table: what is asked of the past, of rollback, of memory."""
    lines = ["| what | measured | reach | |", "|---|---|---|---|"]
    lines += [f"| {f.what} | {f.value} | {f.target} | {verdict(f.met)} |" for f in figures]
    return "\n".join(lines)


def disturbances(cells: Sequence[Cell]) -> str:
    """The cells in which something else went on."""
    return "\n".join(f"- round {c.round + 1}, {c.job}, {c.server}: {c.disturbance}" for c in cells if c.disturbance)


def memory_figures(peaks: dict[str, int]) -> list[Figure]:
    """Peaks of PSS, each service with its parent."""
    limits = {"collector": 120, "replayer": 400}
    found = []
    for name, limit in limits.items():
        if name in peaks:
            mib = peaks[name] / (1 << 20)
            found.append(Figure(f"memory of the {name} with its parent (peak PSS)", f"{mib:.0f} MiB",
                                f"< {limit} MiB", mib < limit))  # fmt: skip
    return found
