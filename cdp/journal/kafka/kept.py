"""Which acknowledged part of the journal may go: a broker's acknowledgement is not a sync, so it is kept a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# Marks are a second apart or more, and a thousandth of what they are kept for: some thousand, however long that is.
_MARK_NS, _MARKS = 10**9, 1000


class Kept:
    """What was acknowledged, and when. Also bounded by bytes: a journal that fills up would stop production."""

    def __init__(self, keep_ns: int, max_bytes: int) -> None:
        self._keep_ns, self._max_bytes = keep_ns, max_bytes
        self._mark_ns = max(_MARK_NS, keep_ns // _MARKS)
        self._marks: deque[list[int]] = deque()  # [when, seq, bytes]
        self.bytes = 0

    def add(self, now_ns: int, seq: int, size: int) -> None:
        """`size` bytes of the journal up to `seq` were acknowledged now."""
        last = self._marks[-1] if self._marks else None
        if last and now_ns - last[0] < self._mark_ns and last[2] + size <= self._max_bytes // 8:
            last[1] = seq
            last[2] += size
        else:
            self._marks.append([now_ns, seq, size])
        self.bytes += size

    def resume(self, now_ns: int, seq: int, parts: Iterable[tuple[int, int]]) -> None:
        """A life of the relay begins behind `seq`; (last seq, bytes) are the parts of the journal. What a topic lost
        is not acknowledged any more, however long ago it was; what an earlier process had acknowledged counts anew."""
        while self._marks and self._marks[-1][1] > seq:
            self.bytes -= self._marks.pop()[2]
        known = self._marks[-1][1] if self._marks else 0
        for last, size in parts:
            if known < last <= seq:
                self._marks.append([now_ns, last, size])
                self.bytes += size

    def release(self, now_ns: int) -> int:
        """The highest seq that need not be kept any more; 0: nothing new."""
        released = 0
        while self._marks and (now_ns - self._marks[0][0] >= self._keep_ns or self.bytes > self._max_bytes):
            _, released, size = self._marks.popleft()
            self.bytes -= size
        return released
