"""The way of a bundle: appended to the undo log, synced, published, applied. In that order (promise 5).

While one bundle's undo is being synced by a worker, the next is planned and appended; never more than these two are
under way. The replica's own syncs and the committed position go through `Committer`, on another worker.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cdp import storage
from cdp.history.history import History
from cdp.journal.batch import Batch, Record
from cdp.replica import position as position_file
from cdp.replica.bundle import Bundle, Planner
from cdp.replica.course import Course
from cdp.replica.position import Position
from cdp.replica.replica import Replica, sync_files

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# The replica is synced when this much of it is dirty: production shares the disk, and a larger sync stalls it longer.
DIRTY_BYTES = 128 << 20


@dataclass(slots=True)
class Applied:
    """The newest record in the replica; always the last of its batch."""

    group_id: str
    seq: int
    crc: int
    epoch: int
    time_ns: int

    @classmethod
    def of(cls, batch: Batch) -> Applied:
        time_ns = batch.order_ns + batch.record_count - 1
        return cls(batch.group_id.hex(), batch.last_seq, batch.crc, batch.epoch, time_ns)


class Pipeline:
    """One for each group, on its apply thread. `insist(call, *arguments)` repeats a call that finds no space;
    `follow` takes the few records that change a volume's state, once they are applied."""

    def __init__(
        self,
        history: History,
        replica: Replica,
        planner: Planner,
        follow: Callable[[Record], None],
        applied: Applied,
        insist: Callable[..., Any],
        on_applied: Callable[[Applied], None],
    ) -> None:
        self._history, self._replica, self._planner, self._follow = history, replica, planner, follow
        self.applied = applied
        self._insist, self._on_applied = insist, on_applied
        self._worker = storage.Worker(1, "undo-sync")
        self._flying: tuple[Bundle, Any] | None = None
        self._synced = True
        self._failure: BaseException | None = None
        # Read and not applied: (order time of its first record, its bytes, its last seq); two bundles' batches.
        self._waiting: deque[tuple[int, int, int]] = deque()
        self.waiting_bytes = 0

    @property
    def idle(self) -> bool:
        return self._flying is None

    def next_time_ns(self) -> int | None:
        """Order time of the first record that was read and is not applied. From any thread."""
        try:
            return self._waiting[0][0]
        except IndexError:
            return None

    def push(self, batches: list[Batch], fast: bool) -> None:
        """Takes batches that continue what it has. All but the last bundle are applied when it returns. Raises
        CorruptionError, StorageError, OSError: then nothing more may be pushed."""
        for batch in batches:
            self._waiting.append((batch.order_ns, batch.batch_bytes, batch.last_seq))
            self.waiting_bytes += batch.batch_bytes
        for bundle in self._planner.plan(batches):
            pending = self._insist(self._history.append, bundle.batches, bundle.extents, fast)
            bundle.extents = []  # their buffers are used again from here
            before = self._flying
            if before is not None:
                self._wait()
            self._start_sync(bundle, pending)
            if before is not None:
                self._finish(*before)

    def settle(self) -> None:
        """Waits for what is under way and applies it."""
        if self._flying is not None:
            self._wait()
            bundle, pending = self._flying
            self._flying = None
            self._finish(bundle, pending)

    def _start_sync(self, bundle: Bundle, pending: Any) -> None:
        self._flying = (bundle, pending)
        self._synced = False
        self._worker.submit(self._on_synced, self._history.sync, pending)

    def _on_synced(self, _: object, error: BaseException | None) -> None:
        self._synced = True
        self._failure = error

    def _wait(self) -> None:
        while not self._synced:
            storage.wait_readable([self._worker.fileno()], None)
            self._worker.drain()
        if self._failure is not None:
            raise self._failure

    def _finish(self, bundle: Bundle, pending: Any) -> None:
        """Its undo is durable: visible first, then the replica changes."""
        self._insist(self._history.publish, pending)
        self._insist(self._apply, bundle)
        self._planner.settled(bundle)
        for record in bundle.followed:
            self._follow(record)
        if bundle.batches:
            self.applied = Applied.of(bundle.batches[-1])
            while self._waiting and self._waiting[0][2] <= self.applied.seq:
                self.waiting_bytes -= self._waiting.popleft()[1]
            self._on_applied(self.applied)

    def _apply(self, bundle: Bundle) -> None:
        files = self._replica.files
        for volume, blocks in bundle.results.items():
            files[volume].write_blocks(blocks)
        for volume, size in bundle.sizes.items():
            # The next bundle, already planned, may have made it longer again.
            files[volume].resize(max(size, self._planner.size(volume)))

    def close(self) -> None:
        """Ends the worker; what is under way is left as a crash would leave it."""
        self._worker.close()


class Committer:
    """Moves the committed position on: replica synced, position durable, then the journal is told. One at a time.

    A sync of the replica that failed is final: only a restart, which writes again what came after the committed seq,
    may go on. A position that could not be written is tried again with the next one.
    """

    def __init__(self, folder: str, replica: Replica, position: Position) -> None:
        self._folder, self._replica = folder, replica
        self.position = position
        self._worker = storage.Worker(1, "replica-sync")
        self._busy = False
        self._failure: BaseException | None = None
        self._last_ns = storage.monotonic_ns()

    def fileno(self) -> int:
        return self._worker.fileno()

    def age_seconds(self) -> float:
        """Since the last commit began."""
        return (storage.monotonic_ns() - self._last_ns) / 1e9

    @property
    def busy(self) -> bool:
        return self._busy

    def begin(self, applied: Applied, course: Course, unequal: list[tuple[int, int, int, int]]) -> None:
        """Commits what is applied now, unless one is under way: then the dirty bytes may double, and no more."""
        if self._busy and self._replica.dirty_bytes() >= DIRTY_BYTES:
            self.wait()
        if self._busy:
            return
        position = Position(
            applied.group_id, applied.seq, applied.crc, applied.epoch, applied.time_ns, list(self._replica.layout()),
            course.plain(), unequal, self.position.history, dict(self._replica.kept),
        )  # fmt: skip
        self._busy = True
        self._last_ns = storage.monotonic_ns()
        self._worker.submit(self._done, self._commit, self._replica.take_dirty(), position)

    def _commit(self, descriptors: list[int], position: Position) -> Position:
        sync_files(descriptors)
        try:
            position_file.store(self._folder, position)
        except OSError as e:
            if e.errno in NO_SPACE:
                return self.position
            raise
        return position

    def _done(self, position: Position | None, error: BaseException | None) -> None:
        self._busy = False
        if position is not None:
            self.position = position
        self._failure = error

    def check(self) -> int:
        """The committed seq; raises what a commit raised on the worker."""
        self._worker.drain()
        if self._failure is not None:
            raise self._failure
        return self.position.seq

    def wait(self) -> int:
        """As `check`, when none is under way any more."""
        while self._busy:
            storage.wait_readable([self._worker.fileno()], None)
            self._worker.drain()
        return self.check()

    def close(self) -> None:
        self._worker.close()
