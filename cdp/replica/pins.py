"""Points that must not leave the window while someone needs them: a rollback's or an export's target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from cdp.errors import RefusedError

# Each pin can hold back retention of the whole history, so there are few: rollbacks, exports, and some open points.
MAX_PINS = 64


class Pin:
    """Holds one seq until `release` (or the end of a `with`)."""

    def __init__(self, pins: Pins, seq: int, name: str) -> None:
        self._pins, self.seq, self.name = pins, seq, name

    def release(self) -> None:
        """Idempotent."""
        self._pins.remove(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Pins:
    """Those of a group. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[Pin] = []

    def add(self, seq: int, name: str) -> Pin:
        """Raises RefusedError (`busy`)."""
        with self._lock:
            if len(self._held) >= MAX_PINS:
                names = ", ".join(sorted({p.name for p in self._held}))
                raise RefusedError(f"{MAX_PINS} points are pinned already: {names}.", "End one of them.", code="busy")
            pin = Pin(self, seq, name)
            self._held.append(pin)
            return pin

    def remove(self, pin: Pin) -> None:
        with self._lock:
            if pin in self._held:
                self._held.remove(pin)

    def seqs(self) -> list[int]:
        with self._lock:
            return [p.seq for p in self._held]

    @contextmanager
    def still(self) -> Iterator[list[int]]:
        """The seqs that are pinned; none is added before the end of the `with`."""
        with self._lock:
            yield [p.seq for p in self._held]
