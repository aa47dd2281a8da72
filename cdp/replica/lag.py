"""How far replay is behind, and whether it must hurry."""

from __future__ import annotations

# Compression is given up while the lag is above the first and grows, until it is below the second: a few seconds of
# a busy volume, so that a burst does not cost history.
FAST_ABOVE_BYTES = 64 << 20
FAST_BELOW_BYTES = 16 << 20


class Lag:
    """`lag_bytes` is exact for what was read, and for the rest an estimate by the bytes of the newest records."""

    def __init__(self) -> None:
        self.fast = False
        self.lag_bytes = 0
        self.end_seq = 0
        self._read_seq = 0
        self._record_bytes = 0.0
        self._looked = False

    def read(self, last_seq: int, size: int, records: int) -> None:
        """`records` of `size` bytes up to `last_seq` were read."""
        self._read_seq = last_seq
        self._record_bytes = size / records

    def look(self, end_seq: int, waiting_bytes: int) -> None:
        """Once a second: the journal's end, and the bytes read that are not applied."""
        lag = waiting_bytes + round(max(0, end_seq - self._read_seq) * self._record_bytes) if self._read_seq else 0
        if self._looked and lag > max(FAST_ABOVE_BYTES, self.lag_bytes):  # a backlog at the start has not grown
            self.fast = True
        elif lag < FAST_BELOW_BYTES:
            self.fast = False
        self.end_seq, self.lag_bytes, self._looked = end_seq, lag, True
