"""A pass over regions of a volume while clients are served: warm on a thread, then a bounded slice in the loop.

The page cache is filled by a worker first, so that the loop's own read, which must fall between two writes, does not
wait for the disk. Between slices the loop belongs to the clients: production comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from cdp import storage
from cdp.collector.refused import read_as_journaled
from cdp.errors import StorageError

if TYPE_CHECKING:
    from cdp.collector.group import Group
    from cdp.collector.volume import Volume

# A slice costs the loop about 0.2 ms to read, checksum and append.
SLICE_BYTES = 256 << 10
# Between slices while clients write: some 5 % of the loop's time, and still 60 MiB/s.
BUSY_PAUSE_SECONDS = 0.004
# When the journal is short of space or the group is stopped.
RETRY_SECONDS = 0.25
# A hole is told in such pieces.
HOLE_BYTES = 1 << 30

Region = tuple[int, int]  # offset, length


class Sweep:
    """`data(offset, content)` and `hole(offset, length)` say whether they could journal it; if not they are asked
    again later. `done(error)` ends it. All on the loop's thread."""

    def __init__(
        self,
        group: Group,
        volume: Volume,
        worker: storage.Worker,
        regions: Iterable[Region],
        data: Callable[[int, bytes], bool],
        hole: Callable[[int, int], bool],
        done: Callable[[StorageError | None], None],
    ) -> None:
        self._group, self._volume, self._worker = group, volume, worker
        self._regions: Iterator[Region] = iter(regions)
        self._data, self._hole, self._done = data, hole, done
        self._at = self._end = 0
        self._stopped = False

    def start(self) -> None:
        self._next()

    def cancel(self) -> None:
        """Nothing is called any more."""
        self._stopped = True

    def _later(self, seconds: float) -> None:
        self._worker.submit(lambda _, error: self._next(), storage.pause, seconds)

    def _next(self) -> None:
        """Goes on at the next stretch of data or hole."""
        if self._stopped:
            return
        if self._group.refuse or self._group.journal_is_filling:
            return self._later(RETRY_SECONDS)
        while self._at >= self._end:
            region = next(self._regions, None)
            if region is None:
                return self._done(None)
            self._at, self._end = region[0], region[0] + region[1]
        try:
            end = min(self._end, self._at + HOLE_BYTES)
            stretch, is_data = self._volume.primary.extents(self._at, end, 1)[0]
        except OSError as e:
            return self._fail(e)
        if not is_data:
            if not self._hole(self._at, stretch):
                return self._later(RETRY_SECONDS)
            self._moved(stretch)
            return self._later(0)
        length = min(stretch, SLICE_BYTES)
        pause = BUSY_PAUSE_SECONDS if self._group.active else 0.0
        self._worker.submit(
            lambda _, error: self._warmed(length), _warm, pause, self._volume.primary.fd, self._at, length
        )

    def _warmed(self, length: int) -> None:
        if not self._stopped:
            read_as_journaled(self._volume, self._at, length, self._have)

    def _have(self, content: bytes | None, error: BaseException | None) -> None:
        if self._stopped:
            return
        if content is None:
            return self._fail(error)
        if self._group.refusals.first_seq is not None:  # the journal does not say yet what the primary holds
            return self._later(RETRY_SECONDS)
        if not self._data(self._at, content):
            return self._later(RETRY_SECONDS)
        self._moved(len(content))
        self._next()

    def _moved(self, length: int) -> None:
        self._at += length
        if self._volume.progress is not None:
            self._volume.progress.done_bytes += length

    def _fail(self, error: BaseException | None) -> None:
        self._stopped = True
        self._done(StorageError(f"The primary of {self._volume.name} cannot be read at {self._at}: {error}."))


def _warm(pause: float, fd: int, offset: int, length: int) -> None:
    storage.pause(pause)
    if fd >= 0:
        storage.pread(fd, length, offset)
