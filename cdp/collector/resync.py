"""Whole-volume passes: the initial sync of a volume that held data, and the comparison when primary and journal may
differ (an unclean start of the machine, a decision of whom to trust, `resync`).

Clients are served meanwhile. GAP OPEN comes first; then the primary's content as SYNC records between the clients'
writes; then the GAP that ends it. What is to be done is durable, so a kill starts it over.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from cdp import storage
from cdp.collector.refused import gap_open, sync_records
from cdp.collector.sweep import Sweep
from cdp.collector.tracking import TRACKING
from cdp.collector.volume import INITIAL_SYNC, Progress, Reason, Volume
from cdp.errors import StorageError
from cdp.journal import batch

if TYPE_CHECKING:
    from cdp.collector.group import Group

log = logging.getLogger(__name__)

UNCLEAN_RESTART = "unclean_restart"
# Passes over what the intent map names; the others are over all of a volume.
BY_REGIONS = (UNCLEAN_RESTART, TRACKING)
# A pass whose primary could not be read is tried again.
RETRY_SECONDS = 1.0


class Resyncs:
    """The passes of one group, one at a time: two would only share the disk."""

    def __init__(self, group: Group, worker: storage.Worker) -> None:
        self._group, self._worker = group, worker
        self._queue: deque[tuple[Volume, int]] = deque()  # volume, the seq its gap begins at
        self._running: Sweep | None = None

    def start(self, volume: Volume, reason: Reason, from_seq: int = 0) -> bool:
        """Journals the gap and queues the pass; False when the group stopped instead. Does nothing if one is due."""
        if volume.sync is not None and not from_seq:
            return True
        try:
            seq = self._group.append([gap_open(volume, reason, from_seq)])
        except StorageError:
            return False
        volume.in_gap = True
        volume.sync = reason
        self._group.save_state()
        self.go_on(volume, from_seq or seq)
        return True

    def go_on(self, volume: Volume, from_seq: int) -> None:
        """Queues the pass of a volume whose gap is in the journal."""
        volume.progress = volume.progress or Progress(0, volume.size)
        due = [seq for other, seq in self._queue if other is volume]
        if due:  # one pass behind the one that runs is enough, whatever was asked for how often
            self._queue.remove((volume, due[0]))
        self._queue.append((volume, min([from_seq, *due])))
        self._run_next()

    def cancel(self) -> None:
        """The process stops; the next start begins anew."""
        self._queue.clear()
        if self._running is not None:
            self._running.cancel()

    def _run_next(self) -> None:
        if self._running is not None or not self._queue:
            return
        volume, from_seq = self._queue.popleft()
        assert volume.sync is not None
        group, skip_holes = self._group, volume.sync["code"] == INITIAL_SYNC
        regions = [(0, volume.size)]
        if volume.sync["code"] in BY_REGIONS and volume.intent is not None:
            regions = volume.intent.touched()
        volume.progress = Progress(0, sum(length for _, length in regions))
        zeros_are_known = skip_holes and volume.primary.inline

        def data(offset: int, content: bytes) -> bool:
            return group.try_append(sync_records(volume.id, offset, content))

        def hole(offset: int, length: int) -> bool:
            return zeros_are_known or group.try_append(
                [(batch.SYNC, batch.ZEROS, volume.id, offset, length, b"")]
            )

        self._running = Sweep(
            group, volume, self._worker, regions, data, hole,
            lambda error: self._swept(volume, from_seq, error),
        )  # fmt: skip
        log.info("volume %s: %s begins", volume.name, volume.sync["code"])
        self._running.start()

    def _swept(self, volume: Volume, from_seq: int, error: StorageError | None) -> None:
        self._running = None
        if error is None and any(other is volume for other, _ in self._queue):
            return self._run_next()  # something was refused meanwhile: the later pass ends both gaps
        if error is None:
            end = (batch.GAP, 0, volume.id, from_seq, 0, json.dumps(volume.sync).encode())
            if self._group.try_append([end]):
                volume.in_gap = False
                self._group.flusher.wait(None, lambda failed: self._ended(volume, failed))
                self._group.flusher.kick()
                return self._run_next()
        log.error("volume %s: the pass is tried again: %s", volume.name, error or "its end cannot be journaled")
        retry: Callable[[], None] = lambda: self.go_on(volume, from_seq)  # noqa: E731
        self._worker.submit(lambda _, __: retry(), storage.pause, RETRY_SECONDS)

    def _ended(self, volume: Volume, failed: OSError | None) -> None:
        if failed is not None or any(other is volume for other, _ in self._queue):
            return  # the next start, or the pass that is queued, does it
        log.info("volume %s: in sync", volume.name)
        volume.sync = volume.progress = None
        self._group.save_state()
