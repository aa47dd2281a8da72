"""The process that carries the embedded journals into Kafka (`python -m appliance.relay_child`).

Its own, so that nothing of Kafka is in the write path: it may be slow, wait or die, and production does not notice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from appliance import child, paths
from appliance.control import Done
from appliance.kafka_settings import cluster_of
from appliance.priority import lower_priority
from appliance.together import together
from cdp import storage
from cdp.errors import NotFoundError
from cdp.journal.kafka.relay import Relay
from cdp.nbd.contract import Export
from cdp.nbd.loop import Loop

# "A start waits up to 10 s for locks."
LOCK_SECONDS = 10.0


class NoExports:
    """A relay serves no volume."""

    def names(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def open(self, name: str, peer: str) -> Export:
        raise NotFoundError(f"There is no volume {name}: this is a relay.")


class RelayService:
    """All groups of the configuration."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._home = paths.folder(settings["state_dir"], paths.RELAY)
        self._lock = -1
        keep_ns, half = settings["kafka"]["keep_after_ack_ns"], settings["max_size"] // 2
        self._relays = {
            group["name"]: Relay(
                cluster_of(settings, group["name"]), paths.journal_folder(settings["state_dir"], group["name"]),
                keep_ns=keep_ns, max_kept_bytes=half,
            )
            for group in settings["groups"]
        }  # fmt: skip

    def start(self, loop: Loop) -> None:
        """Takes the lock and starts the groups. Raises CdpError."""
        storage.makedirs(self._home, exist_ok=True)
        self._lock = storage.lock_file(f"{self._home}/lock", LOCK_SECONDS, f"The relay's folder {self._home}")
        for relay in self._relays.values():
            relay.start()

    def command(self, name: str, arguments: dict[str, Any], done: Done) -> None:
        raise NotFoundError(f"The relay has no command {name!r}.", "Use the CLI of the same version.")

    def figures(self) -> dict[str, Any]:
        return {"groups": {name: relay.figures() for name, relay in self._relays.items()}}

    def stop(self) -> None:
        """Idempotent."""
        if self._lock < 0:
            return
        together([relay.stop for relay in self._relays.values()])
        os.close(self._lock)
        self._lock = -1


def make(settings: dict[str, Any]) -> tuple[RelayService, NoExports]:
    """The service of these settings, and nothing to export."""
    lower_priority()
    return RelayService(settings), NoExports()


if __name__ == "__main__":
    sys.exit(child.main(make))
