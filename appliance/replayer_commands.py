"""What can be asked of the replayer over its control channel. Runs on the loop's thread; waits on a worker's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from appliance.control import Done
from cdp import storage
from cdp.errors import CdpError, NotFoundError, RefusedError, UnreachableError
from cdp.history.history import History
from cdp.history.timeline import Gap, Point, Timeline
from cdp.history.view import View
from cdp.nbd.loop import Loop
from cdp.recovery import diff as differences
from cdp.recovery.points import Resolved, resolve
from cdp.recovery.times import zone_named
from cdp.replica.replayer import Pin, Replayer

# Waits at the same time: each holds a thread that sleeps. People and a rollback or two wait.
MAX_WAITS = 8
# Nobody waits longer in one call; who needs more asks again.
MAX_WAIT_SECONDS = 3600.0
# Pins asked for over control: a rollback holds one for each group.
MAX_PINS = 64
# Why a group may stand still for good, so that only a new history helps: the journal jumps, or continues another one,
# or what the replayer keeps is damaged.
RESET_CODES = ("hole", "place_expired", "topic_replaced", "forked", "fenced", "corrupt")


class GroupSource:
    """A group as the past's exports see it."""

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer

    @property
    def timeline(self) -> Timeline:
        return self._replayer.history.timeline

    def open_view(self, volume: str, seq: int) -> View:
        return self._replayer.open_view(volume, seq)

    def pin(self, seq: int) -> Pin:
        return self._replayer.pin(seq)


class Commands:
    """Bound to the groups of one process; `volumes` says which group a volume is in."""

    def __init__(self, groups: dict[str, Replayer], volumes: dict[str, str]) -> None:
        self._groups, self._volumes = groups, volumes
        self._pins: dict[str, Pin] = {}
        self._waits = 0
        self._worker: storage.Worker | None = None
        self._table: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "points": self._points,
            "resolve": self._resolve,
            "diff": self._diff,
            "verify_result": self._verify_result,
            "pin": self._pin,
            "unpin": self._unpin,
            "space": self._space,
            "reset": self._reset,
        }

    def attach(self, loop: Loop) -> None:
        self._worker = storage.Worker(MAX_WAITS, "wait")
        loop.add_reader(self._worker.fileno(), self._worker.drain)

    def close(self) -> None:
        """Waits that are under way end by their process's end: their threads are daemons."""
        for pin in self._pins.values():
            pin.release()
        self._pins.clear()

    def run(self, name: str, arguments: dict[str, Any], done: Done) -> None:
        """Answers through `done`. Raises CdpError for what is answered at once with an error."""
        if name == "wait":
            self._wait(arguments, done)
        elif name in self._table:
            done(self._table[name](arguments), None)
        else:
            raise NotFoundError(f"The replayer has no command {name!r}.")

    # --- names

    def _group(self, name: str) -> Replayer:
        if name not in self._groups:
            raise NotFoundError(f"The replayer has no group {name!r}.", "Was it started with this configuration?")
        return self._groups[name]

    def _history(self, name: str) -> tuple[History, str | None]:
        """The history of a group or a volume's group, and the volume's name if it is one."""
        volume = name if name in self._volumes else None
        return self._group(self._volumes.get(name, name)).history, volume

    @staticmethod
    def _number(timeline: Timeline, volume: str | None) -> int | None:
        if volume is None:
            return None
        numbers = timeline.volumes()
        if volume not in numbers:
            raise RefusedError(
                f"Nothing of volume {volume!r} has been replayed yet.", "Try again in a moment.", code="outside_window"
            )
        return numbers[volume]

    def _resolved(self, arguments: dict[str, Any], name: str, expression: str) -> Resolved:
        history, volume = self._history(name)
        zone = zone_named(arguments.get("zone"))
        number = self._number(history.timeline, volume)
        return resolve(expression, history.timeline, number, storage.wall_ns(), zone)

    # --- commands

    def _points(self, arguments: dict[str, Any]) -> dict[str, Any]:
        history, volume = self._history(arguments["name"])
        timeline, numbers = history.timeline, history.timeline.volumes()
        number, first_seq = None, 0
        if volume is not None:
            number = numbers.get(volume)
            found = None if number is None else timeline.exists_from(number)
            if found is None:  # nothing of it has been replayed
                return {"oldest": None, "newest": None, "bookmarks": [], "barriers": [], "gaps": []}
            first_seq = found
        gaps = timeline.gaps(number)
        barriers = timeline.barriers(number, int(arguments["limit"]), gaps)
        return {
            "oldest": plain(_not_before(timeline, timeline.oldest(), first_seq)),
            "newest": plain(timeline.newest()),
            "bookmarks": [{"name": name, **(plain(p) or {})} for name, p in timeline.bookmarks() if p.seq >= first_seq],
            "barriers": [plain(p) for p in barriers if p.seq >= first_seq],
            "gaps": [gap(timeline, g, {v: k for k, v in numbers.items()}) for g in gaps],
        }

    def _resolve(self, arguments: dict[str, Any]) -> dict[str, Any]:
        found = self._resolved(arguments, arguments["name"], arguments["expression"])
        return {"seq": found.seq, "time_ns": found.time_ns, "zone": found.zone, "asked_ns": found.asked_ns}

    def _diff(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Between two points; `to` missing: the newest applied. Extents are [offset, length]; with `totals` only their
        number."""
        name = arguments["volume"]
        start = self._resolved(arguments, name, arguments["from"])
        end = self._resolved(arguments, name, arguments.get("to", "now"))
        history, _ = self._history(name)
        number = self._number(history.timeline, name)
        assert number is not None  # `name` was resolved as a volume
        size = max(history.timeline.size_at(number, point.seq) or 0 for point in (start, end))
        answer = {
            "from": {"seq": start.seq, "time_ns": start.time_ns},
            "to": {"seq": end.seq, "time_ns": end.time_ns},
        }
        if arguments.get("totals"):
            total, count = differences.measure(history, number, size, start, end)
            return {**answer, "extents": count, "bytes": total}
        found = differences.diff(history, number, size, start, end)
        return {**answer, "extents": found.extents, "bytes": found.bytes}

    def _verify_result(self, arguments: dict[str, Any]) -> dict[str, Any]:
        volume, last_seq = arguments["volume"], int(arguments["last_seq"])
        replayer = self._group(self._volumes.get(volume, volume))
        if replayer.applied.seq < last_seq:
            # Who waited for it may have asked a process that was killed since: nothing found is no proof yet.
            raise UnreachableError(
                f"The replayer has not applied seq {last_seq} of {volume}: "
                "what the VERIFY records up to there say is not known yet.",
                "Wait for it, and ask again.",
            )
        return {"mismatches": replayer.verify_result(volume, int(arguments["first_seq"]), last_seq)}

    def _pin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """An owner has one pin: a process that was killed could not let it go, and the one after it pins anew."""
        owner = str(arguments["owner"])
        if owner not in self._pins and len(self._pins) >= MAX_PINS:
            raise RefusedError(f"There are {MAX_PINS} pins already.", "End a rollback or an export.", code="busy")
        pin = self._group(arguments["group"]).pin(arguments["seq"], owner)
        self._unpin(arguments)
        self._pins[owner] = pin
        return {}

    def _unpin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        pin = self._pins.pop(str(arguments["owner"]), None)
        if pin is not None:
            pin.release()
        return {}

    def _space(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Free bytes where the history of a group grows."""
        return {"free_bytes": storage.free_bytes(self._group(arguments["group"]).folder)}

    def _reset(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A new history behind `after_seq`, for a group that cannot go on with the one it has."""
        replayer = self._group(arguments["group"])
        code = (replayer.reason or {}).get("code")
        if replayer.state != "forked" and code not in RESET_CODES:
            raise RefusedError(
                f"The history of {arguments['group']} is in order; it is not thrown away.", "", code="busy"
            )
        replayer.reset_history(int(arguments["after_seq"]))
        return {}

    def _wait(self, arguments: dict[str, Any], done: Done) -> None:
        replayer = self._group(arguments["group"])
        if self._worker is None or self._waits >= MAX_WAITS:
            raise RefusedError(f"{MAX_WAITS} callers wait already.", "Try again.", code="busy")
        self._waits += 1

        def answer(applied: bool | None, error: BaseException | None) -> None:
            self._waits -= 1
            if isinstance(error, CdpError):
                done(None, error)
            else:
                done({"applied": bool(applied)}, None)

        seconds = min(float(arguments["timeout_seconds"]), MAX_WAIT_SECONDS)
        self._worker.submit(answer, replayer.wait_applied, int(arguments["seq"]), seconds)


def _not_before(timeline: Timeline, point: Point | None, seq: int) -> Point | None:
    return point if point is None or point.seq >= seq else Point(seq, timeline.time_of(seq))


def plain(point: Point | None) -> dict[str, Any] | None:
    """A point as control carries it."""
    return None if point is None else {"seq": point.seq, "time_ns": point.time_ns}


def gap(timeline: Timeline, found: Gap, names: dict[int, str]) -> dict[str, Any]:
    """A gap as control carries it: its volume, its first withheld seq, and the first good one after it or null."""
    ends = {
        name: None if seq is None else {"seq": seq, "time_ns": timeline.time_of(seq)}
        for name, seq in (("from", found.from_seq), ("to", found.to_seq))
    }
    return {"volume": names.get(found.volume), **ends, "reason": {"code": found.code, "text": found.text}}
