"""The collector's small files: what a group is (`group.json`), its checkpoint, the names of its bookmarks.

All are JSON, replaced whole. While the loop runs they are saved by a worker thread; what is saved last wins.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict, cast

from cdp import storage
from cdp.errors import CorruptionError

VERSION = 1
Saved = Callable[[BaseException | None], None]


class RollbackState(TypedDict):
    """What the rollback that holds a volume's lock has journaled: its answers, to be given again."""

    after_seq: int  # of the journal when it locked: its records are behind it
    begin: dict[str, Any] | None
    end: dict[str, Any] | None


class VolumeState(TypedDict):
    """What outlives the process about a volume. `doubt`: why it is stopped until somebody trusts a side."""

    id: int
    size: int
    sync: NotRequired[dict[str, str] | None]
    doubt: NotRequired[dict[str, str] | None]
    lock: NotRequired[str | None]
    rollback: NotRequired[RollbackState | None]


class GroupState(TypedDict):
    version: int
    group_id: str
    epoch: int
    next_id: int
    volumes: dict[str, VolumeState]


class Checkpoint(TypedDict):
    """Primaries and journal were both synced up to `seq`. `clean`: the collector stopped there in good order."""

    version: int
    seq: int
    clean: bool
    boot_id: str
    wall_ns: int  # when it was taken
    primaries: dict[str, dict[str, Any]]


def load(path: str) -> dict[str, Any] | None:
    """The content of a small file, None if there is none. Raises CorruptionError."""
    try:
        raw = storage.read_file(path)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(raw)
    except ValueError as e:
        raise CorruptionError(f"{path} is not what was written: {e}.", "Put the state folder back from a copy.") from e
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise CorruptionError(f"{path} has a version that this program cannot read.", "Upgrade this program.")
    return content


def load_group(path: str) -> GroupState:
    """The group's state, a new one with a fresh id if there is none."""
    found = load(path)
    if found is None:
        group_id = storage.random_bytes(16).hex()
        return {"version": VERSION, "group_id": group_id, "epoch": 0, "next_id": 0, "volumes": {}}
    if not _is_group(found):
        raise CorruptionError(f"{path} is damaged.", "Put the state folder back from a copy.")
    return cast(GroupState, found)


def _is_group(found: dict[str, Any]) -> bool:
    volumes = found.get("volumes")
    try:
        return (
            len(bytes.fromhex(found["group_id"])) == 16
            and all(isinstance(found[key], int) and found[key] >= 0 for key in ("epoch", "next_id"))
            and isinstance(volumes, dict)
            and all(isinstance(v["id"], int) and isinstance(v["size"], int) for v in volumes.values())
        )
    except (KeyError, TypeError, ValueError):
        return False


def load_checkpoint(path: str) -> Checkpoint | None:
    """The newest checkpoint; None before the first."""
    found = load(path)
    if found is not None and not (isinstance(found.get("seq"), int) and isinstance(found.get("primaries"), dict)):
        raise CorruptionError(f"{path} is damaged.", "Put the state folder back from a copy.")
    return cast("Checkpoint | None", found)


def save(path: str, content: Any) -> None:
    """Replaces the file, durably; blocks. Raises OSError."""
    storage.write_file(path, json.dumps(content).encode())


def boot_id() -> str:
    """Changes with every start of the machine."""
    return storage.read_file("/proc/sys/kernel/random/boot_id").decode().strip()


class Store:
    """One of these files, saved without blocking the loop: one save at a time, the newest content next."""

    def __init__(self, path: str, worker: storage.Worker) -> None:
        self._path, self._worker = path, worker
        self._next: bytes | None = None
        self._waiting: list[Saved] = []
        self._busy = False
        self.failed = False  # the newest content that was to be saved is not

    def save(self, content: Any, done: Saved | None = None) -> None:
        """`done(error)` is called when this content, or a newer one, is durable."""
        self._next = json.dumps(content).encode()
        if done is not None:
            self._waiting.append(done)
        self._go()

    @property
    def busy(self) -> bool:
        """Something newer than what is durable is on its way."""
        return self._busy

    def _go(self) -> None:
        if self._busy or self._next is None:
            return
        raw, self._next = self._next, None
        waiting, self._waiting = self._waiting, []
        self._busy = True

        def saved(_: object, error: BaseException | None) -> None:
            self._busy = False
            self.failed = error is not None
            for done in waiting:
                done(error)
            self._go()

        self._worker.submit(saved, storage.write_file, self._path, raw)
