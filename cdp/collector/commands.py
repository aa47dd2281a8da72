"""What people and rollbacks ask of the collector: one method for each command of Control in ARCHITECTURE.md.

A command answers once, through `done(result, error)`, at once or when what it did is durable. Arguments come from
another process: they are checked here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cdp.collector.trust import Trust
from cdp.collector.verify import Verify
from cdp.collector.volume import Volume, secret_hash
from cdp.errors import CdpError, NotFoundError, RefusedError, StorageError, UsageError
from cdp.journal import batch, consumers

if TYPE_CHECKING:
    from cdp.collector.group import Group
    from cdp.collector.service import Collector

Done = Callable[[dict[str, Any] | None, CdpError | None], None]
Arguments = dict[str, Any]

MAX_NAME_CHARS = 64
MAX_SECRET_CHARS = 256
# A rollback proves the regions that it changed; more of them are merged by whoever asks.
MAX_RANGES = 65536
# Each holds the loop for a slice in turn.
MAX_VERIFIES = 4


class Commands:
    """Owned by the loop's thread."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._verifies: set[Verify] = set()

    def run(self, name: str, arguments: Arguments, done: Done) -> None:
        """Runs a command; whatever is wrong with it goes to `done`."""
        call = getattr(self, f"_do_{name}", None)
        try:
            if call is None:
                raise UsageError(f"The collector knows no command {name!r}.")
            call(arguments, done)
        except CdpError as e:
            done(None, e)
        except (KeyError, TypeError, ValueError) as e:
            done(None, UsageError(f"{name}: a bad or missing argument: {e}."))
        except OSError as e:
            done(None, StorageError(f"{name} failed: {e}."))

    def cancel(self) -> None:
        """The process stops."""
        for verify in self._verifies:
            verify.cancel()

    # --- points

    def _do_bookmark(self, arguments: Arguments, done: Done) -> None:
        group, name = self._group(arguments["group"]), _text(arguments["name"], MAX_NAME_CHARS)
        group.bookmarks.check(name)
        seq = _append(group, batch.BOOKMARK, batch.NO_VOLUME, name.encode())
        group.bookmarks.add(name)
        _when_durable(group, done, {"group": group.name, "name": name, "seq": seq, "time_ns": group.journal.order_ns})

    def _do_verify(self, arguments: Arguments, done: Done) -> None:
        group, volume = self._collector.volume(_text(arguments["volume"], MAX_NAME_CHARS))
        if not volume.primary.readable:
            raise RefusedError(f"{volume.name} has no primary to verify.", code="unsupported")
        if volume.refuse or group.refuse:
            raise _stopped(group, volume)
        if len(self._verifies) >= MAX_VERIFIES:
            raise RefusedError(f"{MAX_VERIFIES} verifications are running.", "Wait for one of them.", code="busy")
        regions = _regions(arguments.get("ranges"), volume)

        def ended(result: dict[str, Any] | None, error: CdpError | None) -> None:
            self._verifies.discard(verify)
            done(result, error)

        verify = Verify(group, volume, self._collector.slow, regions, ended)
        self._verifies.add(verify)
        verify.start()

    def _do_resync(self, arguments: Arguments, done: Done) -> None:
        group, volume = self._collector.volume(_text(arguments["volume"], MAX_NAME_CHARS))
        if not volume.primary.readable:
            raise RefusedError(f"{volume.name} has no primary to read.", code="unsupported")
        if volume.refuse or group.refuse:
            raise _stopped(group, volume)
        if volume.lock is not None:
            raise RefusedError(f"{volume.name} is being rolled back.", code="locked")
        reason = {"code": "resync", "text": "The whole primary is journaled again, as was asked for."}
        # The volumes are declared again first: a replayer whose history begins anew here needs nothing from before.
        after_seq = group.journal.last_seq
        if group.refuse:
            raise _stopped(group, volume)
        group.append([(batch.RESIZE, 0, v.id, 0, v.size, v.name.encode()) for v in group.volumes])
        if not group.start_resync(volume, reason, after_seq + 1):
            raise _stopped(group, volume)
        done({"volume": volume.name, "total_bytes": volume.size, "after_seq": after_seq}, None)

    # --- rollback

    def _do_lock(self, arguments: Arguments, done: Done) -> None:
        locked = [self._collector.volume(_text(name, MAX_NAME_CHARS)) for name in _list(arguments["volumes"])]
        secret = _text(arguments["secret"], MAX_SECRET_CHARS)
        disconnect = bool(arguments.get("disconnect"))
        for group, volume in locked:
            if not volume.primary.readable:
                raise RefusedError(f"{volume.name} has no primary to roll back.", code="unsupported")
            if volume.lock is not None and not volume.opens_with(secret):
                raise RefusedError(f"{volume.name} is locked by another rollback.", code="locked")
            if volume.refuse or group.refuse:
                raise _stopped(group, volume)
            if volume.connections and volume.lock is None and not disconnect:
                count = len(volume.connections)
                raise RefusedError(
                    f"{volume.name} is open: {count} connection{'s' if count > 1 else ''}.",
                    "Stop its clients, or use --disconnect.", code="busy",
                )  # fmt: skip
        for _, volume in locked:
            if volume.lock is None:
                volume.lock = secret_hash(secret)
                self._collector.disconnect(volume, "a rollback begins")
        _when_saved({group for group, _ in locked}, done, {"volumes": [v.name for _, v in locked]})

    def _do_unlock(self, arguments: Arguments, done: Done) -> None:
        held = self._held(arguments)
        for _, volume in held:
            self._collector.disconnect(volume, "the rollback ended")
            volume.lock = None
        _when_saved({group for group, _ in held}, done, {"volumes": [v.name for _, v in held]})

    def _do_rollback_begin(self, arguments: Arguments, done: Done) -> None:
        held = self._held(arguments)
        group = self._group(arguments["group"])
        volumes = [v for g, v in held if g is group]
        if len(volumes) != len(held) or not volumes:
            raise UsageError("A rollback is of volumes of one group.")
        target_seq, target_ns = int(arguments["target_seq"]), int(arguments["target_time_ns"])
        seq = group.journal.last_seq + 1  # of the record itself, which names it
        bookmark = f"rollback-{seq}"
        body = {"volumes": [v.id for v in volumes], "target_seq": target_seq, "target_time_ns": target_ns}
        _append(group, batch.ROLLBACK_BEGIN, volumes[0].id, _json({**body, "bookmark": bookmark}))
        group.bookmarks.add(bookmark)
        result = {"seq": seq, "time_ns": group.journal.order_ns, "bookmark": bookmark}
        _when_flushed(group, volumes, done, result)

    def _do_rollback_end(self, arguments: Arguments, done: Done) -> None:
        held = self._held(arguments)
        group = self._group(arguments["group"])
        volumes = [v for g, v in held if g is group]
        if len(volumes) != len(held) or not volumes:
            raise UsageError("A rollback is of volumes of one group.")
        body = {"begin": int(arguments["begin"]), "volumes": [v.id for v in volumes]}
        flags = batch.ABANDONED if arguments.get("abandoned") else 0
        seq = _append(group, batch.ROLLBACK_END, volumes[0].id, _json(body), flags)
        _when_flushed(group, volumes, done, {"seq": seq, "time_ns": group.journal.order_ns})

    def _held(self, arguments: Arguments) -> list[tuple[Group, Volume]]:
        """The named volumes, if the secret holds the lock of each."""
        secret = _text(arguments["secret"], MAX_SECRET_CHARS)
        held = [self._collector.volume(_text(name, MAX_NAME_CHARS)) for name in _list(arguments["volumes"])]
        for _, volume in held:
            if not volume.opens_with(secret):
                raise RefusedError(f"{volume.name} is not locked with this secret.", code="locked")
        return held

    # --- the rest

    def _do_consumers(self, arguments: Arguments, done: Done) -> None:
        group = self._group(arguments["group"])
        done({"consumers": consumers.positions(f"{group.folder}/journal")}, None)

    def _do_consumer_remove(self, arguments: Arguments, done: Done) -> None:
        group, name = self._group(arguments["group"]), _text(arguments["name"], MAX_NAME_CHARS)
        if name == self._collector.checkpoint_consumer:
            raise RefusedError(f"{name} stands for the primaries themselves.", code="unsupported")
        consumers.remove(f"{group.folder}/journal", name)
        if not group.journal_dead:
            group.journal.release()
        done({"group": group.name, "name": name}, None)

    def _do_trust(self, arguments: Arguments, done: Done) -> None:
        group, volume = self._collector.volume(_text(arguments["volume"], MAX_NAME_CHARS))
        Trust(group, volume, str(arguments["side"]), self._collector.slow, done).start()

    def _do_clients(self, arguments: Arguments, done: Done) -> None:
        _, volume = self._collector.volume(_text(arguments["volume"], MAX_NAME_CHARS))
        done({"volume": volume.name, "clients": [c.peer for c in volume.connections]}, None)

    def _group(self, name: object) -> Group:
        group = self._collector.groups.get(_text(name, MAX_NAME_CHARS))
        if group is None:
            raise NotFoundError(f"There is no group {name}.", f"Groups: {', '.join(self._collector.groups)}.")
        return group


def _text(value: object, limit: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise UsageError(f"An argument must be a text of 1 to {limit} characters.")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_RANGES:
        raise UsageError(f"An argument must be a list of 1 to {MAX_RANGES} entries.")
    return value


def _regions(ranges: object, volume: Volume) -> list[tuple[int, int]]:
    """The regions to verify; None: the whole volume."""
    if ranges is None:
        return [(0, volume.size)]
    found = []
    for entry in _list(ranges):
        if not isinstance(entry, dict):
            raise UsageError("A range is an object with offset and length.")
        offset, length = int(entry["offset"]), int(entry["length"])
        if offset < 0 or length < 1 or offset + length > volume.size:
            raise UsageError(f"{offset}+{length} is outside of {volume.name}.")
        found.append((offset, length))
    return found


def _append(group: Group, kind: int, volume: int, data: bytes, flags: int = 0) -> int:
    if group.refuse:
        raise _stopped(group, None)
    return group.append([(kind, flags, volume, 0, 0, data)])


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _stopped(group: Group, volume: Volume | None) -> RefusedError:
    reason = group.reason or (volume.reason if volume else None) or {"text": "see its reason"}
    return RefusedError(f"The group {group.name} is stopped: {reason['text']}", code="stopped")


def _when_durable(group: Group, done: Done, result: dict[str, Any]) -> None:
    def answer(error: OSError | None) -> None:
        if error is None:
            done(result, None)
        else:
            done(None, StorageError(f"The journal of {group.name} could not be synced."))

    group.flusher.wait(None, answer)
    group.flusher.kick()


def _when_flushed(group: Group, volumes: list[Volume], done: Done, result: dict[str, Any]) -> None:
    """When the journal and these primaries are durable."""
    left = [len(volumes)]
    failed: list[OSError] = []

    def answer(error: OSError | None) -> None:
        left[0] -= 1
        if error is not None:
            failed.append(error)
        if not left[0]:
            if failed:
                done(None, StorageError(f"{group.name} could not be synced."))
            else:
                done(result, None)

    for volume in volumes:
        group.flusher.wait(volume, answer)
    group.flusher.kick()


def _when_saved(groups: set[Group], done: Done, result: dict[str, Any]) -> None:
    left = [len(groups)]

    def saved(error: BaseException | None) -> None:
        left[0] -= 1
        if error is not None:
            left[0] = -1  # answered: what the others say changes nothing
            done(None, StorageError(f"The state could not be saved: {error}."))
        elif left[0] == 0:
            done(result, None)

    for group in groups:
        group.save_state(saved)
