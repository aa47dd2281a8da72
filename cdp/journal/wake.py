"""Waking readers in other processes: datagrams to the sockets that they bind beside their positions.

A datagram means only "look again": what there is to read is in `durable`, so a lost one costs a delay, never data.
Sockets are reached through the folder's descriptor, because a socket's path may have only 107 bytes.
"""

from __future__ import annotations

import os
import socket
import stat

from cdp import storage
from cdp.journal.consumers import FOLDER, SOCKET_SUFFIX, make_folder

# A folder's time stamp is as coarse as a tick of the kernel: a listing younger than this may miss a newcomer.
_SETTLED_NS = 50_000_000


def _socket() -> socket.socket:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    return s


class Waker:
    """The writer's side."""

    def __init__(self, folder: str) -> None:
        self._folder = storage.open_file(f"{folder}/{FOLDER}", os.O_RDONLY | os.O_DIRECTORY)
        self._socket = _socket()
        self._listed_ns = -1  # the folder's time stamp at a listing that can be relied on
        self._targets: list[str] = []

    def wake(self) -> None:
        """One byte to every reader that can take it now; a dead one is ignored (it looks when it comes back)."""
        changed_ns = storage.fstat(self._folder).st_mtime_ns
        if changed_ns != self._listed_ns:
            self._targets = [
                f"/proc/self/fd/{self._folder}/{name}"
                for name in storage.listdir(self._folder)
                if name.endswith(SOCKET_SUFFIX)
            ]
            settled = storage.wall_ns() - changed_ns > _SETTLED_NS
            self._listed_ns = changed_ns if settled else -1
        for target in self._targets:
            try:
                self._socket.sendto(b"\0", target)
            except OSError:
                continue  # it has unread ones already, is gone, or never was a reader: none of that stops production

    def close(self) -> None:
        self._socket.close()
        storage.close(self._folder)


class Bell:
    """The reader's side: `fileno` becomes readable when the writer published something."""

    def __init__(self, folder: str, name: str) -> None:
        """Takes the place of a socket that an earlier life left behind. Raises OSError."""
        make_folder(folder)
        self._folder = storage.open_file(f"{folder}/{FOLDER}", os.O_RDONLY | os.O_DIRECTORY)
        self._path = f"/proc/self/fd/{self._folder}/{name}{SOCKET_SUFFIX}"
        self._socket = _socket()
        if storage.exists(self._path) and stat.S_ISSOCK(storage.stat(self._path).st_mode):
            storage.unlink(self._path)
        self._socket.bind(self._path)
        self._inode = storage.stat(self._path).st_ino

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        try:
            while self._socket.recv(1):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Removes the socket, unless a later reader of the same name has put its own there."""
        self._socket.close()
        try:
            if storage.stat(self._path).st_ino == self._inode:
                storage.unlink(self._path)
        except FileNotFoundError:
            pass
        storage.close(self._folder)
