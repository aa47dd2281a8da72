"""The apply thread of one group: reads durable batches, checks that they continue the one history, hands them on.

Batches go to the pipeline; about once a second the thread commits, applies retention and looks at its lag. Whatever
ends it shows as a state with a reason (promise 4: `forked`, holes and older incarnations are states, not crashes);
lack of space does not end it: the very call that found none is repeated at a bounded pace.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cdp import storage
from cdp.errors import CdpError, ForkedError, StorageError
from cdp.history.history import History
from cdp.journal.batch import GAP, OPEN, Batch, Record
from cdp.journal.chain import Chain
from cdp.journal.reader import JournalReader
from cdp.replica import restart
from cdp.replica.bundle import Planner
from cdp.replica.course import Course, Reason, reason
from cdp.replica.lag import Lag
from cdp.replica.leftovers import Leftovers
from cdp.replica.pins import Pins
from cdp.replica.pipeline import DIRTY_BYTES, NO_SPACE, Applied, Committer, Pipeline
from cdp.replica.position import Position
from cdp.replica.replica import Replica
from cdp.replica.verify import Verifier

log = logging.getLogger(__name__)

# Read from the journal at once, and so about what one sync of the undo log covers: enough to hide the sync behind
# the planning of the next, little enough that two bundles in flight are small.
READ_BYTES = 4 << 20
# A trickle is gathered for this long before it is synced: production's own syncs share the disk.
GATHER_SECONDS = 0.02
TICK_SECONDS = 1.0
# With nothing but heartbeats the position moves on this often; each time costs three small syncs.
IDLE_COMMIT_SECONDS = 10.0
# Between two attempts of what found no space or no journal.
RETRY_SECONDS = 1.0

ReaderOf = Callable[[int], JournalReader]


class _Stopping(Exception):
    """`stop` was called while a call was being repeated."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a group's replay is told. `window_*` None: not limited by that."""

    folder: str
    group: str
    reader_of: ReaderOf
    window_ns: int | None
    window_bytes: int | None
    segment_bytes: int
    compress: bool


class ApplyThread:
    """One life of a group's replay. Other threads read its attributes; `condition` is notified when `applied`,
    `failed`, `stalled` or the window's oldest point changes."""

    def __init__(self, settings: Settings, pins: Pins) -> None:
        self._settings, self._pins = settings, pins
        self.group = settings.group
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = False
        self._opened = threading.Event()
        self.condition = threading.Condition()
        self.failed: tuple[str, Reason] | None = None
        self.stalled: Reason | None = None
        self.history: History | None = None
        self.replica: Replica | None = None
        self.pipeline: Pipeline | None = None
        self.committer: Committer | None = None
        self._leftovers: Leftovers | None = None
        self._reader: JournalReader | None = None
        self._acknowledged = 0
        self.course, self.verifier, self.lag = Course(), Verifier(), Lag()
        self.window_short = False
        self.applied = Applied("", 0, 0, 0, 0)
        self._thread = threading.Thread(target=self._run, name=f"replayer-{self.group}", daemon=True)

    def start(self) -> None:
        """Returns when the replica is at its committed seq, or when that failed or waits for something."""
        self._thread.start()
        self._opened.wait()

    def stop(self) -> None:
        """Applies what was read, commits, and lets go of everything; after a failure it only lets go."""
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for part in (self._leftovers, self.pipeline, self.committer, self._reader, self.history, self.replica):
            if part is not None:
                part.close()
        self._leftovers = self.pipeline = self.committer = self._reader = self.history = self.replica = None
        os.close(self._wake)
        with self.condition:
            self.failed = self.failed or ("stopped", reason("stopped", f"Replay of {self.group} was stopped."))
            self.condition.notify_all()

    def _run(self) -> None:
        try:
            self._insist(self._open)
            self._opened.set()
            self._follow()
        except _Stopping:
            pass
        except ForkedError as e:
            self._fail("forked", e)
        except BaseException as e:  # nothing may end this thread unseen
            self._fail("stopped", e)
        finally:
            self._opened.set()

    def _fail(self, state: str, error: BaseException) -> None:
        if isinstance(error, CdpError):
            found = reason(error.code, str(error))
        elif isinstance(error, OSError):
            text = f"Replay of {self.group} stopped: {error}. Check the disk, then restart the replayer."
            found = reason("storage", text)
        else:
            found = reason("internal", f"Replay of {self.group} stopped: {type(error).__name__}: {error}.")
        log.error("group %s is %s: %s", self.group, state, found["text"], exc_info=error)
        with self.condition:
            self.failed = (state, found)
            self.condition.notify_all()

    def _open(self) -> None:
        s = self._settings
        position = restart.open_position(s.folder)
        replica, history, _ = restart.open_group(s.folder, position, s.segment_bytes, s.compress)
        self._leftovers = Leftovers(restart.old_histories(s.folder, position.history))
        self.replica, self.history = replica, history
        self.course, self.verifier = Course(position.course), Verifier(position.unequal)
        self.applied = Applied(position.group_id, position.seq, position.crc, position.epoch, position.time_ns)
        self._chain = self._chain_at(position, history)
        history.applied_seq = position.seq
        self.committer = Committer(self._settings.folder, replica, position)
        planner = Planner(replica, self.verifier.check)
        self.pipeline = Pipeline(
            history, replica, planner, self._follow_record, self.applied, self._insist, self._on_applied
        )

    def _follow_record(self, record: Record) -> None:
        self.course.follow(record)
        if record.kind == GAP and not record.flags & OPEN:
            self.verifier.forget(record.volume, record.seq)

    @staticmethod
    def _chain_at(position: Position, history: History) -> Chain | None:
        """None: the first batch behind a reset says what it continues."""
        if position.seq and not position.group_id:
            return None
        group_id = bytes.fromhex(position.group_id)
        return Chain(group_id, position.seq, position.crc, position.epoch, history.incarnations)

    def _insist(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result; while there is no space, or what it needs is away, it is repeated."""
        while True:
            try:
                result = call(*arguments)
            except OSError as e:
                if e.errno not in NO_SPACE:
                    raise
                self._make_space()
                self._stall(reason("no_space", f"There is no space for replay of {self.group}: {e}."))
            except CdpError as e:
                if not e.retriable:
                    raise
                self._stall(reason(e.code, str(e)))
            else:
                if self.stalled is not None:
                    self._set_stalled(None)
                return result

    def _stall(self, why: Reason) -> None:
        if self.stalled is None:
            log.warning("group %s: %s", self.group, why["text"])
        self._set_stalled(why)
        self._opened.set()
        self._pause(RETRY_SECONDS)
        if self._stop:
            raise _Stopping

    def _make_space(self) -> None:
        """What has left the window goes, and its files with it; that needs a little space itself, or is tried again."""
        with contextlib.suppress(OSError):
            self._retain()
        with contextlib.suppress(OSError):
            if self.history is not None:
                self.history.log.give_back()

    def _set_stalled(self, why: Reason | None) -> None:
        with self.condition:
            self.stalled = why
            self.condition.notify_all()

    def _pause(self, seconds: float, *descriptors: int) -> None:
        """Until `stop`, or one of the descriptors is readable, at most so long."""
        storage.wait_readable([self._wake, *descriptors], max(0.0, seconds))

    def _open_reader(self) -> JournalReader:
        try:
            return self._settings.reader_of(self.applied.seq)
        except (FileNotFoundError, ConnectionError) as e:
            raise _no_journal(self.group, e) from e

    def _follow(self) -> None:
        self._reader = reader = self._insist(self._open_reader)
        pipeline, committer = self.pipeline, self.committer
        assert pipeline is not None and committer is not None
        tick_ns = storage.monotonic_ns()
        while not self._stop:
            batches = self._checked(self._insist(reader.read, READ_BYTES))
            size = sum(b.batch_bytes for b in batches)
            if batches:
                self.lag.read(batches[-1].last_seq, size, sum(b.record_count for b in batches))
                pipeline.push(batches, self.lag.fast)
            else:
                pipeline.settle()
            self._commit_if_due(committer, pipeline)
            until_tick = TICK_SECONDS - (storage.monotonic_ns() - tick_ns) / 1e9
            if until_tick <= 0:
                self._tick(reader, pipeline)
                tick_ns = storage.monotonic_ns()
            elif not batches:
                self._pause(until_tick, reader.fileno(), committer.fileno())
                reader.drain()
            elif size < READ_BYTES // 4:
                pipeline.settle()
                self._pause(GATHER_SECONDS)
        self._finish(reader, pipeline, committer)

    def _checked(self, batches: list[Batch]) -> list[Batch]:
        """Those to apply; duplicates dropped."""
        if self._chain is None:  # a carrier may say again what lies before
            batches = [b for b in batches if b.last_seq > self.applied.seq]
        if self._chain is None and batches:
            first = batches[0]
            if first.first_seq != self.applied.seq + 1:
                raise StorageError(
                    f"The journal of {self.group} goes on at seq {first.first_seq}, not behind {self.applied.seq}.",
                    "Reset the history again, behind the journal's first seq.",
                    code="hole",
                )
            self._chain = Chain(b"", self.applied.seq, first.prev_crc)
        return [b for b in batches if self._chain is not None and self._chain.check(b)]

    def _on_applied(self, applied: Applied) -> None:
        if self.history is not None:
            self.history.applied_seq = applied.seq
        with self.condition:
            self.applied = applied
            self.condition.notify_all()

    def _commit_if_due(self, committer: Committer, pipeline: Pipeline) -> None:
        committed_seq = committer.check()
        assert self.replica is not None
        if committed_seq > self._acknowledged:
            self._acknowledge(committed_seq)
        if pipeline.applied.seq == committed_seq:
            return
        dirty = self.replica.dirty_bytes()
        age = committer.age_seconds()
        if dirty >= DIRTY_BYTES or age >= (TICK_SECONDS if dirty else IDLE_COMMIT_SECONDS):
            committer.begin(pipeline.applied, self.course, self.verifier.plain())

    def _acknowledge(self, seq: int) -> None:
        if self._reader is not None:
            self._insist(self._reader.acknowledge, seq)
            self._acknowledged = seq

    def _tick(self, reader: JournalReader, pipeline: Pipeline) -> None:
        self.lag.look(reader.end()[0], pipeline.waiting_bytes)
        self._insist(self._retain)

    def _retain(self) -> None:
        """Drops what has left the window. Raises OSError."""
        pipeline, committer = self.pipeline, self.committer
        if pipeline is None or committer is None or self.history is None:
            return  # not opened yet
        s = self._settings
        # What is above the committed seq is what a restart puts the replica back with: no window may take it.
        # An unfinished rollback needs its target although the pins of its process may have ended.
        targets = self.history.timeline.unfinished_targets()
        pins, still = [*targets, committer.position.seq], self._pins.still()
        kept = self.history.retain(s.window_ns, s.window_bytes, pins, pipeline.applied.time_ns, still)
        self.window_short = kept.short
        if kept.dropped:
            with self.condition:
                self.condition.notify_all()

    def _finish(self, reader: JournalReader, pipeline: Pipeline, committer: Committer) -> None:
        """A clean stop: the replica is the newest applied state, by itself."""
        pipeline.settle()
        committer.wait()
        if pipeline.applied.seq != committer.position.seq:
            committer.begin(pipeline.applied, self.course, self.verifier.plain())
        self._acknowledge(committer.wait())


def _no_journal(group: str, error: OSError) -> CdpError:
    text = f"The journal of {group} cannot be reached: {error}."
    found = StorageError(text, "Start the collector.", code="no_journal")
    found.retriable = True
    return found
