"""What the writer lets readers see: the ends of its batches, and the durable position that moves over them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from cdp.journal.batch import Identity
from cdp.journal.position import DurableFile, DurablePosition
from cdp.journal.wake import Waker


class Mark(NamedTuple):
    """The end of a batch, kept until it is published: as many as the primaries have not answered for."""

    seq: int
    crc: int
    order_ns: int
    segment: int
    end: int


class Publisher:
    """`mark` is bound to the deque's own method: it runs once for each batch on the hot path."""

    def __init__(self, folder: str, identity: Identity, found: Mark) -> None:
        """`found`: the end of all that stood at the start; it becomes visible together. Raises OSError."""
        self._identity = identity
        self._marks: deque[Mark] = deque([found])
        self.mark = self._marks.append
        self._file = DurableFile(folder, writable=True)
        published = self._file.read()
        self._generation = published.generation if published else 0
        self._waker = Waker(folder)
        self.published_seq = 0  # by this life

    def publish(self, seq: int) -> None:
        """Moves the durable position to the last batch that ends at or before `seq`, if that is further."""
        mark = None
        while self._marks and self._marks[0].seq <= seq:
            mark = self._marks.popleft()
        if mark is None:
            return
        self._generation += 1
        self.published_seq = mark.seq
        self._file.write(
            DurablePosition(
                self._generation, mark.seq, mark.order_ns, mark.segment, mark.end, self._identity.epoch,
                self._identity.group_id, mark.crc,
            )  # fmt: skip
        )
        self._waker.wake()

    def moved(self, after_seq: int, marks: list[Mark]) -> None:
        """The batches behind `after_seq` are at other places now."""
        while self._marks and self._marks[-1].seq > after_seq:
            self._marks.pop()
        self._marks.extend(marks)

    def close(self) -> None:
        self._file.close()
        self._waker.close()
