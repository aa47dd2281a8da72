"""Which acknowledged part of the journal may go: a broker's acknowledgement is not a sync, so it is kept a while."""

from __future__ import annotations

from collections import deque

# Marks are a second apart or more, so that hours of them stay small.
_MARK_NS = 10**9


class Kept:
    """What was acknowledged, and when. Also bounded by bytes: a journal that fills up would stop production."""

    def __init__(self, keep_ns: int, max_bytes: int) -> None:
        self._keep_ns, self._max_bytes = keep_ns, max_bytes
        self._marks: deque[list[int]] = deque()  # [when, seq, bytes]
        self.bytes = 0

    def add(self, now_ns: int, seq: int, size: int) -> None:
        """`size` bytes of the journal up to `seq` were acknowledged now."""
        if self._marks and now_ns - self._marks[-1][0] < _MARK_NS and self._marks[-1][2] + size <= self._max_bytes // 8:
            self._marks[-1][1] = seq
            self._marks[-1][2] += size
        else:
            self._marks.append([now_ns, seq, size])
        self.bytes += size

    def release(self, now_ns: int) -> int:
        """The highest seq that need not be kept any more; 0: nothing new."""
        released = 0
        while self._marks and (now_ns - self._marks[0][0] >= self._keep_ns or self.bytes > self._max_bytes):
            _, released, size = self._marks.popleft()
            self.bytes -= size
        return released
