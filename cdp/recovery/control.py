"""What recovery asks of the two parents: the commands of the control protocol, with types.

`Control` is whoever carries a command there (the client of the HTTP API; in one process the objects themselves).
Every answer comes from another process, so a missing field is an error of that process and says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import islice
from typing import Any, Protocol, TypeVar

from cdp.errors import RefusedError, StorageError, UnreachableError
from cdp.recovery.grammar import ROLLBACK_PREFIX

# A command that only touches the journal.
QUICK_SECONDS = 30.0
# VERIFY reads what it digests from the primary, between production's writes.
VERIFY_SECONDS = 3600.0
# How long one `wait` stays with the replayer; it is asked again until `patience` ends.
WAIT_SECONDS = 10.0
# Ranges of one `verify` command: some 200 KiB of JSON, well below what a parent takes; each command waits for a sync.
VERIFY_RANGES = 4096
# A region that every volume has.
_FENCE_BYTES = 512

T = TypeVar("T")


class Control(Protocol):
    """Carries a command to the `collector` or the `replayer` (`role`); raises the CdpError that came back,
    UnreachableError when nobody answers."""

    def command(
        self, role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = ..., /
    ) -> dict[str, Any]: ...


def _of(answer: dict[str, Any], key: str, kind: type[T]) -> T:
    value = answer.get(key)
    if not isinstance(value, kind):
        raise StorageError(f"The answer of the appliance lacks {key!r}.", "Are its parts of one version?")
    return value


class Commands:
    """The commands that a rollback and an export give."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def _collector(self, name: str, timeout_seconds: float = QUICK_SECONDS, **arguments: Any) -> dict[str, Any]:
        return self._control.command("collector", name, arguments, timeout_seconds)

    def _replayer(self, command: str, arguments: dict[str, Any], more_seconds: float = 0.0) -> dict[str, Any]:
        return self._control.command("replayer", command, arguments, QUICK_SECONDS + more_seconds)

    # --- the replayer's

    def resolve(self, name: str, expression: str, zone: str) -> tuple[int, int]:
        """(seq, time) that an expression means for a volume or group now."""
        point = self._replayer("resolve", {"name": name, "expression": expression, "zone": zone})
        return _of(point, "seq", int), _of(point, "time_ns", int)

    def open_rollback(self, volume: str) -> dict[str, Any] | None:
        """BEGIN of the rollback that the volume is in, as far as it is replayed; None if it is in none."""
        for gap in _of(self._replayer("points", {"name": volume, "limit": 1}), "gaps", list):
            if gap["reason"]["code"] == "rollback" and gap["to"] is None:
                seq = int(gap["from"]["seq"]) - 1
                seq, time_ns = self.resolve(volume, f"seq:{seq}", "UTC")
                return {"seq": seq, "time_ns": time_ns, "bookmark": f"{ROLLBACK_PREFIX}{seq}"}
        return None

    def changed_since(self, volume: str, seq: int) -> tuple[int, int]:
        """(bytes, extents) of a volume that were written between a point and now."""
        arguments = {"volume": volume, "from": f"seq:{seq}", "to": "now", "zone": "UTC", "totals": True}
        answer = self._replayer("diff", arguments)
        return _of(answer, "bytes", int), _of(answer, "extents", int)

    def wait(self, group: str, seq: int, timeout_seconds: float = WAIT_SECONDS) -> bool:
        """Whether the replayer has applied a seq within that time."""
        arguments = {"group": group, "seq": seq, "timeout_seconds": timeout_seconds}
        return _of(self._replayer("wait", arguments, timeout_seconds), "applied", bool)

    def pin(self, group: str, seq: int, owner: str) -> None:
        """Keeps the history of a point until `unpin` or the end of the replayer's process. A second pin of an owner
        takes the place of its first."""
        self._replayer("pin", {"group": group, "seq": seq, "owner": owner})

    def unpin(self, owner: str) -> None:
        """Lets it go. Nobody to tell is as good: pins end with the replayer's process."""
        with contextlib.suppress(UnreachableError):
            self._replayer("unpin", {"owner": owner})

    def mismatches(self, volume: str, first_seq: int, last_seq: int) -> list[tuple[int, int]]:
        """Regions whose VERIFY records between two seqs did not match the replica."""
        arguments = {"volume": volume, "first_seq": first_seq, "last_seq": last_seq}
        found = _of(self._replayer("verify_result", arguments), "mismatches", list)
        return [(int(offset), int(length)) for offset, length in found]

    # --- the collector's

    def clients(self, volume: str) -> int:
        """How many clients have a volume open."""
        found = self._collector("clients", volume=volume).get("clients")
        return len(found) if isinstance(found, list) else int(found or 0)

    def lock(self, volumes: list[str], secret: str, disconnect: bool) -> None:
        """Clients out, new ones refused, durably; again with the same secret: that rollback's older connections too."""
        self._collector("lock", volumes=volumes, secret=secret, disconnect=disconnect)

    def unlock(self, volumes: list[str], secret: str) -> None:
        """Clients may come again; what this secret does not hold is unlocked already."""
        try:
            self._collector("unlock", volumes=volumes, secret=secret)
        except RefusedError as e:
            if e.code != "locked":
                raise

    def begin(self, group: str, volumes: list[str], secret: str, seq: int, time_ns: int) -> dict[str, Any]:
        """BEGIN as it stands in the journal: `{"seq", "time_ns", "bookmark"}`."""
        answer = self._collector(
            "rollback_begin", group=group, volumes=volumes, secret=secret, target_seq=seq, target_time_ns=time_ns
        )
        return {
            "seq": _of(answer, "seq", int),
            "time_ns": _of(answer, "time_ns", int),
            "bookmark": _of(answer, "bookmark", str),
        }

    def end(self, group: str, volumes: list[str], secret: str, begin: int, abandoned: bool) -> dict[str, Any]:
        """END as it stands in the journal: `{"seq", "time_ns"}`."""
        answer = self._collector(
            "rollback_end", group=group, volumes=volumes, secret=secret, begin=begin, abandoned=abandoned
        )
        return {"seq": _of(answer, "seq", int), "time_ns": _of(answer, "time_ns", int)}

    def verify(self, volume: str, ranges: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
        """(first, last) seq of the VERIFY records over the ranges; None if there are no ranges."""
        first = last = None
        left = iter(ranges)
        while some := [{"offset": offset, "length": length} for offset, length in islice(left, VERIFY_RANGES)]:
            answer = self._collector("verify", VERIFY_SECONDS, volume=volume, ranges=some)
            first = _of(answer, "first_seq", int) if first is None else first
            last = _of(answer, "last_seq", int)
        return None if first is None or last is None else (first, last)

    def fence(self, volume: str) -> int:
        """A seq behind everything that was written to a volume before: of a VERIFY of its first sector."""
        taken = self.verify(volume, [(0, _FENCE_BYTES)])
        assert taken is not None  # there was a range
        return taken[1]
