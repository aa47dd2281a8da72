"""The collector's part of a rollback: the lock, BEGIN and END, each of which may be said twice (promise 7).

What the holder of a lock has journaled is kept with the lock, durably before it is answered; a kill in between finds
it in the journal's tail, because no checkpoint passes the record before that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cdp.collector.answers import Done, append_one, stopped, when_flushed, when_saved
from cdp.collector.volume import Volume, secret_hash
from cdp.errors import RefusedError
from cdp.journal import batch

if TYPE_CHECKING:
    from cdp.collector.group import Group

Named = list[tuple["Group", Volume]]


class Rolling:
    """Owned by the loop's thread. `disconnect(volume, reason)` ends every connection to a volume."""

    def __init__(self, disconnect: Callable[[Volume, str], None]) -> None:
        self._disconnect = disconnect

    def lock(self, named: Named, secret: str, disconnect: bool, done: Done) -> None:
        """Durably `rolling_back`; said again by its holder it closes the holder's older connections. RefusedError."""
        for group, volume in named:
            _check_lockable(group, volume, secret, disconnect)
        for group, volume in named:
            self._disconnect(volume, "a rollback begins" if volume.lock is None else "the rollback goes on")
            if volume.lock is None:
                volume.lock = secret_hash(secret)
                volume.rollback = {"after_seq": group.journal.last_seq, "begin": None, "end": None}
        when_saved({group for group, _ in named}, done, {"volumes": [v.name for _, v in named]})

    def unlock(self, named: Named, secret: str, done: Done) -> None:
        """What is not locked is done; RefusedError for what another secret holds."""
        for _, volume in named:
            if volume.lock is not None and not volume.opens_with(secret):
                raise RefusedError(f"{volume.name} is not locked with this secret.", code="locked")
        for _, volume in named:
            if volume.lock is not None:
                self._disconnect(volume, "the rollback ended")
                volume.lock = volume.rollback = None
        when_saved({group for group, _ in named}, done, {"volumes": [v.name for _, v in named]})

    def begin(self, group: Group, volumes: list[Volume], target_seq: int, target_ns: int, done: Done) -> None:
        """BEGIN, or the one that this lock's holder has journaled already."""
        result = _noted(volumes, "begin")
        if result is None:
            seq = group.journal.last_seq + 1  # of the record itself, which names it
            bookmark = f"rollback-{seq}"
            body = {"volumes": [v.id for v in volumes], "target_seq": target_seq, "target_time_ns": target_ns}
            append_one(group, batch.ROLLBACK_BEGIN, volumes[0].id, _json({**body, "bookmark": bookmark}))
            group.bookmarks.add(bookmark)
            result = {"seq": seq, "time_ns": group.journal.order_ns, "bookmark": bookmark}
            _note(volumes, "begin", result)
        _when_kept(group, volumes, done, result)

    def end(self, group: Group, volumes: list[Volume], begin: int, abandoned: bool, done: Done) -> None:
        """END of that BEGIN, or the one that is in the journal already."""
        result = _noted(volumes, "end")
        if result is None:
            body = {"begin": begin, "volumes": [v.id for v in volumes]}
            flags = batch.ABANDONED if abandoned else 0
            seq = append_one(group, batch.ROLLBACK_END, volumes[0].id, _json(body), flags)
            result = {"seq": seq, "time_ns": group.journal.order_ns}
            _note(volumes, "end", result)
        _when_kept(group, volumes, done, result)


def note_rollback(volumes: list[Volume], record: batch.Record) -> None:
    """A start met this BEGIN or END in the tail: it belongs to the rollback whose lock is older than it."""
    body = json.loads(bytes(record.data))
    holders = [v for v in volumes if v.id in body["volumes"] and v.rollback and record.seq > v.rollback["after_seq"]]
    answer = {"seq": record.seq, "time_ns": record.time_ns}
    if record.kind == batch.ROLLBACK_BEGIN:
        _note(holders, "begin", {**answer, "bookmark": body["bookmark"]})
    else:
        _note(holders, "end", answer)


def _check_lockable(group: Group, volume: Volume, secret: str, disconnect: bool) -> None:
    if not volume.primary.readable:
        raise RefusedError(f"{volume.name} has no primary to roll back.", code="unsupported")
    if volume.lock is not None and not volume.opens_with(secret):
        raise RefusedError(f"{volume.name} is locked by another rollback.", code="locked")
    if volume.refuse or group.refuse:
        raise stopped(group, volume)
    if volume.connections and volume.lock is None and not disconnect:
        count = len(volume.connections)
        raise RefusedError(
            f"{volume.name} is open: {count} connection{'s' if count > 1 else ''}.",
            "Stop its clients, or use --disconnect.", code="busy",
        )  # fmt: skip


def _noted(volumes: list[Volume], what: str) -> dict[str, Any] | None:
    """What was answered for exactly these volumes before."""
    found = [v.rollback and v.rollback[what] for v in volumes]  # type: ignore[literal-required]
    return found[0] if found[0] and all(one == found[0] for one in found) else None


def _note(volumes: list[Volume], what: str, answer: dict[str, Any]) -> None:
    for volume in volumes:
        if volume.rollback is not None:
            volume.rollback[what] = answer  # type: ignore[literal-required]


def _when_kept(group: Group, volumes: list[Volume], done: Done, result: dict[str, Any]) -> None:
    """When the note of it is durable, and then journal and primaries are."""

    def saved(_: dict[str, Any] | None, error: Any) -> None:
        if error is not None:
            done(None, error)
        else:
            when_flushed(group, volumes, done, result)

    when_saved({group}, saved, result)


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
