"""Segment files that wait for their use: freed ones are recycled, new ones allocated, on a worker's thread.

A recycled file keeps its blocks, so that a sync of what is written into it need not sync the file system's own
journal. Before it is written again it has lost its name and its header page, durably: an earlier life is never met.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from threading import Event
from typing import NamedTuple

from cdp import storage
from cdp.errors import JournalFullError, StorageError
from cdp.journal.segment import HEADER_PAGE_BYTES

PREFIX = "spare-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Two rolls may follow each other sooner than the worker gets to prepare one.
READY = 2
# Files kept for later beyond those ready: what a consumer that acknowledges now and then frees at once is used up
# again soon, and a sync in a new file costs twice one in a recycled file; more is given back to the file system.
KEEP = 4
# So much of the journal's largest size may be such files: a burst's worth, of space that the journal may use anyway.
KEEP_SHARE = 8
# A new file is filled with zeros where segments last longer than this: its blocks are then written ones, and a sync
# need not sync the file system's journal. Where they are used up sooner the disk has no time for writing twice.
QUIET_NS = 1_000_000_000
# Zeros are written in such pieces: what one write brings into the page cache is one folio, and small writes into a
# large one are dear.
_ZEROS = bytes(64 << 10)
# A roll without a spare waits for the worker's, if the journal may not grow: longer than any disk takes for two syncs.
WAIT_SECONDS = 10.0


class Spare(NamedTuple):
    path: str
    fd: int


class Spares:
    """Owned by the writer's thread; only the call that `job` returns runs on another one."""

    def __init__(self, folder: str, segment_bytes: int, max_bytes: int) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._max_bytes = max_bytes
        self._keep = max(KEEP, max_bytes // KEEP_SHARE // segment_bytes)
        self._taken_ns = storage.monotonic_ns()
        self._ready: deque[Spare] = deque()
        self._idle: deque[str] = deque()  # paths of freed segments and of files left over by an earlier life
        self._made: deque[Spare] = deque()  # from the worker
        self._in_job = 0
        self._job_done = Event()
        self._job_done.set()
        left = [f"{folder}/{name}" for name in sorted(storage.listdir(folder)) if name.startswith(PREFIX)]
        self._idle.extend(left)

    @property
    def bytes(self) -> int:
        """Space of all spares, those at work on the worker included."""
        self._collect()
        return (len(self._ready) + len(self._idle) + self._in_job) * self._segment_bytes

    @property
    def ready(self) -> bool:
        """Whether the next roll has its file already."""
        self._collect()
        return bool(self._ready)

    def give(self, path: str) -> None:
        """A segment that nobody needs any more: its name goes at once (durably before it is written again)."""
        spare = f"{self._folder}/{PREFIX}{storage.random_bytes(8).hex()}"
        storage.rename(path, spare)
        self._idle.append(spare)

    def give_back(self, spare: Spare) -> None:
        """A spare that was taken and could not be used."""
        self._ready.appendleft(spare)

    def drop(self, spare: Spare) -> None:
        """A file that was made and could not be used is removed."""
        storage.close(spare.fd)
        if storage.exists(spare.path):
            storage.unlink(spare.path)

    def new(self, size: int) -> Spare:
        """A new file of its own size; on a full disk the files kept for later make room for it.

        Raises JournalFullError (the disk), OSError.
        """
        while True:
            try:
                return self._make(None, size)
            except JournalFullError:
                if not self._remove_one():
                    raise

    def take(self, live_bytes: int) -> Spare:
        """A file for the next segment. Raises JournalFullError, OSError."""
        self._collect()
        self._taken_ns = storage.monotonic_ns()
        if self._ready:
            return self._ready.popleft()
        if self._idle:
            return self._make(self._idle.popleft())
        if not self._may_grow(live_bytes):
            if not self._in_job or not self._job_done.wait(WAIT_SECONDS) or not self._made:
                raise self.full()
            self._collect()
            return self._ready.popleft()
        return self._make(None)

    def take_larger(self, live_bytes: int, size: int) -> Spare:
        """A new file for one batch that no segment holds. Raises StorageError when the journal is too small for such
        batches at all, JournalFullError, OSError."""
        if 2 * size > self._max_bytes:
            raise StorageError(
                f"A batch of {size} bytes does not fit into a journal of at most {self._max_bytes}.",
                "Raise journal.max_size.",
            )
        while live_bytes + self.bytes + size > self._max_bytes:  # files kept for later must not keep it out
            if not self._remove_one():
                raise self.full()
        return self._make(None, size)

    def _remove_one(self) -> bool:
        """One file less that was kept for later; False if there is none."""
        if self._idle:
            storage.unlink(self._idle.popleft())
        elif self._ready:
            self.drop(self._ready.popleft())
        else:
            return False
        return True

    def job(self, live_bytes: int) -> Callable[[], None] | None:
        """What a worker should do now, if anything; one at a time. What it raises (OSError, JournalFullError) may
        be ignored: the roll that finds no spare tries itself and says so."""
        self._collect()
        if not self._job_done.is_set():
            return None
        wanted: list[str | None] = []
        while len(self._ready) + len(wanted) < READY and self._idle:
            wanted.append(self._idle.popleft())
        if not self._ready and not wanted and self._may_grow(live_bytes):
            wanted.append(None)
        surplus = [self._idle.popleft() for _ in range(len(self._idle) - self._keep)]
        if not wanted and not surplus:
            return None
        self._in_job = len(wanted)
        self._job_done.clear()
        quiet = storage.monotonic_ns() - self._taken_ns >= QUIET_NS
        return lambda: self._run(wanted, surplus, quiet)

    def full(self) -> JournalFullError:
        return JournalFullError(
            f"The journal {self._folder} has reached its largest size of {self._max_bytes} bytes.",
            "A consumer is behind or gone: see `cdp consumer list`, or raise journal.max_size.",
        )

    def close(self) -> None:
        """Waits for the worker's job; the files stay for the next life."""
        self._job_done.wait(WAIT_SECONDS)
        self._collect()
        for spare in self._ready:
            storage.close(spare.fd)
        self._ready.clear()

    def _may_grow(self, live_bytes: int) -> bool:
        return live_bytes + self.bytes + self._segment_bytes <= self._max_bytes

    def _collect(self) -> None:
        done = self._job_done.is_set()  # before the look at what it made
        while self._made:
            self._ready.append(self._made.popleft())
            self._in_job -= 1
        if done:
            self._in_job = 0  # what the job could not make is gone or will be found by the next start

    def _run(self, wanted: list[str | None], surplus: list[str], quiet: bool) -> None:
        try:
            for path in surplus:
                storage.unlink(path)
            for old in wanted:
                self._made.append(self._make(old, zeroed=quiet))
        finally:
            self._job_done.set()

    def _make(self, old: str | None, size: int | None = None, zeroed: bool = False) -> Spare:
        """Raises JournalFullError when the disk is full, OSError."""
        path = f"{self._folder}/{PREFIX}{storage.random_bytes(8).hex()}"
        if old is not None:
            storage.rename(old, path)
            storage.sync_folder(self._folder)
        fd = storage.open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            self._allocate(fd, size or self._segment_bytes, zeroed)
            storage.pwrite(fd, bytes(HEADER_PAGE_BYTES), 0)
            storage.fdatasync(fd)
        except OSError as e:
            storage.close(fd)
            storage.unlink(path)
            raise disk_full(self._folder, e) from e
        return Spare(path, fd)

    def _allocate(self, fd: int, wanted: int, zeroed: bool) -> None:
        size = storage.fstat(fd).st_size
        if size > wanted:
            storage.ftruncate(fd, wanted)
        elif size < wanted:
            storage.posix_fallocate(fd, 0, wanted)
            for at in range(size, wanted if zeroed else size, len(_ZEROS)):
                storage.pwrite(fd, _ZEROS[: wanted - at], at)


def disk_full(folder: str, error: OSError) -> OSError | JournalFullError:
    """The JournalFullError that stands for `error` if it says that there is no space, else `error` itself."""
    if error.errno not in _NO_SPACE:
        return error
    return JournalFullError(
        f"The disk of the journal {folder} is full: {error}.", "Give it space; the journal goes on by itself."
    )
