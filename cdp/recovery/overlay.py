"""Private writes over an opened point: a scratch file that goes with its connection.

The scratch file is sparse and unlinked as soon as it is made, so nothing survives the process. What was written is
known by block in two bitmaps for each region of 16 MiB: one bit says that the block is in the scratch file, the other
that it reads as zeros. A write that does not cover whole blocks takes the rest from below first.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Protocol

from cdp import storage

BLOCK_BYTES = 4096
REGION_BLOCKS = 4096
_FULL = (1 << REGION_BLOCKS) - 1
# What a base:allocation extent says of blocks that read as zeros: hole and zero.
HOLE_ZERO = 3

_BASE, _DATA, _ZERO = range(3)
Extents = list[tuple[int, int]]


class BaseView(Protocol):
    """What lies under an overlay (`cdp.history.view.View`)."""

    def read_into(self, offset: int, target: memoryview, /) -> None: ...
    def allocation(self, offset: int, length: int, /) -> Sequence[tuple[int, int]]: ...


class OverlayBudget:
    """What all overlays of a process may take together; over it a write is answered with ENOSPC."""

    def __init__(
        self,
        # A trial boot or two and some curious mounts at once; each is a file that may grow.
        overlays: int = 16,
        # Enough for a boot and a repair of a file system; a test failover needs a named overlay instead.
        bytes_each: int = 4 << 30,
        # Some 700 bytes each at worst: 90 MiB of bitmaps, which cover 2 TiB.
        regions: int = 1 << 17,
    ) -> None:
        self.overlays_left = overlays
        self.bytes_each = bytes_each
        self.regions_left = regions


def _no_space(what: str) -> OSError:
    return OSError(errno.ENOSPC, f"{what} of private writes is used up")


class Overlay:
    """The private writes of one connection over `base`. Raises OSError(ENOSPC) over a limit, with nothing changed."""

    def __init__(self, base: BaseView, size: int, folder: str, budget: OverlayBudget) -> None:
        if budget.overlays_left < 1:
            raise _no_space("The number")
        self._base, self._size, self._budget = base, size, budget
        self._fd = _scratch_file(folder, size)
        budget.overlays_left -= 1
        self._map: dict[int, tuple[int, int]] = {}  # region -> (data bits, zero bits)
        self._blocks = 0

    @property
    def bytes(self) -> int:
        """What the scratch file takes."""
        return self._blocks * BLOCK_BYTES

    def close(self) -> None:
        """Everything written is gone; idempotent."""
        if self._fd >= 0:
            storage.close(self._fd)
            self._fd = -1
            self._budget.overlays_left += 1
            self._budget.regions_left += len(self._map)
            self._map.clear()

    # --- reading

    def read_into(self, offset: int, target: memoryview) -> None:
        """The bytes at `offset`, the newest private ones first."""
        end = offset + len(target)
        for kind, start, stop in self._runs(offset, end):
            part = target[start - offset : stop - offset]
            if kind == _BASE:
                self._base.read_into(start, part)
            elif kind == _DATA:
                _read_exact(self._fd, part, start)
            else:
                part[:] = bytes(stop - start)

    def allocation(self, offset: int, length: int) -> Extents:
        """`base:allocation` of the range, at least its beginning."""
        found: Extents = []
        for kind, start, stop in self._runs(offset, offset + length):
            if kind == _BASE:
                inside = self._base.allocation(start, stop - start)
                for extent in inside:
                    _add(found, *extent)
                if sum(extent[0] for extent in inside) < stop - start:
                    break  # the view stopped early; what follows must not move up
            else:
                _add(found, stop - start, HOLE_ZERO if kind == _ZERO else 0)
        return found

    # --- writing

    def write(self, offset: int, data: memoryview) -> None:
        """Keeps `data`; what else is in its first and last block is taken from below."""
        end = offset + len(data)
        low = offset - offset % BLOCK_BYTES
        high = self._round_up(end)
        self._reserve(low, high, data=True)
        before, after = bytearray(offset - low), bytearray(high - end)
        if before:
            self.read_into(low, memoryview(before))
        if after:
            self.read_into(end, memoryview(after))
        _write_all(self._fd, [before, data, after], low)
        self._mark(low, high, data=True)

    def zero(self, offset: int, length: int) -> None:
        """The range reads as zeros; space it took in the scratch file is given back."""
        end = offset + length
        low = self._round_up(offset)
        high = end if end == self._size else end - end % BLOCK_BYTES
        if low >= high:
            self.write(offset, memoryview(bytes(length)))
            return
        self._reserve(low, high, data=False)
        if offset < low:
            self.write(offset, memoryview(bytes(low - offset)))
        if high < end:
            self.write(high, memoryview(bytes(end - high)))
        for kind, start, stop in list(self._runs(low, high)):
            if kind == _DATA:
                storage.punch_hole(self._fd, start, stop - start)
        self._mark(low, high, data=False)

    def _round_up(self, offset: int) -> int:
        """The next boundary of a block; the volume's end is one."""
        return min(-(-offset // BLOCK_BYTES) * BLOCK_BYTES, self._size)

    def _reserve(self, low: int, high: int, *, data: bool) -> None:
        """Refuses a change that would pass a limit, before anything of it is done."""
        new_regions = sum(1 for region, _, _ in _regions(low, high) if region not in self._map)
        if new_regions > self._budget.regions_left:
            raise _no_space("The memory for the map")
        if data:
            held = sum(stop - start for kind, start, stop in self._runs(low, high) if kind == _DATA)
            if self.bytes + high - low - held > self._budget.bytes_each:
                raise _no_space("The space")

    def _mark(self, low: int, high: int, *, data: bool) -> None:
        for region, first, last in _regions(low, high):
            bits = ((1 << (last - first)) - 1) << first
            if region not in self._map:
                self._budget.regions_left -= 1
                old_data, old_zero = 0, 0
            else:
                old_data, old_zero = self._map[region]
            new_data, new_zero = (old_data | bits, old_zero & ~bits) if data else (old_data & ~bits, old_zero | bits)
            self._blocks += new_data.bit_count() - old_data.bit_count()
            # One shared object for the common case of a large discard.
            self._map[region] = (new_data, _FULL if new_zero == _FULL else new_zero)

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(kind, start, stop) in bytes over [offset, end), neighbours of a kind joined within a region."""
        for region, first, last in _regions(offset, end):
            data, zero = self._map.get(region, (0, 0))
            data, zero = data >> first, zero >> first
            while first < last:
                either = data | zero
                if not either:
                    kind, count = _BASE, last - first
                elif data & 1:
                    kind, count = _DATA, _ones(data)
                elif zero & 1:
                    kind, count = _ZERO, _ones(zero)
                else:
                    kind, count = _BASE, (either & -either).bit_length() - 1
                count = min(count, last - first)
                start = (region * REGION_BLOCKS + first) * BLOCK_BYTES
                yield kind, max(start, offset), min(start + count * BLOCK_BYTES, end)
                first, data, zero = first + count, data >> count, zero >> count


def _ones(bits: int) -> int:
    """How many of the lowest bits are set in a row."""
    return (~bits & (bits + 1)).bit_length() - 1


def _regions(low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """(region, first block in it, block after its last) of the blocks that [low, high) touches."""
    block, end = low // BLOCK_BYTES, -(-high // BLOCK_BYTES)
    while block < end:
        region, first = divmod(block, REGION_BLOCKS)
        last = min(REGION_BLOCKS, first + end - block)
        yield region, first, last
        block += last - first


def _add(extents: Extents, length: int, flags: int) -> None:
    if extents and extents[-1][1] == flags:
        extents[-1] = (extents[-1][0] + length, flags)
    else:
        extents.append((length, flags))


def _scratch_file(folder: str, size: int) -> int:
    """A sparse file without a name: it ends with its descriptor. Raises OSError."""
    storage.makedirs(folder, exist_ok=True)
    try:
        fd = storage.open_file(folder, os.O_RDWR | os.O_TMPFILE)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        fd, path = tempfile.mkstemp(dir=folder)  # a file system without O_TMPFILE
        storage.unlink(path)
    try:
        storage.ftruncate(fd, size)
    except OSError:
        storage.close(fd)
        raise
    return fd


def _read_exact(fd: int, target: memoryview, offset: int) -> None:
    while target:
        got = storage.preadv(fd, [target], offset)
        if not got:
            raise OSError(errno.EIO, "the scratch file ended early")
        target, offset = target[got:], offset + got


def _write_all(fd: int, pieces: Sequence[bytearray | memoryview], offset: int) -> None:
    for piece in pieces:
        view = memoryview(piece)
        while view:
            done = storage.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done
