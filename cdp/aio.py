"""`fdatasync` by the kernel's own threads (Linux AIO): no thread of ours has to wake up for a sync, nor for its end.

A thread that waits for the interpreter before and after a sync of 100 µs makes that 200. One submission costs the
caller a few µs; the end is counted on an eventfd. Not every kernel or sandbox has it: `open_queue` returns None then.
"""

from __future__ import annotations

import ctypes
import os
import struct

# More are never under way: a sync for each of a round's files, of every group; the next ones go to threads.
MAX_UNDER_WAY = 64

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit
_FDSYNC, _FLAG_RESFD = 3, 1
# linux/aio_abi.h, little-endian: data, key, rw_flags, opcode, priority, fd, buf, nbytes, offset, -, flags, resfd
_IOCB = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")  # data, iocb, result, -
# PyDLL: neither call blocks, so the interpreter need not be given up, and taken again, around them.
_libc = ctypes.PyDLL(None, use_errno=True)


class SyncQueue:
    """For one thread. Descriptors may be closed while their syncs are under way."""

    def __init__(self, context: int, event: int, numbers: tuple[int, int, int, int]) -> None:
        self._context = ctypes.c_uint64(context)
        self._event = event
        _, self._destroy, self._getevents, self._submit = numbers
        self._buffer = ctypes.create_string_buffer(_IOCB.size)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))
        self._events = ctypes.create_string_buffer(_EVENT.size * MAX_UNDER_WAY)
        self.under_way = 0

    def submit(self, number: int, fd: int) -> bool:
        """Begins `fdatasync(fd)`, to be known by `number`; False where it must be done in another way."""
        if self.under_way >= MAX_UNDER_WAY:
            return False
        _IOCB.pack_into(self._buffer, 0, number, 0, 0, _FDSYNC, 0, fd, 0, 0, 0, 0, _FLAG_RESFD, self._event)
        if _libc.syscall(self._submit, self._context, 1, self._pointers) != 1:
            return False  # the file system has none, or the kernel's own limit: nothing has begun
        self.under_way += 1
        return True

    def ended(self) -> list[tuple[int, OSError | None]]:
        """The number and the error of each sync that has ended since the last call."""
        count = _libc.syscall(self._getevents, self._context, 0, MAX_UNDER_WAY, self._events, None)
        found: list[tuple[int, OSError | None]] = []
        for at in range(max(count, 0)):
            number, _, result, _ = _EVENT.unpack_from(self._events, at * _EVENT.size)
            found.append((number, OSError(-result, os.strerror(-result)) if result < 0 else None))
        self.under_way -= len(found)
        return found

    def close(self) -> None:
        """Waits for the syncs that are under way."""
        _libc.syscall(self._destroy, self._context)


def open_queue(event: int) -> SyncQueue | None:
    """A queue that counts its ends on the eventfd `event`; None where the kernel gives none."""
    numbers = _NUMBERS.get(os.uname().machine)
    context = ctypes.c_uint64(0)
    if numbers is None or _libc.syscall(numbers[0], MAX_UNDER_WAY, ctypes.byref(context)) != 0:
        return None
    return SyncQueue(context.value, event, numbers)
