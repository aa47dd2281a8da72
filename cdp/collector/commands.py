"""What people and rollbacks ask of the collector: one method for each command of Control in ARCHITECTURE.md.

A command answers once, through `done(result, error)`, at once or when what it did is durable. Arguments come from
another process: they are checked here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdp.collector.answers import Done, append_one, stopped, when_durable
from cdp.collector.rolling import Rolling
from cdp.collector.trust import Trust
from cdp.collector.verify import Verify
from cdp.collector.volume import Volume
from cdp.errors import CdpError, NotFoundError, RefusedError, StorageError, UsageError
from cdp.journal import batch, consumers

if TYPE_CHECKING:
    from cdp.collector.group import Group
    from cdp.collector.service import Collector

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
        self._rolling = Rolling(collector.disconnect)

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
        withheld = _withheld(group)
        if group.volumes and len(withheld) == len(group.volumes):
            raise RefusedError(
                f"No volume of {group.name} could be opened at this moment: {withheld[0]['reason']['text']}",
                "Wait until its state is `protected`.", code="in_gap",
            )  # fmt: skip
        seq = append_one(group, batch.BOOKMARK, batch.NO_VOLUME, name.encode())
        group.bookmarks.add(name)
        point = {"seq": seq, "time_ns": group.journal.order_ns}
        when_durable(group, done, {"group": group.name, "name": name, **point, "withheld": withheld})

    def _do_verify(self, arguments: Arguments, done: Done) -> None:
        group, volume = self._collector.volume(_text(arguments["volume"], MAX_NAME_CHARS))
        if not volume.primary.readable:
            raise RefusedError(f"{volume.name} has no primary to verify.", code="unsupported")
        if volume.refuse or group.refuse:
            raise stopped(group, volume)
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
            raise stopped(group, volume)
        if volume.lock is not None:
            raise RefusedError(f"{volume.name} is being rolled back.", code="locked")
        reason = {"code": "resync", "text": "The whole primary is journaled again, as was asked for."}
        # The volumes are declared again first: a replayer whose history begins anew here needs nothing from before.
        after_seq = group.journal.last_seq
        if group.refuse:
            raise stopped(group, volume)
        group.append([(batch.RESIZE, 0, v.id, 0, v.size, v.name.encode()) for v in group.volumes])
        if not group.start_resync(volume, reason, after_seq + 1):
            raise stopped(group, volume)
        done({"volume": volume.name, "total_bytes": volume.size, "after_seq": after_seq}, None)

    # --- rollback

    def _do_lock(self, arguments: Arguments, done: Done) -> None:
        named, secret = self._named(arguments), _secret(arguments)
        self._rolling.lock(named, secret, bool(arguments.get("disconnect")), done)

    def _do_unlock(self, arguments: Arguments, done: Done) -> None:
        self._rolling.unlock(self._named(arguments), _secret(arguments), done)

    def _do_rollback_begin(self, arguments: Arguments, done: Done) -> None:
        group, volumes = self._held(arguments)
        self._rolling.begin(group, volumes, int(arguments["target_seq"]), int(arguments["target_time_ns"]), done)

    def _do_rollback_end(self, arguments: Arguments, done: Done) -> None:
        group, volumes = self._held(arguments)
        self._rolling.end(group, volumes, int(arguments["begin"]), bool(arguments.get("abandoned")), done)

    def _named(self, arguments: Arguments) -> list[tuple[Group, Volume]]:
        return [self._collector.volume(_text(name, MAX_NAME_CHARS)) for name in _list(arguments["volumes"])]

    def _held(self, arguments: Arguments) -> tuple[Group, list[Volume]]:
        """The named volumes of one group, if the secret holds the lock of each."""
        secret, named, group = _secret(arguments), self._named(arguments), self._group(arguments["group"])
        for _, volume in named:
            if not volume.opens_with(secret):
                raise RefusedError(f"{volume.name} is not locked with this secret.", code="locked")
        if any(g is not group for g, _ in named):
            raise UsageError("A rollback is of volumes of one group.")
        return group, [v for _, v in named]

    # --- the rest

    def _do_consumers(self, arguments: Arguments, done: Done) -> None:
        group = self._group(arguments["group"])
        done({"consumers": consumers.positions(f"{group.folder}/journal")}, None)

    def _do_consumer_remove(self, arguments: Arguments, done: Done) -> None:
        group, name = self._group(arguments["group"]), _text(arguments["name"], MAX_NAME_CHARS)
        if name == self._collector.checkpoint_consumer:
            raise RefusedError(f"{name} stands for the primaries themselves.", code="unsupported")
        consumers.remove(f"{group.folder}/journal", name)
        group.release()
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


def _withheld(group: Group) -> list[dict[str, Any]]:
    """The volumes that the point of this moment cannot be opened for, each with the reason."""
    found = ((v.name, v.withheld or group.refusals.reason_of(v)) for v in group.volumes)
    return [{"volume": name, "reason": reason} for name, reason in found if reason is not None]


def _secret(arguments: Arguments) -> str:
    return _text(arguments["secret"], MAX_SECRET_CHARS)


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
