"""What a group says of itself: see Control in ARCHITECTURE.md."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from cdp.errors import StorageError
from cdp.journal import consumers

if TYPE_CHECKING:
    from cdp.collector.group import Group


def figures_of(group: Group) -> dict[str, Any]:
    """Plain data, made anew. On the loop's thread."""
    journal, reason = group.journal, group.reason
    late = group.replicated.reason if group.replicated else None
    if reason is None and group.state == "stopped":
        reason = next(v.reason for v in group.volumes if v.refuse)
    return {
        "state": group.state,
        "reason": reason or next((v.reason or v.sync for v in group.volumes if v.reason or v.sync), None) or late,
        "replicated": group.replicated.figures() if group.replicated else None,
        "epoch": group.epoch,
        "journal": {
            "first_seq": journal.first_seq,
            "last_seq": journal.last_seq,
            "durable_seq": journal.durable_seq,
            "bytes": journal.bytes,
        },
        "last_time_ns": journal.order_ns,
        "consumers": _consumers(group),
        "volumes": {v.name: v.figures() for v in group.volumes},
    }


def _consumers(group: Group) -> dict[str, int]:
    with contextlib.suppress(OSError, StorageError):  # `release` logs what is wrong with them
        return consumers.positions(f"{group.folder}/journal")
    return {}
