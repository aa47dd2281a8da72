"""The one budget of a process for payloads, and the buffers that are charged to it.

A buffer is charged from the moment it is taken; a few that were given back are kept, since fresh memory costs a
page fault for each 4 KiB, more than receiving into it.
"""

from __future__ import annotations

# Free buffers that are kept: enough for a client that streams 1 MiB requests, small beside the budget.
KEPT_BYTES = 8 << 20
# Buffers up to this are powers of two, so that one given back fits the next of about its length; larger ones are exact.
_MAX_SHARED_BITS = 22
_MIN_SHARED_BITS = 16


class Budget:
    """Counts bytes in use; `take` and `give` move buffers, `charge` and `release` count what lives elsewhere."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        # Input kept for connections that wait for budget: it must not keep them waiting for themselves.
        self.parked_bytes = 0
        self.waiters = 0  # connections that wait for budget; nobody else gets some before them
        self._free: dict[int, list[bytearray]] = {}
        self._free_bytes = 0

    def fits(self, length: int) -> bool:
        """Whether that much may be taken now. Something always fits into an unused budget."""
        used = self.used_bytes
        return used + self.parked_bytes + length <= self.limit_bytes or used == 0

    def charge(self, length: int) -> None:
        self.used_bytes += length

    def release(self, length: int) -> None:
        self.used_bytes -= length

    def take(self, length: int) -> bytearray:
        """A buffer of at least `length` bytes, charged with its own length. Its content is undefined."""
        bits = max((length - 1).bit_length(), _MIN_SHARED_BITS)
        free = self._free.get(bits)
        if free:
            buffer = free.pop()
            self._free_bytes -= len(buffer)
        else:
            buffer = bytearray(1 << bits if bits <= _MAX_SHARED_BITS else length)
        self.used_bytes += len(buffer)
        return buffer

    def give(self, buffer: bytearray) -> None:
        """A buffer from `take` that nobody looks at any more."""
        size = len(buffer)
        self.used_bytes -= size
        if size <= 1 << _MAX_SHARED_BITS and self._free_bytes + size <= KEPT_BYTES:
            self._free.setdefault(size.bit_length() - 1, []).append(buffer)
            self._free_bytes += size
