"""Log lines about what may happen thousands of times a second: the first at once, then a count every few seconds."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

from cdp import storage

# Short enough to be seen while it goes on, long enough that a day of it is a file of megabytes.
PERIOD_SECONDS = 5.0


class Said:
    """Lines by key, which stands for one kind of event of one object: callers bound their number. One thread's.

    Of each key `burst` lines are written in a period; the rest is counted, and summed up by `tick`.
    """

    def __init__(self, log: logging.Logger, burst: int = 1) -> None:
        self._log, self._burst = log, burst
        self._keys: dict[Hashable, _Key] = {}

    def add(self, key: Hashable, level: int, text: str, *arguments: Any) -> None:
        """A line as `log.log` would write it, now or as part of a count."""
        key_ = self._keys.get(key)
        if key_ is None:
            key_ = self._keys[key] = _Key(storage.monotonic_ns())
        if key_.written < self._burst:
            key_.written += 1
            self._log.log(level, text, *arguments)
        else:
            key_.more += 1
            key_.last = (level, text, arguments)

    def tick(self) -> None:
        """About once a second: what was counted is said when its period has ended, and the next begins."""
        now_ns = storage.monotonic_ns()
        for key, said in list(self._keys.items()):
            if now_ns - said.since_ns < PERIOD_SECONDS * 1e9:
                continue
            if said.last is None:
                del self._keys[key]  # quiet: the next one is a first one
                continue
            level, text, arguments = said.last
            seconds = (now_ns - said.since_ns) / 1e9
            self._log.log(level, text + " (the last of %d more in %.0f s)", *arguments, said.more, seconds)
            said.since_ns, said.more, said.last = now_ns, 0, None


class _Key:
    __slots__ = ("since_ns", "written", "more", "last")

    def __init__(self, since_ns: int) -> None:
        self.since_ns = since_ns
        self.written = self.more = 0
        self.last: tuple[int, str, tuple[Any, ...]] | None = None
