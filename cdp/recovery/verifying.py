"""VERIFY records over what a rollback has copied, asked for by a thread of its own while the copy goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

from cdp.recovery.control import VERIFY_RANGES
from cdp.recovery.copying import Extents, near

# One command: enough that its answer, which waits for a sync of the journal, costs little beside it.
_STRETCH_BYTES = 32 << 20
# … nor more pieces, so that scattered blocks fit one command and what is gathered stays small.
_STRETCH_PIECES = VERIFY_RANGES
# Stretches that wait while one is under way; then the copy waits, so that it does not run away from its proof.
_WAITING = 4
# What lies between two changes this near is verified with them: less work than another record.
GAP_BYTES = 64 << 10

Taken = tuple[int, int]


class Proven(NamedTuple):
    """From offset `start` on a volume was compared while it was copied; `taken`: seqs of the VERIFY records over it."""

    start: int
    unequal: Extents
    taken: Taken | None


class Verifying:
    """Of one volume, for one `with`. `verify(ranges)` gives the first and last seq of the records over them.

    What it raises is raised again by the next `add` or by `finish`. A block that is left by an error waits for the
    command that is under way, and gives no other.
    """

    def __init__(self, verify: Callable[[Extents], Taken | None]) -> None:
        self._verify = verify
        self._gathered: Extents = []
        self._gathered_bytes = 0
        self._stretches: SimpleQueue[Extents | None] = SimpleQueue()
        self._room = threading.Semaphore(_WAITING)
        self._taken: Taken | None = None
        self._error: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="verifying", daemon=True)

    def __enter__(self) -> Verifying:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = True
        self._stretches.put(None)
        self._thread.join()

    def add(self, offset: int, length: int) -> None:
        """A region that the primary has taken."""
        self._gathered.append((offset, length))
        self._gathered_bytes += length
        if self._gathered_bytes >= _STRETCH_BYTES or len(self._gathered) >= _STRETCH_PIECES:
            self._hand_over()

    def finish(self) -> Taken | None:
        """(first, last) seq of the records over all that was added, when they are in the journal; None: nothing was."""
        if self._gathered:
            self._hand_over()
        self._stretches.put(None)
        self._thread.join()
        self._raise()
        return self._taken

    def _hand_over(self) -> None:
        self._room.acquire()
        self._raise()
        self._stretches.put(list(near(sorted(self._gathered), GAP_BYTES)))
        self._gathered, self._gathered_bytes = [], 0

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (stretch := self._stretches.get()) is not None:
            if self._error is None and not self._given_up:
                try:
                    self._note(self._verify(stretch))
                except BaseException as e:  # whatever it is, it belongs to the thread that copies
                    self._error = e
            self._room.release()

    def _note(self, taken: Taken | None) -> None:
        if taken is not None:
            self._taken = (self._taken[0] if self._taken else taken[0], taken[1])
