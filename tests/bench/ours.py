"""Our appliance under measurement: collector and replayer as two services, the replayer paused or running.

Paused (SIGSTOP) stands for a replayer on a machine of its own: it takes no CPU, and the journal is drained after
the cell. Its primary was filled with 4 KiB writes before it was registered, and the initial sync is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from tests.bench.machine import Peaks, family
from tests.bench.servers import Target
from tests.support.running import Appliance, wait_for

ALONE = "cdp, replayer stopped"
TOGETHER = "cdp, all on the same cores"
VOLUME = "bench"
# Replaying what a cell of 1 MiB writes left: some GiB at the slowest rate we accept.
DRAIN_SECONDS = 600


class Ours:
    """The running appliance, and how to bring it to rest between cells."""

    def __init__(
        self, folder: Path, size: int, peaks: Peaks, *, window_size: str = "8GiB", max_size: str = "24GiB",
        journal: str = 'kind = "embedded"',
    ) -> None:  # fmt: skip
        self.appliance = Appliance(
            folder, {VOLUME: size}, group="benchgroup", window="24h", window_size=window_size,
            segment_size="64MiB", max_size=max_size, journal=journal,
        )  # fmt: skip
        self.volume, self.peaks = VOLUME, peaks

    @property
    def primary(self) -> Path:
        return self.appliance.primary(VOLUME)

    def start(self) -> None:
        """Both services, their memory watched from here on, initial sync finished, nothing left to replay."""
        self.appliance.start("collector", "replayer")
        self.peaks.sets.update({name: [pid] for name, pid in self.parents().items()})
        self.drain()

    def parents(self) -> dict[str, int]:
        return {name: service.process.pid for name, service in self.appliance.services.items()}

    def group(self) -> dict[str, Any]:
        group = self.appliance.look()["groups"][0]
        assert isinstance(group, dict)
        return group

    def replica(self) -> Path:
        return Path(self.group()["volumes"][0]["replica"])

    def drain(self) -> None:
        """Until the replica is at the journal's end."""

        def drained() -> bool:
            group = self.group()
            return group["state"] == "protected" and group["replay"]["lag_seq"] in (0, 1)

        wait_for(drained, "the journal is drained", DRAIN_SECONDS)

    def pause(self) -> None:
        for pid in family([self.parents()["replayer"]]):
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes `pause`; nothing to do when it is not paused or already stopped."""
        if (parent := self.parents().get("replayer")) is None:
            return
        for pid in reversed(family([parent])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def targets(self) -> list[Target]:
        """The two rows of the table: the same server, the replayer paused or not."""
        parents, uri = self.parents(), self.appliance.uri(VOLUME)
        replica = self.replica()

        def finish() -> None:
            self.resume()
            self.drain()

        return [
            Target(ALONE, uri, [parents["collector"]], [self.primary], before=self.pause, after=finish),
            Target(TOGETHER, uri, list(parents.values()), [self.primary, replica], after=self.drain),
        ]

    def stop(self) -> None:
        self.resume()
        for name in self.parents():
            self.peaks.sets.pop(name, None)
        self.appliance.end()
