"""What the records so far say about each volume: declared, in a gap, in a rollback.

A pure follower of RESIZE, GAP, ROLLBACK_BEGIN and ROLLBACK_END records; its whole state is plain data that goes into
the committed position.
"""

from __future__ import annotations

import json
from typing import Any

from cdp.errors import CorruptionError
from cdp.journal.batch import GAP, OPEN, RESIZE, ROLLBACK_BEGIN, ROLLBACK_END, Record

Reason = dict[str, str]
# From worst to best: a group shows its worst volume's state.
STATES = ("stopped", "forked", "tracking", "resyncing", "rolling_back", "syncing", "protected")
FOLLOWED = frozenset((RESIZE, GAP, ROLLBACK_BEGIN, ROLLBACK_END))


def reason(code: str, text: str) -> Reason:
    return {"code": code, "text": text}


def _json(record: Record) -> dict[str, Any]:
    try:
        found = json.loads(bytes(record.data) or b"{}")
    except ValueError as e:
        raise CorruptionError(f"The record of seq {record.seq} carries no JSON: {e}.") from e
    if not isinstance(found, dict):
        raise CorruptionError(f"The record of seq {record.seq} carries no JSON object.")
    return found


class Course:
    """Names, open gaps and open rollbacks of a group's volumes, by number, at the newest applied record."""

    def __init__(self, plain: dict[str, Any] | None = None) -> None:
        plain = plain or {}
        self.names: dict[str, int] = dict(plain.get("names", {}))
        self._gaps: dict[int, Reason] = {int(k): dict(v) for k, v in plain.get("gaps", {}).items()}
        self._rollbacks: dict[int, int] = {int(k): int(v) for k, v in plain.get("rollbacks", {}).items()}
        # After a reset: whose resync has not ended, and where it ended. What lies before was never the primary's.
        self.awaited: set[str] = set(plain.get("awaited", []))
        self.whole_from: dict[str, int] = dict(plain.get("whole_from", {}))

    def plain(self) -> dict[str, Any]:
        """A copy that `Course(…)` takes."""
        return {
            "names": dict(self.names), "gaps": dict(self._gaps), "rollbacks": dict(self._rollbacks),
            "awaited": sorted(self.awaited), "whole_from": dict(self.whole_from),
        }  # fmt: skip

    def follow(self, record: Record) -> None:
        """Takes a record of a kind in FOLLOWED. Raises CorruptionError."""
        if record.kind == RESIZE:
            name = str(bytes(record.data), "utf-8", "replace")
            self.names = {**self.names, name: record.volume}  # other threads go through the one they have
        elif record.kind == GAP:
            self._follow_gap(record)
        elif record.kind == ROLLBACK_BEGIN:
            for volume in _json(record).get("volumes") or [record.volume]:
                self._rollbacks[int(volume)] = record.seq
        elif record.kind == ROLLBACK_END:
            for volume in _json(record).get("volumes") or [record.volume]:
                self._rollbacks.pop(int(volume), None)

    def _follow_gap(self, record: Record) -> None:
        if record.flags & OPEN:
            said = _json(record)
            self._gaps[record.volume] = reason(str(said.get("code", "gap")), str(said.get("text", "")))
            return
        self._gaps.pop(record.volume, None)
        whole = {name for name, volume in self.names.items() if volume == record.volume} & self.awaited
        self.whole_from = self.whole_from | dict.fromkeys(whole, record.seq)
        self.awaited -= whole

    def of(self, name: str) -> tuple[str, Reason | None]:
        """State and reason of a volume by its name."""
        volume = self.names.get(name)
        if name in self.awaited:
            return "resyncing", reason("resync_needed", f"{name} is whole again when its resync has ended.")
        if volume is None:
            return "syncing", reason("not_declared", f"The journal has not named {name} yet: start the collector.")
        gap = self._gaps.get(volume)
        if gap is not None:
            return ("syncing" if gap["code"] == "initial_sync" else "resyncing"), gap
        begin = self._rollbacks.get(volume)
        if begin is not None:
            return "rolling_back", reason("rolling_back", f"A rollback began at seq {begin}.")
        return "protected", None


def worst(states: list[tuple[str, Reason | None]]) -> tuple[str, Reason | None]:
    """The state a group shows."""
    return min(states, key=lambda s: STATES.index(s[0]), default=("protected", None))
