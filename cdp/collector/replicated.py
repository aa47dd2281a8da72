"""`ack = "replicated"`: a FLUSH or FUA is answered when the journal's remote carrier has it too (promise 3).

The relay says how far that is. A flush that it does not reach in time is refused, or, if so configured, answered as
durable here alone until the carrier has caught up. Owned by the loop's thread.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cdp import storage
from cdp.journal.acknowledged import Acknowledged, Ear

if TYPE_CHECKING:
    from cdp.collector.group import Group

log = logging.getLogger(__name__)

FENCED = "fenced"
NOT_REPLICATED = "not_replicated"
# Flushes that wait, their connections gone or not: a client that comes again and again must not fill the memory.
MAX_WAITING = 1 << 16
# Between two looks at the time limit of those that wait.
LOOK_SECONDS = 0.1
# A carrier that has what the journal had this long ago keeps up: flushes may wait for it again.
CAUGHT_UP_NS = 10**9

Answer = Callable[[OSError | None], None]


@dataclass(frozen=True)
class ReplicatedSpec:
    """How long a flush waits for the carrier, in ns, and whether it is then answered as durable here alone."""

    timeout_ns: int
    local_after_timeout: bool


class Replicated:
    """Of one group. Made when its journal is open; to be closed."""

    def __init__(self, group: Group, spec: ReplicatedSpec, folder: str) -> None:
        """`folder` is the journal's. Raises OSError."""
        self._group, self._spec = group, spec
        self._ear = Ear(folder)
        self._waiting: deque[tuple[int, int, Answer]] = deque()  # (seq, until monotonic ns, answer)
        self.acknowledged_seq = 0
        self.fenced = False
        self._here = False  # flushes are answered as durable here alone
        self._missed_seq = 0  # the highest seq that a flush did not wait for, or not long enough; 0: none
        self._mark_seq, self._mark_ns = 0, 0  # the journal's end at a time: has the carrier caught up with it since?

    def fileno(self) -> int:
        return self._ear.fileno()

    def close(self) -> None:
        self._ear.close()

    @property
    def wants(self) -> bool:
        """Whether somebody waits: then the relay must hear at once of what is durable here."""
        return bool(self._waiting)

    def behind(self, answer: Answer) -> Answer:
        """The answer of a flush that is being received: it goes on to wait for the carrier once it is durable here."""
        return partial(self._durable_here, self._group.journal.last_seq, answer)

    def _durable_here(self, seq: int, answer: Answer, error: OSError | None) -> None:
        if error is not None:
            return answer(error)
        if seq <= self.acknowledged_seq:
            return answer(None)
        if self.fenced or len(self._waiting) >= MAX_WAITING:
            return answer(OSError(errno.EIO, "the journal's carrier does not acknowledge"))
        if self._here:
            self._missed_seq = max(self._missed_seq, seq)
            return answer(None)
        self._waiting.append((seq, storage.monotonic_ns() + self._spec.timeout_ns, answer))

    def receive(self) -> None:
        """The relay said something."""
        for news in self._ear.take():
            # What another incarnation's claim carried says nothing of this one's writes.
            if news.epoch == self._group.epoch and news.seq <= self._group.journal.last_seq:
                self._told(news)

    def _told(self, news: Acknowledged) -> None:
        if news.fenced:
            return self._fence()
        if self.fenced:
            log.warning("group %s: the topic is ours again", self._group.name)
            self.fenced = False  # the group goes on within a second
        if news.seq <= self.acknowledged_seq:
            return
        self.acknowledged_seq = news.seq
        while self._waiting and self._waiting[0][0] <= news.seq:
            self._waiting.popleft()[2](None)
        if news.seq >= self._missed_seq:
            self._missed_seq = 0
            self._wait_again()

    def _fence(self) -> None:
        """Whoever has the topic now is the one whose writes are kept: nothing more is taken here."""
        if not self.fenced:
            self.fenced = True
            self._refuse_waiting(len(self._waiting))
        self._group.stop(
            FENCED,
            f"Another collector carries a history of {self._group.name} to the topic, and with ack = \"replicated\" "
            "this one takes no more writes. Stop one of the two; see the relay's reason.",
        )

    def _wait_again(self) -> None:
        if self._here:
            log.warning("group %s: flushes wait for the journal's carrier again", self._group.name)
            self._here = False

    def look(self) -> None:
        """Every LOOK_SECONDS: those whose time is over."""
        now_ns = storage.monotonic_ns()
        if self._here and now_ns - self._mark_ns >= CAUGHT_UP_NS:
            if self.acknowledged_seq >= self._mark_seq:  # under a steady load it never has everything
                self._wait_again()
            self._mark_seq, self._mark_ns = self._group.journal.last_seq, now_ns
        late = 0
        while late < len(self._waiting) and self._waiting[late][1] <= now_ns:
            late += 1
        if not late:
            return
        seq, seconds = self._waiting[late - 1][0], self._spec.timeout_ns / 1e9
        text = "group %s: seq %d was not acknowledged by the journal's carrier within %g s; %s"
        self._missed_seq = max(self._missed_seq, seq)
        if not self._spec.local_after_timeout:
            self._group.said.add("late", logging.ERROR, text, self._group.name, seq, seconds, "flushes are refused")
            return self._refuse_waiting(late)
        log.error(text, self._group.name, seq, seconds, "flushes are answered as durable here alone until it is")
        # All of them: those behind are not acknowledged either, and production has waited long enough.
        waiting, self._waiting = self._waiting, deque()
        self._here, self._missed_seq = True, waiting[-1][0]
        self._mark_seq, self._mark_ns = self._group.journal.last_seq, now_ns
        for _, _, answer in waiting:
            answer(None)

    def _refuse_waiting(self, count: int) -> None:
        for _ in range(count):
            self._waiting.popleft()[2](OSError(errno.EIO, "not acknowledged by the journal's carrier"))

    @property
    def reason(self) -> dict[str, str] | None:
        """Why flushes are not what they should be; None where they are."""
        if not self._missed_seq:
            return None
        after = "answered as durable here alone" if self._here else "refused"
        text = (
            f"Kafka has not acknowledged seq {self._missed_seq} of {self._group.name} in time: flushes are {after} "
            "until it keeps up. See the relay's reason."
        )
        return {"code": NOT_REPLICATED, "text": text}

    def figures(self) -> dict[str, Any]:
        """`state`: `replicated`, `local` (for now), `late` (something was refused) or `fenced`."""
        late = "local" if self._here else "late" if self._missed_seq else "replicated"
        state = "fenced" if self.fenced else late
        return {"state": state, "acknowledged_seq": self.acknowledged_seq, "waiting": len(self._waiting)}
