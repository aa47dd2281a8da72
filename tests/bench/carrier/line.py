"""The whole line under measurement: collector, relay and replayer as processes, one broker between, a filled volume.

All of it is on this machine's cores, with fio. What the broker has acknowledged is freed from the journal after a
second, and not kept for ten minutes, only so that a run needs less disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from appliance import paths
from cdp.errors import UnreachableError
from cdp.journal.kafka.cluster import Cluster
from tests.bench.carrier import tools
from tests.bench.cells import Cells
from tests.bench.machine import Peaks, fill, page_in, sync_file_system
from tests.bench.ours import Ours
from tests.support.running import wait_for

SIZE = 512 << 20
GROUP = "benchgroup"
ROLES = ("collector", "relay", "replayer")
# Some GiB that wait for a relay that was away, at a quarter of what is asked of it.
DRAIN_SECONDS = 180.0
# A backlog that a bench makes fits into this.
MAX_SIZE, WINDOW_SIZE = "8GiB", "2GiB"

_prefixes = itertools.count(1)


class Line(Ours):
    """`Ours` with Kafka between. `roles` are the processes that run."""

    def __init__(self, folder: Path, address: str, peaks: Peaks, roles: Iterable[str] = ROLES) -> None:
        prefix = f"cdp.bench.line{next(_prefixes)}."
        journal = "\n".join((
            'kind = "kafka"', f'bootstrap_servers = ["{address}"]', f'topic_prefix = "{prefix}"',
            "replication_factor = 1", "min_insync_replicas = 1", 'keep_after_ack = "1s"',
        ))  # fmt: skip
        super().__init__(folder, SIZE, peaks, window_size=WINDOW_SIZE, max_size=MAX_SIZE, journal=journal)
        self.roles = tuple(roles)
        self.cluster = Cluster((address,), prefix + GROUP, 1, 1, tools.RETENTION_MS)

    def start(self) -> None:
        """All roles; the volume protected and nothing left to carry or replay."""
        self.appliance.start(*self.roles)
        self.drain()

    def halt(self, *roles: str) -> None:
        """A clean stop of these; of one that does not run, nothing."""
        for role in roles:
            if (service := self.appliance.services.pop(role, None)) is not None:
                code = service.stop()
                assert code == 0, f"cdp {role} ended with {code}\n{service.tail()}"

    def figures(self, role: str) -> dict[str, Any]:
        """The group's newest figures of one role. Raises UnreachableError."""
        figures = self.appliance.control().status(role)["figures"]
        if figures is None:
            raise UnreachableError(f"The {role} is not there.")
        group = figures["groups"][GROUP]
        assert isinstance(group, dict)
        return group

    def position(self, role: str) -> int:
        """Up to which seq the relay has carried, or the replayer applied."""
        return int(self.figures(role)["carried_seq" if role == paths.RELAY else "applied_seq"])

    def drain(self) -> None:
        """Until the volume is protected, and relay and replayer are at the journal's end (but for a heartbeat)."""

        def drained() -> bool:
            try:
                ours = self.figures(paths.COLLECTOR)
                if any(v["state"] != "protected" for v in ours["volumes"].values()):
                    return False
                last: int = ours["journal"]["last_seq"]
                return all(last - self.position(r) <= 1 for r in self.appliance.services if r != paths.COLLECTOR)
            except UnreachableError:
                return False

        wait_for(drained, "everything is carried and replayed", DRAIN_SECONDS)

    def settle(self) -> None:
        """Before a cell: nothing to write back, the volume in the page cache."""
        self.drain()
        sync_file_system(self.primary.parent)
        page_in(self.primary, SIZE)


@contextmanager
def line(folder: Path, address: str, roles: Iterable[str] = ROLES) -> Iterator[tuple[Line, Cells]]:
    """A line that has been started over a filled volume, and fio for it; stopped cleanly on the way out, or ended when
    the body failed."""
    peaks = Peaks()
    made = Line(folder, address, peaks, roles)
    made.appliance.write_config()
    fill(made.primary, SIZE)
    try:
        made.start()
        yield made, Cells(folder, [], SIZE, 0, peaks)
        made.appliance.stop()
        tools.delete(made.cluster)
    finally:
        made.appliance.end()
