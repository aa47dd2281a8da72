"""The one door to files, clocks and randomness, and to the completions of syncs.

Everything that the journal, the collector, the replica and the history do to files goes through these names, so
that a simulated disk and clock can stand in for them. They are the functions of `os` themselves wherever possible:
the door costs one attribute look-up. Callers write `from cdp import storage` and call `storage.pwrite(…)`, or bind
the name when an object is made; they never import `os`, `time` or `random` for these purposes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from cdp import aio
from cdp.errors import RefusedError, StorageError

PAGE_BYTES = 4096

# --- files: thin names, same signatures as in `os`
close = os.close
pread = os.pread
preadv = os.preadv
pwrite = os.pwrite
pwritev = os.pwritev
write = os.write
fdatasync = os.fdatasync
fsync = os.fsync
fstat = os.fstat
stat = os.stat
ftruncate = os.ftruncate
rename = os.rename
unlink = os.unlink
listdir = os.listdir
makedirs = os.makedirs
exists = os.path.exists
posix_fadvise = os.posix_fadvise
posix_fallocate = os.posix_fallocate
lseek = os.lseek
SEEK_DATA, SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE
RWF_NOWAIT = os.RWF_NOWAIT

# --- clocks and randomness
wall_ns = time.time_ns
monotonic_ns = time.monotonic_ns
random_bytes = os.urandom
pause = time.sleep  # for threads that pace themselves, never to wait for something

# fallocate(2) modes, linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_START_WRITING = 0x02  # SYNC_FILE_RANGE_WRITE


def open_file(path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
    """A descriptor, closed on exec. Raises OSError."""
    return os.open(path, flags | os.O_CLOEXEC, mode)


def sync_folder(path: str) -> None:
    """Makes creations, renames and removals in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: str, content: bytes) -> None:
    """Replaces a small file whole, durably: temporary file, fsync, rename, fsync of the folder."""
    temporary = path + ".tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view):]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_folder(os.path.dirname(path) or ".")


def read_file(path: str) -> bytes:
    """A small file whole. Raises FileNotFoundError."""
    with open(path, "rb") as f:
        return f.read()


def pread_exact(fd: int, length: int, offset: int) -> bytes:
    """Exactly `length` bytes; a short file raises StorageError, for an I/O error OSError."""
    got = os.pread(fd, length, offset)
    while len(got) < length:
        more = os.pread(fd, length - len(got), offset + len(got))
        if not more:
            raise StorageError(f"Short read: {len(got)} of {length} bytes at offset {offset}.")
        got += more
    return got


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """What is there reads as zeros and its space is given back; the size stays. Raises OSError (EOPNOTSUPP …)."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """What is there reads as zeros and its space stays allocated. Raises OSError (EOPNOTSUPP …)."""
    _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def start_writing(fd: int) -> None:
    """Sets the disk to work on what of a file is not on it yet, and waits for none of that. It promises nothing: what
    goes wrong is met by the sync that must follow."""
    _libc.sync_file_range(fd, 0, 0, _START_WRITING)


def data_extents(fd: int, offset: int, end: int) -> list[tuple[int, int]]:
    """The (offset, length) parts of [offset, end) that may hold data; the rest are holes. Clipped to the range."""
    found: list[tuple[int, int]] = []
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            return [*found, (offset, end - offset)]  # a file system that cannot tell: all of it may be data
        if start >= end:
            break
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        found.append((start, stop - start))
        offset = stop
    return found


def free_bytes(path: str) -> int:
    """Space on the file system of `path` that this process may use."""
    s = os.statvfs(path)
    return (s.f_bavail if os.geteuid() else s.f_bfree) * s.f_frsize


def device_bytes(fd: int) -> int:
    """Size of a regular file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def lock_file(path: str, timeout_seconds: float, what: str) -> int:
    """An exclusive lock on `path` (made if missing), held until the descriptor is closed or the process ends.

    Raises RefusedError (`locked`) when another process holds it for `timeout_seconds`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            if time.monotonic() >= end:
                os.close(fd)
                raise RefusedError(
                    f"{what} is in use by another process.",
                    f"Stop the process that holds {path}, or use another one.",
                    code="locked",
                ) from None
            time.sleep(0.05)


def lock_ofd(fd: int, start: int, length: int, exclusive: bool) -> bool:
    """An open-file-description lock on bytes of a file, as QEMU takes for its image locks; False if it is held."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        return True
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise


def wait_readable(descriptors: list[int], timeout_seconds: float | None) -> list[int]:
    """Those that are readable (or broken), as soon as one is; [] after the time-out. None: without limit."""
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    timeout_ms = None if timeout_seconds is None else max(0, round(timeout_seconds * 1000))
    return [fd for fd, _ in poll.poll(timeout_ms)]


Done = Callable[[Any, BaseException | None], None]


class Worker:
    """Threads that only sit in system calls, for one event loop: `submit` from it, `drain` when `fileno` is readable.

    `done(result, error)` runs on the loop's thread, inside `drain`. The number of calls under way is bounded by
    the caller, who knows what it submitted.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Done, Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._finished: deque[tuple[Done, Any, BaseException | None]] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signalled = False  # a drain is due that has not begun to take what is finished
        self._kernel: aio.SyncQueue | None = None  # from the first sync on
        self._kernel_done: dict[int, Done] = {}
        self._kernel_number = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def fileno(self) -> int:
        return self._event

    def submit(self, done: Done, call: Callable[..., Any], *args: Any) -> None:
        """Runs `call(*args)` on a thread; then `done` inside a later `drain`."""
        self._calls.put((done, call, args))

    def sync(self, done: Done, fd: int) -> None:
        """The same for `fdatasync(fd)`: by the kernel's threads where it has them, else by one of these.

        What stands in for `fdatasync` at this door is what is called.
        """
        number = self._kernel_number = self._kernel_number + 1
        if number == 1:
            self._kernel = aio.open_queue(self._event)
        if fdatasync is os.fdatasync and self._kernel is not None and self._kernel.submit(number, fd):
            self._kernel_done[number] = done
        else:
            self.submit(done, fdatasync, fd)

    def _run(self) -> None:
        while (job := self._calls.get()) is not None:
            done, call, args = job
            try:
                self._finished.append((done, call(*args), None))
            except BaseException as e:  # handed to `done`, which must deal with it
                self._finished.append((done, None, e))
            if not self._signalled:
                self._signalled = True
                os.eventfd_write(self._event, 1)

    def drain(self) -> None:
        """Runs `done` of every finished call."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass
        self._signalled = False  # before the first is taken: what is finished from here on signals anew
        if self._kernel is not None and self._kernel.under_way:
            self._finished.extend((self._kernel_done.pop(number), None, e) for number, e in self._kernel.ended())
        finished = self._finished
        while finished:
            done, result, error = finished.popleft()
            done(result, error)

    def close(self) -> None:
        """Ends the threads after the calls already submitted; what is finished is still drained."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        while self._kernel is not None and self._kernel.under_way:
            wait_readable([self._event], None)
            self.drain()
        self.drain()
        if self._kernel is not None:
            self._kernel.close()
        os.close(self._event)
