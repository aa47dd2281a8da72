"""Which blocks may have an entry after a point, without asking the index.

A table of fixed size: for each hash of a code the highest seq of the entries that were indexed with it. What it
denies is certain; what it grants has to be looked up. It is noted before the index is written, and so before the
replica changes: whoever reads the replica first and asks here after never misses what made those bytes.
"""

from __future__ import annotations

import numpy as np

from cdp.history.undo_format import Array

# 8 MiB for a group, whatever its volumes' sizes, taken as it fills: once half a million blocks have changed since a
# point, two of five blocks that have not are looked up in vain, which is what all of them cost without the table.
_SLOT_BITS = 20
_FACTOR = 0x9E3779B97F4A7C15  # Fibonacci hashing: neighbours and strides spread alike
_SHIFT = 64 - _SLOT_BITS
_U64 = (1 << 64) - 1


class Touched:
    """Noted by the thread that writes the history, asked by any."""

    def __init__(self, floor_seq: int) -> None:
        """Entries up to `floor_seq` may be in the index and are not known here."""
        self._floor_seq = floor_seq
        self._seqs = np.zeros(1 << _SLOT_BITS, np.uint64)
        self._look = self._seqs.data  # one element of it costs half of what one of the array does

    def note(self, codes: Array, seq: int) -> None:
        """There will be entries of these codes, none of them above `seq`."""
        slots = codes * np.uint64(_FACTOR) >> np.uint64(_SHIFT)
        self._seqs[slots] = np.maximum(self._seqs[slots], np.uint64(seq))

    def may_follow(self, code: int, seq: int) -> bool:
        """Whether there may be an entry of exactly this code above `seq`."""
        return self._look[(code * _FACTOR & _U64) >> _SHIFT] > seq or self._floor_seq > seq
