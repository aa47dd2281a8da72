"""What a rollback would do, before anybody is asked: the point, the bytes and extents to write, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

from cdp.errors import RefusedError
from cdp.recovery.control import Commands, Control
from cdp.recovery.job import Job, new_secret
from cdp.recovery.points import point_json
from cdp.recovery.times import both_zones, duration, zone_name

# Every byte that is written takes its place in the journal, and what it replaces in the history, raw at worst, with
# descriptors, index and frames: 1.05 for each, and some room so that the last segment is not the end of it.
SPACE_FACTOR_PERCENT = 105
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Space:
    """Room now: on the replayer's disk for history, and in the journal until it is full. None: not known."""

    history_free_bytes: int | None
    journal_room_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """A rollback that has not begun. `bytes` and `extents` are by volume."""

    group: str
    volumes: list[str]
    expression: str
    target_seq: int
    target_time_ns: int
    zone: tzinfo | None
    now_ns: int
    bytes: dict[str, int]
    extents: dict[str, int]
    clients: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def total_extents(self) -> int:
        return sum(self.extents.values())

    def to_json(self) -> dict[str, Any]:
        """The answer of `rollback --dry-run --json`."""
        return {
            "target": point_json(self.target_seq, self.target_time_ns),
            "bookmark": None,
            "begin": None,
            "end": None,
            "bytes": self.total_bytes,
            "extents": self.total_extents,
            "group": self.group,
            "volumes": self.volumes,
            "clients": sum(self.clients.values()),
        }

    def describe(self) -> list[str]:
        """For a person who has to say yes."""
        age = duration(self.now_ns - self.target_time_ns)
        lines = [
            f"Point   {self.expression} = seq {self.target_seq}, {both_zones(self.target_time_ns, self.zone)}",
            f"Age     {age}: what was written since then leaves the primary (and stays recoverable)",
        ]
        lines += [f"Write   {self.bytes[v]:,} bytes in {self.extents[v]:,} extents of {v}" for v in self.volumes]
        lines += [f"Clients {count} of {v} are connected" for v, count in self.clients.items() if count]
        return lines

    def check(self, space: Space, disconnect: bool) -> None:
        """Refuses what would not end well: no room for its journal or history, or clients that must not be cut off."""
        needed = self.total_bytes * SPACE_FACTOR_PERCENT // 100 + SPARE_BYTES
        for room, what, hint in (
            (space.history_free_bytes, "history", "Free space on the replayer's disk"),
            (space.journal_room_bytes, "journal", "Raise journal.max_size or let the replayer catch up"),
        ):
            if room is not None and room < needed:
                raise RefusedError(
                    f"Rolling back needs {needed:,} bytes for the {what}, and {max(room, 0):,} are free.",
                    f"{hint}, or choose a younger point.",
                    code="no_space",
                )
        busy = [v for v, count in self.clients.items() if count]
        if busy and not disconnect:
            raise RefusedError(
                f"Clients have {' and '.join(busy)} open.",
                "Stop them, or cut them off with --disconnect.",
                code="busy",
            )

    def job(self, disconnect: bool) -> Job:
        """The job that does it."""
        return Job(
            group=self.group,
            volumes=list(self.volumes),
            target_seq=self.target_seq,
            target_time_ns=self.target_time_ns,
            expression=self.expression,
            secret=new_secret(),
            disconnect=disconnect,
            started_ns=self.now_ns,
        )


def plan(
    control: Control, group: str, volumes: list[str], expression: str, zone: tzinfo | None, now_ns: int
) -> Plan:
    """Resolves the point for the one volume, or for the whole group if there are several. Raises CdpError.

    What there is to write is as of now if the replayer is there within seconds, else as of what it has applied.
    """
    commands = Commands(control)
    name = volumes[0] if len(volumes) == 1 else group
    seq, time_ns = commands.resolve(name, expression, zone_name(zone))
    commands.wait(group, max(commands.fence(volume) for volume in volumes))
    changed = {volume: commands.changed_since(volume, seq) for volume in volumes}
    return Plan(
        group=group,
        volumes=volumes,
        expression=expression,
        target_seq=seq,
        target_time_ns=time_ns,
        zone=zone,
        now_ns=now_ns,
        bytes={volume: found[0] for volume, found in changed.items()},
        extents={volume: found[1] for volume, found in changed.items()},
        clients={volume: commands.clients(volume) for volume in volumes},
    )
