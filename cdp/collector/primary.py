"""What a primary can do: a raw file or block device, or nothing at all (mirror sink).

An *inline* primary is used from the loop's thread by plain system calls, one after the other, so writes that overlap
are never in flight together. `fd` is what the splitter's hot path reads from and writes to; the methods are for
everything rarer. Upstream NBD, which is not inline, is in `primary_nbd`.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from collections.abc import Callable
from typing import Any, Protocol

from cdp import storage
from cdp.collector.locks import lock_primary
from cdp.errors import ConfigError, RefusedError, StorageError

# More extents than this in one answer cost the loop too much; a client asks again for the rest.
MAX_EXTENTS = 512
# Zeros are written in such pieces where neither punching nor zeroing works.
_ZEROS = bytes(1 << 20)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS)

Extent = tuple[int, bool]  # length, whether it may hold data
Later = Callable[[Any, "BaseException | None"], None]


class Primary(Protocol):
    """What the rooms of the collector ask of any primary. All operations raise OSError."""

    address: str
    fd: int  # -1: there is none to use directly
    inline: bool
    readable: bool
    can_zero: bool  # zeroing costs less than writing zeros; else TRIM does nothing
    created: bool  # made by this start: it holds nothing yet

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes | memoryview) -> None: ...
    def zero(self, offset: int, length: int, punch: bool) -> None: ...
    def sync(self) -> None: ...
    def extents(self, offset: int, end: int, limit: int = MAX_EXTENTS) -> list[Extent]: ...
    def identity(self) -> dict[str, int | str]: ...
    def close(self) -> None: ...

    # Only where it is not inline: answers come later, in the order of the calls, from the loop's thread.
    def read_later(self, offset: int, length: int, done: Later) -> None: ...
    def sync_later(self, done: Later) -> None: ...


class InlinePrimary:
    """What an inline primary is never asked for."""

    def read_later(self, offset: int, length: int, done: Later) -> None:
        raise AssertionError("an inline primary is read at once")

    def sync_later(self, done: Later) -> None:
        raise AssertionError("an inline primary is synced by a worker")


class NonePrimary(InlinePrimary):
    """No production data here: a mirror sink, whose writes only go to the journal."""

    address, fd, inline, readable, can_zero, created = "none", -1, True, False, True, False

    def read(self, offset: int, length: int) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "a volume without a primary cannot be read")

    def write(self, offset: int, data: bytes | memoryview) -> None:
        pass

    def zero(self, offset: int, length: int, punch: bool) -> None:
        pass

    def sync(self) -> None:
        pass

    def extents(self, offset: int, end: int, limit: int = MAX_EXTENTS) -> list[Extent]:
        return [(end - offset, True)]

    def identity(self) -> dict[str, int | str]:
        return {"kind": "none"}

    def close(self) -> None:
        pass


class FilePrimary(InlinePrimary):
    """A regular file (made sparse at its size if missing) or a block device, held by QEMU's image locks."""

    inline, readable = True, True

    def __init__(self, path: str, size_bytes: int, known_bytes: int | None = None) -> None:
        """`known_bytes`: the size that the volume had before, which may grow now.

        Raises ConfigError for another size, RefusedError (`locked`, `busy`) when it is in use, StorageError.
        """
        self.address, self.path = f"file:{path}", path
        self.created = known_bytes is None and not storage.exists(path)
        try:
            self.fd = storage.open_file(path, os.O_RDWR | (os.O_CREAT if self.created else 0))
        except OSError as e:
            raise StorageError(
                f"The primary {path} cannot be opened: {e.strerror}.",
                "" if known_bytes is None else "It was there at the last start; put it back.",
            ) from e
        try:
            self.is_device = stat_bits.S_ISBLK(storage.fstat(self.fd).st_mode)
            if self.is_device:
                self._reopen_exclusive()
            lock_primary(self.fd, path)
            self._fit(size_bytes, known_bytes)
            self.can_zero = self._probe_zero(size_bytes)
        except BaseException:
            storage.close(self.fd)
            raise

    def _reopen_exclusive(self) -> None:
        storage.close(self.fd)
        try:
            self.fd = storage.open_file(self.path, os.O_RDWR | os.O_EXCL)
        except OSError as e:
            self.fd = storage.open_file("/dev/null")  # so that whoever cleans up closes something that is ours
            raise RefusedError(
                f"The device {self.path} is in use (mounted, or part of another): {e.strerror}.", code="busy"
            ) from e

    def _fit(self, size_bytes: int, known_bytes: int | None) -> None:
        there = storage.device_bytes(self.fd)
        grows = known_bytes is not None and there == known_bytes < size_bytes
        if not self.is_device and (self.created or (there == 0 and known_bytes is None) or grows):
            storage.ftruncate(self.fd, size_bytes)
            storage.fsync(self.fd)
            storage.sync_folder(os.path.dirname(self.path) or ".")
        elif there != size_bytes and not (self.is_device and there > size_bytes):
            raise ConfigError(
                f"The primary {self.path} has {there} bytes, but its volume is configured with {size_bytes}.",
                "Set `size` to what the primary has.",
            )

    def _probe_zero(self, size_bytes: int) -> bool:
        if self.is_device:
            return _device_zeroes(storage.fstat(self.fd).st_rdev)
        s = storage.fstat(self.fd)
        times = (s.st_atime_ns, s.st_mtime_ns)
        try:
            os.utime(self.fd, ns=times)
            storage.punch_hole(self.fd, size_bytes, storage.PAGE_BYTES)  # behind the end: changes nothing but …
        except PermissionError:
            return True  # another user's file: `zero` has its ways, and whoever cannot …
        except OSError:
            return False
        os.utime(self.fd, ns=times)  # … the mtime, which must go on telling who wrote it last, must not touch it
        return True

    def read(self, offset: int, length: int) -> bytes:
        return storage.pread_exact(self.fd, length, offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = storage.pwrite(self.fd, view, offset)
            if done == 0:
                raise OSError(errno.EIO, "the primary took nothing")
            offset += done
            view = view[done:]

    def zero(self, offset: int, length: int, punch: bool) -> None:
        """Reads as zeros afterwards; `punch`: its space may be given back, else it stays allocated.

        A device zeroes whole blocks: what is cut off at the two ends is written, so the work is bounded by these.
        """
        if self.is_device and self.can_zero:
            start, end = offset + -offset % storage.PAGE_BYTES, offset + length
            end -= end % storage.PAGE_BYTES
            if start < end:
                self.write(offset, memoryview(_ZEROS)[: start - offset])
                self.write(end, memoryview(_ZEROS)[: offset + length - end])
                offset, length = start, end - start
        ways: list[Callable[[int, int, int], None]] = (
            [storage.punch_hole, storage.zero_range] if punch else [storage.zero_range, _punch_and_allocate]
        )
        for way in ways:
            try:
                return way(self.fd, offset, length)
            except OSError as e:
                if e.errno not in _UNSUPPORTED:
                    raise
        for at in range(offset, offset + length, len(_ZEROS)):
            self.write(at, memoryview(_ZEROS)[: offset + length - at])

    def sync(self) -> None:
        storage.fdatasync(self.fd)

    def extents(self, offset: int, end: int, limit: int = MAX_EXTENTS) -> list[Extent]:
        """(length, data?) of neighbouring stretches from `offset`, about `limit` at most; may end before `end`."""
        found: list[Extent] = []
        while offset < end and len(found) < limit:
            start = self._seek(offset, storage.SEEK_DATA, end)
            if start > offset:
                found.append((start - offset, False))
            if start < end:
                stop = self._seek(start, storage.SEEK_HOLE, end)
                found.append((stop - start, True))
                start = stop
            offset = start
        return found

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return min(storage.lseek(self.fd, offset, whence), end)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return end
            return offset if whence == storage.SEEK_DATA else end  # cannot tell: all of it may be data

    def identity(self) -> dict[str, int | str]:
        """What tells that this is the primary that was left; `mtime_ns` only where a file system keeps one, for a
        device `written_sectors`, which the kernel counts from its own start on."""
        s = storage.fstat(self.fd)
        if self.is_device:
            size, written = storage.device_bytes(self.fd), _written_sectors(s.st_rdev)
            return {"kind": "device", "device": s.st_rdev, "size": size, "written_sectors": written}
        return {"kind": "file", "dev": s.st_dev, "ino": s.st_ino, "size": s.st_size, "mtime_ns": s.st_mtime_ns}

    def close(self) -> None:
        storage.close(self.fd)


def _punch_and_allocate(fd: int, offset: int, length: int) -> None:
    storage.punch_hole(fd, offset, length)
    storage.posix_fallocate(fd, offset, length)


def _written_sectors(device: int) -> int:
    """-1 where the kernel does not tell."""
    try:
        return int(storage.read_file(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").split()[6])
    except (OSError, ValueError, IndexError):
        return -1


def _device_zeroes(device: int) -> bool:
    here = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for folder in (here, f"{here}/.."):  # a partition's queue is its disk's
        try:
            return int(storage.read_file(f"{folder}/queue/write_zeroes_max_bytes")) > 0
        except (OSError, ValueError):
            continue
    return False
