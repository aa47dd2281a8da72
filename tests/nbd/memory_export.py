"""Small real exports for tests and measurements: a file, answered inside `submit`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from cdp.errors import NotFoundError
from cdp.nbd.connection import Connection
from cdp.nbd.contract import Export, Request
from cdp.nbd.loop import Loop
from cdp.nbd.wire import BLOCK_STATUS, CACHE, FLUSH, READ, WRITE


class FileExport(Export):
    """A file served as it is."""

    contexts = ("base:allocation",)
    multi_conn = True

    def __init__(self, path: str, read_only: bool = False) -> None:
        self.fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.read_only = read_only

    def submit(self, connection: Connection, requests: list[Request]) -> None:
        done, fd, pwrite = [], self.fd, os.pwrite
        for command, flags, cookie, offset, length, data in requests:
            if command == WRITE:
                pwrite(fd, data, offset)
                done.append(cookie)
            elif command == READ:
                os.preadv(fd, [connection.slot(cookie, offset, length)], offset)
            else:
                self.rarer(connection, command, flags, cookie, offset, length)
        if done:
            connection.done_many(done)

    def rarer(self, connection: Connection, command: int, flags: int, cookie: bytes, offset: int, length: int) -> None:
        if command == BLOCK_STATUS:
            for context in connection.contexts:
                connection.extents(cookie, context, self.allocation(offset, length))
            return
        if command == FLUSH:
            os.fdatasync(self.fd)
        elif command != CACHE:
            for start in range(offset, offset + length, 1 << 20):
                os.pwrite(self.fd, bytes(min(1 << 20, offset + length - start)), start)
        connection.done(cookie)

    def allocation(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        from cdp.storage import data_extents

        at = offset
        for start, count in data_extents(self.fd, offset, offset + length):
            if start > at:
                yield start - at, 3
            yield count, 0
            at = start + count
        if at < offset + length:
            yield offset + length - at, 3


class OneExport:
    """Exports: one, under any of its names."""

    def __init__(self, export: Export, *names: str) -> None:
        self.export = export
        self.all_names = names or ("", "x")

    def names(self) -> Iterable[tuple[str, str]]:
        return [(name, "a test export") for name in self.all_names]

    def open(self, name: str, peer: str) -> Export:
        if name not in self.all_names:
            raise NotFoundError(f"There is no export {name!r}.")
        return self.export


if __name__ == "__main__":
    loop = Loop(OneExport(FileExport(sys.argv[2])))
    print(loop.listen(sys.argv[1]), flush=True)
    loop.run()
