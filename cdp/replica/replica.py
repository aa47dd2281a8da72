"""The replica: one raw sparse file for each volume, at the newest applied state.

Files have exactly the volume's size, so each is a disk image by itself after a clean stop. Content moves in whole
4 KiB blocks; where the size is no multiple of that, the last block reads as zeros behind the end and is cut to the
size when written. Zeros become holes. Nothing here is durable before `sync`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from cdp import storage
from cdp.errors import CorruptionError, StorageError

BLOCK_BYTES = 4096
BLOCK_SHIFT = 12
# Blocks written by one call. The page cache keeps what one call wrote as one folio, and every later 4 KiB write into
# a large one costs by its size: 38 µs after 1 MiB, 3.3 µs after 16 KiB, 3.0 µs after 4 KiB.
_RUN_BLOCKS = 4
_ZEROS = bytes(1 << 20)
_CANNOT_PUNCH = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Content = memoryview | None  # of one block; None: zeros


class ReplicaFile:
    """One volume's replica. `size` is the volume's in bytes, `dirty_bytes` what was written since the last sync."""

    __slots__ = ("volume", "name", "path", "fd", "size", "dirty_bytes")

    def __init__(self, volume: int, name: str, path: str, size: int) -> None:
        """Opens the file, made if missing; longer than `size` is cut, shorter is lengthened by a hole. OSError."""
        self.volume, self.name, self.path = volume, name, path
        self.fd = storage.open_file(path, os.O_RDWR | os.O_CREAT)
        # Read ahead would bring neighbours in as large folios, see _RUN_BLOCKS; requests are still read whole.
        storage.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = storage.fstat(self.fd).st_size
        self.dirty_bytes = 0
        self.resize(size)

    def resize(self, size: int) -> None:
        """Raises OSError."""
        if size != self.size:
            storage.ftruncate(self.fd, size)
            self.size = size
            self.dirty_bytes += BLOCK_BYTES

    def read_into(self, target: memoryview, block: int, flags: int = 0) -> None:
        """Fills `target` (whole blocks) from `block` on; behind the volume's end are zeros.

        Raises BlockingIOError with RWF_NOWAIT, OSError, and CorruptionError for a file shorter than its volume.
        """
        offset, wanted = block << BLOCK_SHIFT, len(target)
        done = storage.preadv(self.fd, (target,), offset, flags)
        if done == wanted:
            return
        inside = min(wanted, self.size - offset)
        while done < inside:
            got = storage.preadv(self.fd, (target[done:inside],), offset + done)
            if not got:
                raise CorruptionError(
                    f"{self.path} is shorter than its volume of {self.size} bytes.", "Resync the volume."
                )
            done += got
        target[done:] = _ZEROS[: wanted - done] if wanted - done <= len(_ZEROS) else bytes(wanted - done)

    def data_run(self, block: int, end_block: int) -> tuple[int, int] | None:
        """The first run of blocks (from, to) in [block, end_block) that may hold data; the rest before it is hole."""
        try:
            start = storage.lseek(self.fd, block << BLOCK_SHIFT, storage.SEEK_DATA)
            if start >= end_block << BLOCK_SHIFT:
                return None
            stop = storage.lseek(self.fd, start, storage.SEEK_HOLE)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return None
            raise
        return start >> BLOCK_SHIFT, min(end_block, (stop + BLOCK_BYTES - 1) >> BLOCK_SHIFT)

    def will_need(self, block: int) -> None:
        """Asks for a block to be in the page cache soon; returns at once."""
        storage.posix_fadvise(self.fd, block << BLOCK_SHIFT, BLOCK_BYTES, os.POSIX_FADV_WILLNEED)

    def write_blocks(self, blocks: dict[int, Content]) -> None:
        """Writes whole blocks, neighbours together. May be repeated after an error. Raises OSError."""
        keys, fd, pwrite = [*sorted(blocks), -1], self.fd, storage.pwrite
        whole, alone, i, last = self.size >> BLOCK_SHIFT, 0, 0, len(blocks)
        while i < last:
            block, first = keys[i], i
            content = blocks[block]
            i += 1
            if content is not None and keys[i] != block + 1 and block < whole:  # the common case, without a call
                if pwrite(fd, content, block << BLOCK_SHIFT) != BLOCK_BYTES:
                    self._put(block, block + 1, [content])
                alone += 1
                continue
            hole = content is None
            run = [] if content is None else [content]
            while keys[i] == block + i - first and len(run) < _RUN_BLOCKS:
                content = blocks[keys[i]]
                if (content is None) is not hole:
                    break
                if content is not None:
                    run.append(content)
                i += 1
            self._put(block, block + i - first, run)
        self.dirty_bytes += alone << BLOCK_SHIFT

    def _put(self, start: int, end: int, run: list[memoryview]) -> None:
        offset, stop = start << BLOCK_SHIFT, end << BLOCK_SHIFT
        if stop > self.size:
            if stop - self.size >= BLOCK_BYTES:
                raise StorageError(f"{self.path}: blocks to {end} are beyond the volume of {self.size} bytes.")
            if run:
                run[-1] = run[-1][: self.size - stop]
            stop = self.size
        self.dirty_bytes += stop - offset
        if not run:
            self._zero(offset, stop)
            return
        done = storage.pwrite(self.fd, run[0], offset) if len(run) == 1 else storage.pwritev(self.fd, run, offset)
        if done != stop - offset:
            self._put_slowly(b"".join(run), offset, done)

    def _put_slowly(self, content: bytes, offset: int, done: int) -> None:
        """What a short write left over."""
        while done < len(content):
            done += storage.pwrite(self.fd, content[done:], offset + done)

    def _zero(self, offset: int, stop: int) -> None:
        try:
            storage.punch_hole(self.fd, offset, stop - offset)
        except OSError as e:
            if e.errno not in _CANNOT_PUNCH:
                raise
            while offset < stop:
                offset += storage.pwrite(self.fd, _ZEROS[: stop - offset], offset)

    def write_range(self, block: int, count: int, content: memoryview | None) -> None:
        """Blocks given as one buffer (None: zeros), for the way back. Raises OSError."""
        step = _RUN_BLOCKS if content is not None else count
        for first in range(0, count, step):
            last = min(first + step, count)
            run = [] if content is None else [content[first << BLOCK_SHIFT : last << BLOCK_SHIFT]]
            self._put(block + first, block + last, run)


class Replica:
    """A group's replica files, by the volume's number. Used by the apply thread; `sync_files` by a worker."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.files: dict[int, ReplicaFile] = {}
        self.kept: dict[str, str] = {}  # name -> file, left by a reset until a volume of that name is declared
        storage.makedirs(folder, exist_ok=True)

    def open(self, volume: int, name: str, file: str, size: int) -> ReplicaFile:
        """Opens what the committed position names. Raises OSError."""
        opened = ReplicaFile(volume, name, f"{self._folder}/{file}", size)
        self.files[volume] = opened
        return opened

    def declare(self, volume: int, name: str, size: int) -> ReplicaFile:
        """A volume as the journal declares it: a new file if it is not known, else made at least `size` long.

        A file that is left from a declaration that was never committed begins empty again.
        """
        known = self.files.get(volume)
        if known is not None:
            known.resize(max(size, known.size))
            return known
        if name in self.kept and not storage.exists(f"{self._folder}/{self.kept[name]}"):
            del self.kept[name]  # lost: a resync makes it again
        if name in self.kept:
            size_now = storage.stat(f"{self._folder}/{self.kept[name]}").st_size
            opened = self.open(volume, name, self.kept.pop(name), size_now)
            opened.resize(size)
            return opened
        taken = {os.path.basename(f.path) for f in self.files.values()} | set(self.kept.values())
        file = f"{name}.raw" if f"{name}.raw" not in taken else f"{name}.{volume}.raw"
        created = self.open(volume, name, file, 0)
        created.resize(size)
        storage.sync_folder(self._folder)
        return created

    def dirty_bytes(self) -> int:
        return sum(f.dirty_bytes for f in self.files.values())

    def take_dirty(self) -> list[int]:
        """Descriptors of the files to sync; what is written from now on counts as dirty again."""
        taken = [f for f in self.files.values() if f.dirty_bytes]
        for f in taken:
            f.dirty_bytes = 0
        return [f.fd for f in taken]

    def layout(self) -> Iterator[tuple[int, str, str, int]]:
        """(volume, name, file, size) of each, for the committed position."""
        for f in self.files.values():
            yield f.volume, f.name, os.path.basename(f.path), f.size

    def close(self) -> None:
        for f in self.files.values():
            storage.close(f.fd)
        self.files.clear()


def sync_files(descriptors: list[int]) -> None:
    """fdatasync of each. For a worker thread. Raises OSError: then nothing may be committed."""
    for fd in descriptors:
        storage.fdatasync(fd)
