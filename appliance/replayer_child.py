"""The process that applies the journals to replicas and serves the past (`python -m appliance.replayer_child`).

One apply thread for each group; NBD and control on the main thread. It runs at a lower CPU and I/O priority than the
collector: production first, lag second.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

from appliance import child, paths
from appliance.control import Done
from appliance.priority import lower_priority
from appliance.replayer_commands import Commands, GroupSource
from appliance.together import together
from cdp import storage
from cdp.journal.reader import EmbeddedReader
from cdp.nbd.loop import Loop
from cdp.recovery.past import Past
from cdp.replica.apply import ReaderOf
from cdp.replica.replayer import Replayer

# In a group's folder, beside the committed position: its place in the topic.
PLACE_FILE = "place"
# "A start waits up to 10 s for locks."
LOCK_SECONDS = 10.0


class ReplayerService:
    """All groups of the configuration."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._state_dir = settings["state_dir"]
        self._home = paths.folder(self._state_dir, paths.REPLAYER)
        self._lock = -1
        self._groups = {group["name"]: self._group(group, settings) for group in settings["groups"]}
        volumes = {v["name"]: group["name"] for group in settings["groups"] for v in group["volumes"]}
        self.sources = {volume: GroupSource(self._groups[group]) for volume, group in volumes.items()}
        self._commands = Commands(self._groups, volumes)

    def _group(self, group: dict[str, Any], settings: dict[str, Any]) -> Replayer:
        folder = os.path.join(self._home, "groups", group["name"])
        return Replayer(
            folder,
            group["name"],
            self._reader_of(group["name"], folder, settings),
            window_ns=group["window_ns"],
            window_bytes=group["window_bytes"],
            segment_bytes=settings["segment_size"],
            volumes=[v["name"] for v in group["volumes"]],
        )

    def _reader_of(self, group: str, folder: str, settings: dict[str, Any]) -> ReaderOf:
        if settings["kafka"] is None:
            return partial(EmbeddedReader, paths.journal_folder(self._state_dir, group), "replayer")
        # Only here: who has no broker pays nothing for its client.
        from appliance.kafka_settings import cluster_of
        from cdp.journal.kafka.reader import KafkaReader

        storage.makedirs(folder, exist_ok=True)
        return partial(KafkaReader, cluster_of(settings, group), os.path.join(folder, PLACE_FILE))

    def exports(self) -> Past:
        """What the NBD side offers."""
        scratch = os.path.join(self._home, "scratch")
        storage.makedirs(scratch, exist_ok=True)
        return Past(dict(self.sources), scratch)

    def start(self, loop: Loop) -> None:
        """Takes the lock and starts the groups. Raises CdpError."""
        lock = os.path.join(self._home, "lock")
        self._lock = storage.lock_file(lock, LOCK_SECONDS, f"The replayer's folder {self._home}")
        for replayer in self._groups.values():
            replayer.start()
        self._commands.attach(loop)

    def command(self, name: str, arguments: dict[str, Any], done: Done) -> None:
        self._commands.run(name, arguments, done)

    def figures(self) -> dict[str, Any]:
        return {"groups": {name: replayer.figures() for name, replayer in self._groups.items()}}

    def stop(self) -> None:
        """Commits every group; idempotent."""
        self._commands.close()
        together([replayer.stop for replayer in self._groups.values()])
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def make(settings: dict[str, Any]) -> tuple[ReplayerService, Past]:
    """The service of these settings and what it exports."""
    lower_priority()
    service = ReplayerService(settings)
    return service, service.exports()


if __name__ == "__main__":
    sys.exit(child.main(make))
