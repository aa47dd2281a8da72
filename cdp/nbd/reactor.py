"""What one thread waits for: descriptors, timers, calls. Polls for a moment before it sleeps, while that pays.

At queue depth 1 the next request comes sooner than a sleeping thread would wake; polling all the time would burn
a core that the clients need.
"""

from __future__ import annotations

import heapq
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

# How long a poll may last: a few times what a client at queue depth 1 takes to send its next request.
_POLL_SECONDS = 50e-6
# Polling goes on while the credit is above 0: a poll (or a sleep that was as short) that brought something earns
# one; a vain one costs more, because it wastes more than a good one saves.
_MAX_CREDIT, _VAIN_POLL_COST = 16, 4
_EVENTS_AT_ONCE = 64
# A sleep is never longer, so that nothing depends on one wake-up.
_MAX_SLEEP_SECONDS = 1.0

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class Reactor:
    """All methods but `stop` are for the thread that runs it."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.replied = False  # something was served in this round: what comes next may come soon
        self.owed = 0  # requests that wait for others, mostly threads: a poll would keep the interpreter from them
        self.stopping = False
        self.calls: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, float, Callable[[], None]]] = []
        self._timer_count = 0
        self._soon: deque[Callable[[], None]] = deque()
        self._credit = 0
        self._closed = False
        self._ending = threading.RLock()  # a `stop` from elsewhere never meets a closed descriptor
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add_reader(self._wake, self._woken)
        self.every(_MAX_SLEEP_SECONDS, lambda: None)  # there is always a timer

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        """Calls whenever `fd` is readable (level-triggered)."""
        self.calls[fd] = call
        self.epoll.register(fd, IN)

    def remove_reader(self, fd: int) -> None:
        """Watches `fd` no longer. To be called before it is closed."""
        if self.calls.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls about every so many seconds, first after them."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_count, seconds, call))

    def call_soon(self, call: Callable[[], None]) -> None:
        """Calls before the loop sleeps next. Only from the loop's own thread."""
        self._soon.append(call)

    def stop(self) -> None:
        """Ends `run`. From any thread, and from a signal handler."""
        self.stopping = True
        with self._ending:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)

    def wait(self) -> list[tuple[int, int]]:
        """The descriptors that are ready, as soon as there are any, or a timer or a call is due."""
        poll = self.epoll.poll
        events: list[tuple[int, int]] = poll(0, _EVENTS_AT_ONCE)
        if events or self._soon:
            return events
        clock = time.perf_counter
        begin = clock()
        if self.replied and self._credit > 0 and not self.owed:
            end = begin + _POLL_SECONDS
            while clock() < end:
                if events := poll(0, _EVENTS_AT_ONCE):
                    self._credit = min(self._credit + 1, _MAX_CREDIT)
                    return events
            self._credit = max(self._credit - _VAIN_POLL_COST, 0)
        events = poll(max(self._timers[0][0] - time.monotonic(), 0.0), _EVENTS_AT_ONCE)
        if self.replied and not self.owed and clock() - begin < _POLL_SECONDS:
            self._credit = min(self._credit + 1, _MAX_CREDIT)
        return events

    def run_due(self) -> None:
        """Timers that are due, and the calls that were asked for up to now."""
        now = time.monotonic()
        while self._timers[0][0] <= now:
            _, number, seconds, call = self._timers[0]
            heapq.heapreplace(self._timers, (now + seconds, number, seconds, call))
            call()
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def close(self) -> None:
        """Nothing is watched any more."""
        with self._ending:
            self._closed = True
            self.epoll.close()
            os.close(self._wake)
