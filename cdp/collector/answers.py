"""How a command comes to its answer: one record appended, then the syncs or saved state that it must wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cdp.collector.volume import Volume
from cdp.errors import CdpError, RefusedError, StorageError

if TYPE_CHECKING:
    from cdp.collector.group import Group

Done = Callable[[dict[str, Any] | None, CdpError | None], None]


def append_one(group: Group, kind: int, volume: int, data: bytes, flags: int = 0) -> int:
    """Its seq. Raises RefusedError (`stopped`), StorageError."""
    if group.refuse:
        raise stopped(group, None)
    return group.append([(kind, flags, volume, 0, 0, data)])


def stopped(group: Group, volume: Volume | None) -> RefusedError:
    """Why nothing is written to a group or volume now."""
    reason = group.reason or (volume.reason if volume else None) or {"text": "see its reason"}
    return RefusedError(f"The group {group.name} is {group.state}: {reason['text']}", code="stopped")


def when_durable(group: Group, done: Done, result: dict[str, Any]) -> None:
    """When the journal is."""

    def answer(error: OSError | None) -> None:
        if error is None:
            done(result, None)
        else:
            done(None, StorageError(f"The journal of {group.name} could not be synced."))

    group.flusher.wait(None, answer)
    group.flusher.kick()


def when_flushed(group: Group, volumes: list[Volume], done: Done, result: dict[str, Any]) -> None:
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


def when_saved(groups: set[Group], done: Done, result: dict[str, Any]) -> None:
    """When what is kept of these groups' volumes is durable."""
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
