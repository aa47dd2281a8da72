"""How far the remote carrier has acknowledged a journal: datagrams from the relay to the collector beside it.

A datagram says what is so now, and says it again every second, so that one that is lost, or a side that was away, costs
a delay and nothing else. It is made as small as a datagram can be told apart::

    0   magic   4s   b"CDPA"
    4   fenced  u32  1: another history, or a newer incarnation, has the topic
    8   epoch   u64  of the incarnation that the topic was claimed for
    16  seq     u64  the topic has everything up to here without a hole
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

from cdp import storage

MAGIC = b"CDPA"
_FORMAT = struct.Struct("<4sIQQ")
SOCKET_NAME = "acknowledged.sock"
# One look takes this many: more than a relay says between two, and the loop has others to serve.
MAX_DRAINED = 64


class Acknowledged(NamedTuple):
    """What the relay says: see the format above."""

    epoch: int
    seq: int
    fenced: bool


class Ear:
    """The collector's side, bound in the journal's folder."""

    def __init__(self, folder: str) -> None:
        """Takes the place of a socket that an earlier life left behind (the caller holds the lock). Raises OSError."""
        self._folder = storage.open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
        path = f"/proc/self/fd/{self._folder}/{SOCKET_NAME}"
        self._socket = _socket()
        if os.path.lexists(path):
            storage.unlink(path)
        self._socket.bind(path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> list[Acknowledged]:
        """What has come since; what is no such datagram is passed over, for it promises nothing."""
        found = []
        for _ in range(MAX_DRAINED):
            try:
                raw = self._socket.recv(_FORMAT.size + 1)
            except BlockingIOError:
                break
            if len(raw) == _FORMAT.size and raw.startswith(MAGIC):
                _, fenced, epoch, seq = _FORMAT.unpack(raw)
                found.append(Acknowledged(epoch, seq, bool(fenced)))
        return found

    def close(self) -> None:
        self._socket.close()
        storage.close(self._folder)


class Mouth:
    """The relay's side."""

    def __init__(self, folder: str) -> None:
        """Raises OSError."""
        self._folder = storage.open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._socket = _socket()
        self._said: Acknowledged | None = None

    def say(self, news: Acknowledged, again: bool = False) -> bool:
        """Tells the collector what it does not know yet; with `again` also what it was told. False: there was no room
        for it now; say it again soon."""
        if news == self._said and not again:
            return True
        raw = _FORMAT.pack(MAGIC, news.fenced, news.epoch, news.seq)
        try:
            self._socket.sendto(raw, f"/proc/self/fd/{self._folder}/{SOCKET_NAME}")
        except BlockingIOError:
            self._said = None
            return False
        except OSError:
            pass  # the collector is away, or waits for nobody; who comes hears it within a second
        self._said = news
        return True

    def close(self) -> None:
        self._socket.close()
        storage.close(self._folder)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
