"""The collector as its process sees it: exports for the loop, commands, figures, start and stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cdp import storage
from cdp.collector import locks
from cdp.collector.commands import Commands
from cdp.collector.cutting import CuttingSplitter
from cdp.collector.figures import figures_of
from cdp.collector.flusher import SYNC_SECONDS, SYNC_THREADS
from cdp.collector.group import CHECKPOINT_CONSUMER, Group
from cdp.collector.primary_nbd import NbdPrimary
from cdp.collector.reads import ReadPool
from cdp.collector.replicated import LOOK_SECONDS
from cdp.collector.restart import close_group, open_group
from cdp.collector.resync import Resyncs
from cdp.collector.splitter import Splitter
from cdp.collector.upstream import Upstream
from cdp.collector.volume import GroupSpec, Volume, VolumeSpec
from cdp.errors import CdpError, ConfigError, NotFoundError, RefusedError
from cdp.nbd.contract import SECRET_MARK

if TYPE_CHECKING:
    from cdp.nbd.contract import Export
    from cdp.nbd.loop import Loop

__all__ = ["Collector", "GroupSpec", "VolumeSpec"]
log = logging.getLogger(__name__)

# Threads that warm the page cache for passes over volumes, and wait out their pauses.
SLOW_THREADS = 4
HEARTBEAT_SECONDS = 1.0
# Many more than one journal disk serves; every group costs a sync every 50 ms while it is written.
MAX_GROUPS = 64
MAX_VOLUMES_IN_GROUP = 256


class Collector:
    """Implements `nbd.contract.Exports`. Everything is for the loop's thread."""

    checkpoint_consumer = CHECKPOINT_CONSUMER

    def __init__(
        self, state_dir: str, groups: list[GroupSpec], *, segment_bytes: int, max_bytes: int,
        small_batches: bool = False,
    ) -> None:  # fmt: skip
        """`small_batches`: each fits into a carrier's message (see `batch.MESSAGE_DATA_BYTES`). Raises ConfigError."""
        _check(groups)
        self._folder = f"{state_dir}/collector"
        self._specs = groups
        self._segment_bytes, self._max_bytes = segment_bytes, max_bytes
        self._splitter = CuttingSplitter if small_batches else Splitter
        self.groups: dict[str, Group] = {}
        self._resyncs: list[Resyncs] = []
        self._splitters: dict[str, Splitter] = {}
        self._workers: list[storage.Worker] = []
        self._lock = -1
        self._commands = Commands(self)
        self._loop: Loop | None = None

    def start(self, loop: Loop) -> None:
        """Locks, recovery, timers; blocks until clients can be served. Raises CdpError (nothing is held then)."""
        storage.makedirs(self._folder, exist_ok=True)
        self._lock = locks.lock_state(self._folder)
        self._loop = loop
        self._syncs = storage.Worker(SYNC_THREADS, "sync")
        self.slow = storage.Worker(SLOW_THREADS, "slow")
        self._reads = ReadPool()
        self._workers = [self._syncs, self.slow, self._reads.worker]
        try:
            for spec in self._specs:
                self.groups[spec.name] = open_group(
                    spec, f"{self._folder}/groups/{spec.name}", self._syncs,
                    segment_bytes=self._segment_bytes, max_bytes=self._max_bytes,
                )  # fmt: skip
        except BaseException:
            self.stop()
            raise
        for worker in self._workers:
            loop.add_reader(worker.fileno(), worker.drain)
        for group in self.groups.values():
            self._serve(group)
        loop.every(SYNC_SECONDS, lambda: self._each(lambda group: group.flusher.tick()))
        loop.every(HEARTBEAT_SECONDS, lambda: self._each(Group.second))

    def _serve(self, group: Group) -> None:
        resyncs = Resyncs(group, self.slow)
        self._resyncs.append(resyncs)
        group.start_resync, group.go_on_resync = resyncs.start, resyncs.go_on
        group.serving = True
        if group.replicated is not None:
            assert self._loop is not None
            self._loop.add_reader(group.replicated.fileno(), group.replicated.receive)
            self._loop.every(LOOK_SECONDS, group.replicated.look)
        for volume in group.volumes:
            self._attach(group, volume)
            self._splitters[volume.name] = self._splitter(volume, group, self._reads)
            if volume.sync is not None and not volume.refuse:
                resyncs.go_on(volume, group.journal.last_seq)

    def _attach(self, group: Group, volume: Volume) -> None:
        if isinstance(volume.primary, NbdPrimary):
            assert self._loop is not None
            volume.upstream = Upstream(group, volume, volume.primary)
            self._loop.add_reader(volume.primary.worker.fileno(), volume.primary.worker.drain)

    def _each(self, call: Callable[[Group], None]) -> None:
        for group in self.groups.values():
            call(group)

    # --- exports

    def names(self) -> Iterator[tuple[str, str]]:
        for group in self.groups.values():
            for volume in group.volumes:
                yield volume.name, f"{volume.primary.address}, group {group.name}, {volume.state}"

    def open(self, name: str, peer: str) -> Export:
        """A volume by name, or `name!SECRET` while a rollback holds it. Raises NotFoundError, RefusedError."""
        name, mark, secret = name.partition(SECRET_MARK)
        _, volume = self.volume(name)
        if mark and not volume.opens_with(secret):
            raise RefusedError(f"{name} is not locked with this secret.", code="locked")
        if volume.lock is not None and not mark:
            raise RefusedError(
                f"{name} is being rolled back.", "Wait for its end, or see `cdp rollback --resume`.", code="locked"
            )
        return self._splitters[name]

    def volume(self, name: str) -> tuple[Group, Volume]:
        """Raises NotFoundError."""
        for group in self.groups.values():
            for volume in group.volumes:
                if volume.name == name:
                    return group, volume
        names = ", ".join(volume.name for group in self.groups.values() for volume in group.volumes)
        raise NotFoundError(f"There is no volume {name}.", f"Volumes: {names}.")

    def disconnect(self, volume: Volume, reason: str) -> None:
        """Ends every connection to a volume."""
        assert self._loop is not None
        for connection in list(volume.connections):
            self._loop.disconnect(connection, reason)

    # --- the process

    def command(
        self, name: str, arguments: dict[str, Any], done: Callable[[dict[str, Any] | None, CdpError | None], None]
    ) -> None:
        """See Control in ARCHITECTURE.md; `done` is called once, at once or later, on the loop's thread."""
        self._commands.run(name, arguments, done)

    def figures(self) -> dict[str, Any]:
        """See Control in ARCHITECTURE.md."""
        return {
            "time_ns": storage.wall_ns(),
            "groups": {name: figures_of(group) for name, group in self.groups.items()},
        }

    def stop(self) -> None:
        """After the loop has ended: everything synced and noted, locks let go. Idempotent."""
        self._commands.cancel()
        for resyncs in self._resyncs:
            resyncs.cancel()
        for worker in self._workers:
            worker.close()
        self._workers = []
        for group in self.groups.values():
            for volume in group.volumes:
                if isinstance(volume.primary, NbdPrimary):
                    volume.primary.quiesce()
            close_group(group)
        self.groups = {}
        if self._lock >= 0:
            storage.close(self._lock)
            self._lock = -1


def _check(groups: list[GroupSpec]) -> None:
    names = [v.name for group in groups for v in group.volumes] + [group.name for group in groups]
    if len(set(names)) != len(names):
        raise ConfigError("Names of groups and volumes must differ from one another.")
    if len(groups) > MAX_GROUPS or any(len(group.volumes) > MAX_VOLUMES_IN_GROUP for group in groups):
        raise ConfigError(f"At most {MAX_GROUPS} groups with {MAX_VOLUMES_IN_GROUP} volumes each can be served.")
