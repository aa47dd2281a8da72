"""The file of a rollback: what it is and how far it came, written durably before each step.

A process that finds it after a kill knows which step may have been under way; every step can be done again. The file
holds the secret that opens the locked volumes, so it is readable by its owner only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cdp import storage
from cdp.errors import NotFoundError, StorageError
from cdp.recovery.points import point_json
from cdp.recovery.times import iso_utc

# The steps in their order; a job whose step is DONE holds no lock any more.
LOCK, BEGIN, WAIT, COPY, PROVE, END, UNLOCK, DONE = (
    "lock", "begin", "wait", "copy", "prove", "end", "unlock", "done",
)  # fmt: skip
STEPS = (LOCK, BEGIN, WAIT, COPY, PROVE, END, UNLOCK, DONE)
# What the steps are for.
FORWARD, UNDO, ABANDON = "forward", "undo", "abandon"
DIRECTIONS = (FORWARD, UNDO, ABANDON)


@dataclass
class Job:
    """One rollback of volumes of a group. Points are `{"seq", "time_ns"}`, `begin` with `bookmark` too."""

    group: str
    volumes: list[str]
    target_seq: int
    target_time_ns: int
    expression: str
    secret: str
    disconnect: bool
    started_ns: int
    step: str = LOCK
    direction: str = FORWARD
    begin: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    # For each volume that was looked at: bytes and extents that differ, and the offset that is copied up to.
    bytes: dict[str, int] = field(default_factory=dict)
    extents: dict[str, int] = field(default_factory=dict)
    copied_to: dict[str, int] = field(default_factory=dict)
    # What the last attempt ended with, for people.
    error: str | None = None

    @property
    def active(self) -> bool:
        """Whether it still holds, or may hold, the volumes."""
        return self.step != DONE

    @property
    def name(self) -> str:
        """The same in every process that runs it, and no other's; for people too."""
        return f"the rollback of {' and '.join(self.volumes)} begun at {iso_utc(self.started_ns)}"

    @property
    def source_seq(self) -> int:
        """The point whose content is being copied: the target, or for an undo BEGIN."""
        if self.direction == UNDO and self.begin is not None:
            return int(self.begin["seq"])
        return self.target_seq

    def to_json(self) -> dict[str, Any]:
        """The answer of `rollback --json`, and where it stands; without the secret."""
        begin, end = (None if p is None else point_json(p["seq"], p["time_ns"]) for p in (self.begin, self.end))
        return {
            "target": point_json(self.target_seq, self.target_time_ns),
            "bookmark": None if self.begin is None else self.begin["bookmark"],
            "begin": begin,
            "end": end,
            "bytes": sum(self.bytes.values()) if self.bytes else None,
            "extents": sum(self.extents.values()) if self.extents else None,
            "group": self.group,
            "volumes": self.volumes,
            "expression": self.expression,
            "step": self.step,
            "direction": self.direction,
            "error": self.error,
        }


def new_secret() -> str:
    """What opens the locked volumes for this rollback alone."""
    return storage.random_bytes(16).hex()


def save(path: str, job: Job) -> None:
    """Durably: temporary file, fsync, rename, fsync of the folder. Raises OSError."""
    storage.write_file(path, json.dumps(asdict(job), indent=1).encode())


def load(path: str) -> Job:
    """Raises NotFoundError, and StorageError for a file that this program did not write."""
    try:
        plain = json.loads(storage.read_file(path))
        job = Job(**{f.name: plain[f.name] for f in fields(Job)})
    except FileNotFoundError:
        raise NotFoundError(f"There is no rollback at {path}.") from None
    except (ValueError, KeyError, TypeError) as e:
        raise StorageError(f"{path} is no file of a rollback: {e!r}.", "Remove it if no volume is locked.") from None
    if job.step not in STEPS or job.direction not in DIRECTIONS or not isinstance(job.volumes, list):
        raise StorageError(f"{path}: a rollback at step {job.step!r}, {job.direction!r} is of another version.")
    if job.begin is None and job.step in (WAIT, COPY, PROVE, END):
        raise StorageError(f"{path} is damaged: a rollback at step {job.step!r} without its BEGIN.")
    return job
