"""Rollback: the steps that put volumes back to a point, as a job that survives its process.

lock → begin → wait → copy → prove → end → unlock. Before each step the job's file says so durably, and each step can
be done again, so a job that was killed anywhere goes on where it was. Nothing is destroyed: the copying is journaled
like any write, behind the bookmark that BEGIN is; an undo copies BEGIN's content back in the same way.

While it runs, processes it talks to may be started again: it waits for them and goes on, for as long as it has
patience. What is refused for good ends it with its file in place, to be resumed, undone or abandoned.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cdp import storage
from cdp.errors import CdpError, NotFoundError, RefusedError, StorageError, UnreachableError
from cdp.nbd.client import Client
from cdp.recovery import job as jobs
from cdp.recovery.control import Commands, Control
from cdp.recovery.copying import Copier, check_size, measure, near, ranges
from cdp.recovery.job import ABANDON, BEGIN, COPY, DONE, END, FORWARD, LOCK, PROVE, UNDO, UNLOCK, WAIT, Job
from cdp.recovery.verifying import GAP_BYTES, Proven, Verifying

# A machine that restarts is back within this time; after it a person should look.
PATIENCE_SECONDS = 600.0
# How long a replayer that answers may take to reach BEGIN: its lag, which nothing bounds but this.
LAG_SECONDS = 6 * 3600.0
# Between attempts, longer each time nothing new came of one: each may write again what the one before wrote.
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 30.0
# Bytes after which the copy is flushed and its progress kept: what a resume may have to copy again.
CHECKPOINT_BYTES = 256 << 20


@dataclass(frozen=True)
class Progress:
    """Where a job is; bytes are of the step's volume."""

    step: str
    direction: str
    volume: str | None
    done_bytes: int
    total_bytes: int


class Stopped(Exception):
    """The process was asked to end; the job goes on in the next one."""


class Rollback:
    """Runs one job. Only one process can: the file's lock is held from here to `close`."""

    def __init__(
        self,
        path: str,
        job: Job | None,
        control: Control,
        collector_address: str,
        replayer_address: str,
        progress: Callable[[Progress], None] = lambda _: None,
        patience_seconds: float = PATIENCE_SECONDS,
        lock_seconds: float = 0.0,
    ) -> None:
        """`job` None: the one in the file, as whoever had it before left it; `lock_seconds`: how long to wait for that.
        Raises RefusedError (`locked`), NotFoundError, StorageError."""
        self._path = path
        self._lock = storage.lock_file(path + ".lock", lock_seconds, f"The rollback {path}")
        try:
            self.job = job = jobs.load(path) if job is None else job
        except CdpError:
            self.close()
            raise
        self._commands = Commands(control)
        self._collector, self._replayer = collector_address, replayer_address
        self._progress = progress
        self._patience_ns = int(patience_seconds * 1e9)
        self._last_ok_ns = storage.monotonic_ns()
        self._stop = threading.Event()
        self._attached = False
        self._copied_again = False
        # By volume, of what this run copied. Forgotten at any error: who was away meanwhile may have lost what was
        # not durable yet.
        self._proven: dict[str, Proven] = {}
        self._furthest = (-1, 0, 0)
        self._may_have_begun = job.step == BEGIN and job.begin is None
        self._steps: dict[str, Callable[[], str]] = {
            LOCK: self._lock_volumes, BEGIN: self._begin, WAIT: self._wait, COPY: self._copy, PROVE: self._prove,
            END: self._end, UNLOCK: self._unlock,
        }  # fmt: skip

    def close(self) -> None:
        """Lets the file go; idempotent."""
        if self._lock >= 0:
            storage.close(self._lock)
            self._lock = -1

    def stop(self) -> None:
        """From another thread or a signal's handler: `run` ends with Stopped at the next occasion."""
        self._stop.set()

    # --- what a person can want

    def run(self) -> Job:
        """Goes on from wherever the job is, to its end. Raises CdpError, Stopped."""
        self._last_ok_ns, saved = storage.monotonic_ns(), False
        while self.job.active:
            try:
                if not saved:
                    self._save()
                    saved = True
                if not self._attached and self.job.step in (BEGIN, WAIT, COPY, PROVE):
                    self._attach()
                self._enter(self._steps[self.job.step]())
            except (CdpError, OSError) as e:
                self._attached = False
                self._proven.clear()
                self._note(e)
                if isinstance(e, CdpError) and not self._may_pass(e):
                    self._release_if_not_begun(e)
                    raise
                waited_ns = storage.monotonic_ns() - self._last_ok_ns
                if waited_ns > self._patience_ns:
                    raise self._given_up(e) from e
                self._pause(min(max(RETRY_SECONDS, waited_ns / 2e9), MAX_RETRY_SECONDS))
        return self.job

    def _may_pass(self, error: CdpError) -> bool:
        """What ends when processes run again or a disk has room; before the lock nobody waits for that."""
        return isinstance(error, UnreachableError) or (error.code == "stopped" and self.job.step != LOCK)

    def undo(self) -> Job:
        """Puts back what was there at BEGIN. Once the rollback is proven it is ended, then RefusedError."""
        self._interrupt(UNDO)
        return self.run()

    def abandon(self) -> Job:
        """Unlocks the volumes as they are, without the replayer; points from END on are marked so."""
        self._interrupt(ABANDON)
        return self.run()

    def _interrupt(self, direction: str) -> None:
        job = self.job
        if job.direction == direction:
            return
        if job.step in (END, UNLOCK, DONE):
            self.run()  # who was at it may have been stopped for this, with the volumes locked
            hint = f"Roll back to {job.begin['bookmark']} for the state before it." if job.begin else ""
            raise RefusedError(f"The rollback of {job.group} is over.", hint, code="busy")
        if job.step == LOCK:
            job.direction = direction
            self._enter(UNLOCK)  # nothing was written, perhaps nothing locked
            return
        if job.begin is None:
            # The collector knows the BEGIN of a lock's holder too; for an abandon nobody else may be there to ask.
            self._may_have_begun = self._may_have_begun and direction != ABANDON
            self._learn_begin()
        job.direction = direction
        job.bytes, job.extents, job.copied_to = {}, {}, {}
        self._attached = False
        self._enter(END if direction == ABANDON else WAIT)

    # --- the steps; each returns the next one

    def _lock_volumes(self) -> str:
        self._commands.wait(self.job.group, self.job.target_seq, 0.0)  # nobody is cut off for an absent replayer
        for volume in self.job.volumes:
            check_size(self._replayer, volume, self.job.target_seq)
        self._commands.lock(self.job.volumes, self.job.secret, self.job.disconnect)
        for volume in self.job.volumes:
            with Client.connect(self._collector, f"{volume}!{self.job.secret}") as client:
                client.flush()
        return BEGIN

    def _attach(self) -> None:
        """What a process of the appliance may have forgotten in a restart, and what a killed job may still hold."""
        if self.job.begin is not None:
            self._wait_applied(int(self.job.begin["seq"]))  # a killed replayer goes back a little first
        self._commands.pin(self.job.group, self.job.source_seq, self.job.name)
        self._commands.lock(self.job.volumes, self.job.secret, True)
        if self.job.direction == UNDO:
            # What an undo copies is the difference to BEGIN of everything that was written until now.
            self._wait_applied(self._fence())
        self._attached = True

    def _begin(self) -> str:
        self._learn_begin()
        return WAIT

    def _learn_begin(self) -> None:
        """BEGIN, once: whoever died between its record and the job's file has left it in the journal."""
        job = self.job
        if self._may_have_begun:
            self._wait_applied(self._fence())
            job.begin = self._commands.open_rollback(job.volumes[0])
        if job.begin is None:
            self._may_have_begun = True
            job.begin = self._commands.begin(job.group, job.volumes, job.secret, job.target_seq, job.target_time_ns)

    def _fence(self) -> int:
        """A seq behind everything that was written to the volumes before."""
        return max(self._commands.fence(volume) for volume in self.job.volumes)

    def _wait(self) -> str:
        assert self.job.begin is not None
        self._wait_applied(int(self.job.begin["seq"]))
        return COPY

    def _wait_applied(self, seq: int) -> None:
        start_ns = storage.monotonic_ns()
        while not self._commands.wait(self.job.group, seq):
            self._check_stop()
            if storage.monotonic_ns() - start_ns > LAG_SECONDS * 1e9:
                raise StorageError(
                    f"The replayer has not reached seq {seq} of {self.job.group}.",
                    "See `cdp status`; resume, undo or abandon the rollback.",
                )

    def _copy(self) -> str:
        """Copies, and compares and verifies each piece while later ones are copied."""
        self._proven.clear()
        for volume in self.job.volumes:
            with self._copier(volume) as copier:
                self.job.bytes[volume], self.job.extents[volume] = measure(copier.changes)
                start = self.job.copied_to.get(volume, 0)
                with Verifying(partial(self._commands.verify, volume)) as verifying:
                    for copied_to in copier.copy(start, CHECKPOINT_BYTES, self._on_bytes(volume), verifying.add):
                        self.job.copied_to[volume] = copied_to
                        self._save()
                    self._proven[volume] = Proven(start, copier.unequal, verifying.finish())
        return PROVE

    def _prove(self) -> str:
        """When this ends every changed block of the primary has been compared with the point, and verified in-band
        against the replica: what this run copied was already, the rest is now; then the replica's verdict."""
        for volume in self.job.volumes:
            with self._copier(volume) as copier:
                proven = self._proven.get(volume) or Proven(copier.source.size, [], None)
                unequal = proven.unequal + copier.compare(self._on_bytes(volume), proven.start)
                self._on_bytes(volume)(self.job.bytes.get(volume, 0))
                rest = near(ranges(copier.changes, 0, proven.start), GAP_BYTES)
                taken = [t for t in (proven.taken, self._commands.verify(volume, rest)) if t is not None]
            if taken:
                first, last = taken[0][0], taken[-1][1]
                self._wait_applied(last)
                unequal += self._commands.mismatches(volume, first, last)
            if unequal:
                return self._not_equal(volume, unequal)
        return END

    def _not_equal(self, volume: str, unequal: list[tuple[int, int]]) -> str:
        """Once, what differs is copied again (a collector healed regions meanwhile); then it is an error."""
        if self._copied_again:
            total = sum(length for _, length in unequal)
            raise StorageError(
                f"{volume} is not what it was at seq {self.job.source_seq}: {total:,} bytes differ, the first at "
                f"{unequal[0][0]}.",
                "Resume the rollback to copy them again, or undo it.",
                code="not_equal",
            )
        self._copied_again = True
        self.job.copied_to = {}
        return COPY

    def _end(self) -> str:
        job = self.job
        assert job.begin is not None
        abandoned = job.direction == ABANDON
        job.end = self._commands.end(job.group, job.volumes, job.secret, int(job.begin["seq"]), abandoned)
        return UNLOCK

    def _unlock(self) -> str:
        self._commands.unlock(self.job.volumes, self.job.secret)
        self._commands.unpin(self.job.name)
        self.job.error = None
        return DONE

    # --- helpers

    def _copier(self, volume: str) -> Copier:
        job = self.job
        return Copier(self._replayer, f"{volume}@seq:{job.source_seq}", self._collector, f"{volume}!{job.secret}")

    def _on_bytes(self, volume: str) -> Callable[[int], None]:
        def report(done_bytes: int) -> None:
            self._report(volume, done_bytes)
            self._check_stop()

        return report

    def _report(self, volume: str | None, done_bytes: int) -> None:
        """Patience begins anew with a step, and in it with what no attempt before had reached."""
        mark = (self.job.volumes.index(volume), self.job.copied_to.get(volume, 0), done_bytes) if volume else (-1, 0, 0)
        if volume is None or mark > self._furthest:
            self._furthest, self._last_ok_ns = mark, storage.monotonic_ns()
        total = self.job.bytes.get(volume, 0) if volume else 0
        self._progress(Progress(self.job.step, self.job.direction, volume, done_bytes, total))

    def _enter(self, step: str) -> None:
        self.job.step = step
        self._save()
        self._report(None, 0)

    def _save(self) -> None:
        jobs.save(self._path, self.job)

    def _note(self, error: Exception) -> None:
        self.job.error = str(error)
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is being told
            self._save()

    def _release_if_not_begun(self, error: CdpError) -> None:
        """Refused before anything was written: the volumes are given back at once."""
        if self.job.step not in (LOCK, BEGIN) or self.job.begin is not None or self.job.direction != FORWARD:
            return
        if isinstance(error, RefusedError | NotFoundError):
            self._commands.unlock(self.job.volumes, self.job.secret)  # at LOCK too: a run that was killed may hold it
            self._commands.unpin(self.job.name)
            self._enter(DONE)

    def _given_up(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"The rollback of {self.job.group} waits at step {self.job.step!r}: {error}",
            "When the appliance runs again it goes on (`--resume`); `--undo` and `--abandon` end it.",
        )

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self._check_stop()
