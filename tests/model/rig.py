"""What the model test needs of an appliance, and the appliance as real processes behind it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

from tests.support.nbd import NbdClient, NbdRefused
from tests.support.running import Appliance, wait_for


def seq_of(point: Any) -> int:
    """The seq of a point as JSON shows it."""
    return int(point["seq"] if isinstance(point, dict) else point)


class Rig(Protocol):
    """A running appliance with one group."""

    def client(self, volume: str) -> NbdClient: ...
    def read(self, volume: str, seq: int) -> bytes | None: ...
    def bookmark(self, name: str) -> int: ...
    def oldest(self) -> int: ...
    def rollback(self, volumes: list[str], seq: int) -> tuple[int, int]: ...
    def equal(self, volume: str) -> bool: ...
    def restart(self, side: str) -> None: ...
    def close(self) -> None: ...


def read_point(socket: Path, volume: str, seq: int) -> bytes | None:
    """The whole volume at a seq; None where that is refused (or, once it left the window, an I/O error)."""
    try:
        with NbdClient(socket, f"{volume}@seq:{seq}") as client:
            return client.read_all()
    except (NbdRefused, OSError):
        return None


class ProcessRig:
    """`cdp up` as processes. `restart` is kill -9 of the child that does the work."""

    GROUP = "modelgroup"

    def __init__(self, folder: Path, volumes: dict[str, int], **options: Any) -> None:
        self.appliance = Appliance(folder, volumes, group=self.GROUP, **options)
        self.volumes = volumes
        self.appliance.start()
        self.appliance.wait_protected()

    def client(self, volume: str) -> NbdClient:
        """A connection; the collector may still be on its way back from a kill."""

        def connected() -> NbdClient | None:
            with contextlib.suppress(OSError):
                return NbdClient(self.appliance.socket("collector"), volume)
            return None

        client = wait_for(connected, f"the collector serves {volume}")
        assert isinstance(client, NbdClient)
        return client

    def read(self, volume: str, seq: int) -> bytes | None:
        return read_point(self.appliance.socket("replayer"), volume, seq)

    def bookmark(self, name: str) -> int:
        return self.appliance.bookmark(name)

    def oldest(self) -> int:
        return int(self.appliance.json("points", next(iter(self.volumes)))["oldest"]["seq"])

    def rollback(self, volumes: list[str], seq: int) -> tuple[int, int]:
        """Of a volume, or with all of them of the group; its (begin, end)."""
        name = volumes[0] if len(volumes) == 1 else self.GROUP
        answer = self.appliance.json("rollback", name, "--to", f"seq:{seq}", "--yes", "--disconnect")
        return seq_of(answer["begin"]), seq_of(answer["end"])

    def equal(self, volume: str) -> bool:
        return bool(self.appliance.json("verify", volume, expect=(0, 1))["equal"])

    def restart(self, side: str) -> None:
        self.appliance.kill_child(side)
        self.appliance.wait_protected()

    def close(self) -> None:
        self.appliance.end()
