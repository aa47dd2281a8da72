"""One protected volume inside the collector: what all of its rooms share about it."""

from __future__ import annotations

import hashlib
import hmac
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cdp.collector.primary import Primary
from cdp.collector.replicated import ReplicatedSpec

if TYPE_CHECKING:
    from cdp.collector.intent import IntentMap
    from cdp.collector.state import RollbackState
    from cdp.collector.upstream import Upstream
    from cdp.nbd.connection import Connection

Reason = dict[str, str]  # {"code", "text"}
# Codes of reasons: an upstream that is away, a primary that could not be synced.
UNREACHABLE, SYNC_FAILED = "primary_unreachable", "sync_failed"
# Of the first pass over a volume that held data, which passes over holes.
INITIAL_SYNC = "initial_sync"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VolumeSpec:
    """A volume as configured: `primary` is `file:PATH`, `nbd://…`, `nbd+unix://…` or `none`."""

    name: str
    primary: str
    size_bytes: int


@dataclass(frozen=True)
class GroupSpec:
    """A group as configured. `consumers` get the whole journal from its first record on; `replicated`: flushes wait for
    the journal's remote carrier too."""

    name: str
    volumes: list[VolumeSpec]
    replicated: ReplicatedSpec | None = None
    consumers: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Progress:
    """How far a pass over a whole volume has come, in bytes."""

    done_bytes: int
    total_bytes: int


@dataclass(slots=True, eq=False)
class Watch:
    """A region whose content an asynchronous primary was asked for: `touched` by a write journaled since."""

    start: int
    end: int
    touched: bool = False


@dataclass(slots=True, eq=False)
class Volume:
    """Owned by the loop's thread."""

    name: str
    id: int
    size: int
    primary: Primary
    refuse: int = 0  # errno for every write to this volume, 0: none
    reason: Reason | None = None  # why it is refused
    doubt: Reason | None = None  # why the primary may not be what was left; durable until a side is trusted
    sync: Reason | None = None  # why a whole-volume pass must be made; durable until that has ended
    in_gap: bool = False  # its last GAP record in the journal is open
    refused_ns: int = -(10**18)  # monotonic time of the last write that the primary refused
    storm: Reason | None = None  # why a gap is left open: it goes on refusing
    storm_seq: int = 0  # the first withheld seq of that gap
    lock: str | None = None  # SHA-256 of the secret that a rollback holds the volume with
    rollback: RollbackState | None = None  # what that rollback has journaled
    dirty: bool = False  # took something since its last sync began
    sync_failed: bool = False  # flushes fail until what it took since the checkpoint is written again
    cold_reads: int = 0  # under way in the pool
    progress: Progress | None = None
    upstream: Upstream | None = None  # of a primary that is not inline
    intent: IntentMap | None = None  # of one whose primary can be compared
    watches: list[Watch] = field(default_factory=list)
    connections: set[Connection] = field(default_factory=set)

    @property
    def state(self) -> str:
        """One of `stopped`, `rolling_back`, `syncing`, `resyncing`, `protected`."""
        if self.refuse:
            return "stopped"
        if self.lock is not None:
            return "rolling_back"
        if self.sync is not None:
            return "syncing" if self.sync["code"] == INITIAL_SYNC else "resyncing"
        return "protected"

    @property
    def due(self) -> Reason | None:
        """Why a start would have to compare the whole volume: a pass is due, or its gap is left open."""
        return self.sync or self.storm

    @property
    def withheld(self) -> Reason | None:
        """Why no point of this volume is offered now; None where one is."""
        if self.in_gap:
            return self.doubt or self.due or {"code": "gap", "text": f"{self.name} is in a gap."}
        rollback = self.rollback
        if rollback is not None and rollback["begin"] is not None and rollback["end"] is None:
            return {"code": "rollback", "text": f"A rollback of {self.name} is being copied."}
        return None

    def opens_with(self, secret: str) -> bool:
        """Whether `secret` is the one that holds the volume's rollback lock."""
        return self.lock is not None and hmac.compare_digest(self.lock, secret_hash(secret))

    def sync_went_wrong(self, error: BaseException) -> None:
        """Flushes fail until what the primary took since the checkpoint is written again and synced (promise 3)."""
        self.dirty = self.sync_failed = True
        if self.reason is not None and self.reason["code"] in (SYNC_FAILED, UNREACHABLE):
            return  # it is said, once; that it cannot be reached says more
        text = f"The primary of {self.name} could not be synced: {error}. What it took is written again."
        log.error("%s", text)
        self.reason = {"code": SYNC_FAILED, "text": text}

    def synced_again(self) -> None:
        """A sync succeeded: what was said of one that did not is over."""
        if self.reason is not None and self.reason["code"] == SYNC_FAILED:
            log.warning("volume %s: the primary is synced again", self.name)
            self.reason = None

    def figures(self) -> dict[str, Any]:
        """See Control in ARCHITECTURE.md."""
        progress = self.progress
        return {
            "id": self.id,
            "size": self.size,
            "state": self.state,
            "reason": self.reason or self.sync,
            "primary": self.primary.address,
            "clients": len(self.connections),
            "progress": progress
            and {"done_bytes": progress.done_bytes, "total_bytes": progress.total_bytes},
        }


def secret_hash(secret: str) -> str:
    """What is kept of a rollback's secret."""
    return hashlib.sha256(secret.encode()).hexdigest()
