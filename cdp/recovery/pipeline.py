"""Many requests in flight on one NBD connection: what makes a copy as fast as the servers.

Requests are sent in bunches and answered in any order; the caller bounds how many it has in flight. A reply is bytes of
a READ, extents by context of a BLOCK_STATUS, or nothing. An error of the server is an OSError with its errno, and so is
a connection that ended or stalled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable
from io import BufferedReader
from typing import Any

from cdp.nbd import wire

# The longest that a server may be silent: a FLUSH over a slow disk's whole cache.
SILENCE_SECONDS = 120.0
_RECEIVE_BYTES = 1 << 20
# More data than was asked for would be a server out of order; a BLOCK_STATUS answers with 8 bytes an extent.
_MAX_STATUS_BYTES = 16 << 20

# command, flags, offset, length, payload of a WRITE
Request = tuple[int, int, int, int, "bytearray | bytes | None"]
Extents = list[tuple[int, int]]  # length, flags


class _Waiting:
    """A request that is not answered whole."""

    __slots__ = ("buffer", "context_extents", "done", "error", "offset")

    def __init__(self, offset: int, read_bytes: int) -> None:
        self.offset = offset
        self.buffer = bytearray(read_bytes)
        self.context_extents: dict[str, Extents] = {}
        self.done = False
        self.error: OSError | None = None


class Pipeline:
    """Takes over a connected socket after its handshake; `contexts` names the agreed ids."""

    def __init__(self, sock: socket.socket, contexts: dict[int, str]) -> None:
        self._sock = sock
        self._sock.settimeout(SILENCE_SECONDS)
        self._file = BufferedReader(socket.SocketIO(sock, "r"), _RECEIVE_BYTES)
        self._contexts = contexts
        self._next_cookie = 1
        self._waiting: dict[int, _Waiting] = {}

    def close(self) -> None:
        """Says goodbye if it can; idempotent."""
        if self._sock.fileno() >= 0:
            with contextlib.suppress(OSError):  # it may be gone already
                self._sock.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.DISC, bytes(8), 0, 0))
            self._file.close()
            self._sock.close()

    def send(self, requests: Iterable[Request]) -> list[int]:
        """Sends a bunch; its cookies, in order. Raises OSError."""
        pieces: list[Any] = []
        cookies = []
        for command, flags, offset, length, payload in requests:
            cookie = self._next_cookie
            self._next_cookie += 1
            pieces.append(
                wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, cookie.to_bytes(8, "big"), offset, length)
            )
            if payload is not None:
                pieces.append(payload)
            self._waiting[cookie] = _Waiting(offset, length if command == wire.READ else 0)
            cookies.append(cookie)
        self._sock.sendall(b"".join(pieces))
        return cookies

    def read(self, cookie: int) -> bytearray:
        """The bytes of a READ that was sent."""
        return self._wait(cookie).buffer

    def extents(self, cookie: int) -> dict[str, Extents]:
        """The extents of a BLOCK_STATUS that was sent, by context."""
        return self._wait(cookie).context_extents

    def done(self, cookies: Iterable[int]) -> None:
        """Waits for all of them; raises the first error after every one was answered."""
        error: OSError | None = None
        for cookie in cookies:
            try:
                self._wait(cookie)
            except OSError as e:
                if cookie in self._waiting:
                    raise  # the connection, not the request
                error = error or e
        if error is not None:
            raise error

    def _wait(self, cookie: int) -> _Waiting:
        waiting = self._waiting[cookie]
        while not waiting.done:
            self._receive()
        del self._waiting[cookie]
        if waiting.error is not None:
            raise waiting.error
        return waiting

    # --- replies

    def _exact(self, length: int) -> bytes:
        data: bytes = self._file.read(length)
        if len(data) != length:
            raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
        return data

    def _receive(self) -> None:
        """One simple reply or one chunk."""
        head = self._exact(wire.SIMPLE_BYTES)
        magic, error, cookie = wire.SIMPLE.unpack(head)
        if magic == wire.SIMPLE_MAGIC:
            self._simple(self._of(cookie), error)
        elif magic == wire.CHUNK_MAGIC:
            _, flags, kind, cookie, length = wire.CHUNK.unpack(head + self._exact(wire.CHUNK_BYTES - len(head)))
            self._chunk(self._of(cookie), flags, kind, length)
        else:
            raise _broken(f"a reply begins with {magic:#x}")

    def _of(self, cookie: bytes) -> _Waiting:
        waiting = self._waiting.get(int.from_bytes(cookie, "big"))
        if waiting is None or waiting.done:
            raise _broken("it answers what was not asked")
        return waiting

    def _simple(self, waiting: _Waiting, error: int) -> None:
        waiting.done = True
        if error:
            waiting.error = OSError(error, f"the NBD server answered: {os.strerror(error)}")
        elif waiting.buffer:
            self._fill(memoryview(waiting.buffer))

    def _fill(self, target: memoryview) -> None:
        if self._file.readinto(target) != len(target):
            raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")

    def _chunk(self, waiting: _Waiting, flags: int, kind: int, length: int) -> None:
        if kind == wire.TYPE_OFFSET_DATA and length > 8:
            (offset,) = struct.unpack(">Q", self._exact(8))
            self._fill(_part(waiting, offset, length - 8))
        elif length > _MAX_STATUS_BYTES:
            raise _broken(f"a chunk of {length} bytes")
        else:
            self._small_chunk(waiting, kind, self._exact(length))
        waiting.done = bool(flags & wire.CHUNK_DONE)

    def _small_chunk(self, waiting: _Waiting, kind: int, payload: bytes) -> None:
        if kind == wire.TYPE_OFFSET_HOLE and len(payload) == 12:
            _part(waiting, *struct.unpack(">QI", payload))  # the buffer was made of zeros
        elif kind == wire.TYPE_BLOCK_STATUS and len(payload) >= 4 and len(payload) % 8 == 4:
            context, *numbers = struct.unpack(f">{len(payload) // 4}I", payload)
            pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
            waiting.context_extents[self._contexts.get(context, "")] = pairs
        elif kind & 0x8000 and len(payload) >= 6:
            number, size = wire.CHUNK_ERROR.unpack_from(payload)
            text = payload[6 : 6 + size].decode("utf-8", "replace") or os.strerror(number)
            waiting.error = OSError(number, f"the NBD server answered: {text}")
        elif kind != wire.TYPE_NONE:
            raise _broken(f"a chunk of kind {kind} with {len(payload)} bytes")


def _part(waiting: _Waiting, offset: int, length: int) -> memoryview:
    start = offset - waiting.offset
    if start < 0 or start + length > len(waiting.buffer):
        raise _broken("it answers with bytes that were not asked for")
    return memoryview(waiting.buffer)[start : start + length]


def _broken(what: str) -> OSError:
    return OSError(errno.EPROTO, f"the NBD server broke the protocol: {what}")
