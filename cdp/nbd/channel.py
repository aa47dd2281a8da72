"""Requests in flight on a client's connection: sends while it receives, so that neither side waits for the other.

A failed request is an OSError with the server's errno. When the connection itself fails, everything in flight and
everything after it fails with that error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cdp.nbd import wire
from cdp.nbd.client_handshake import Opened

# One receive; replies of 4 KiB reads come some dozen at a time.
_RECEIVE_BYTES = 256 << 10
# Largest chunk that is no READ's data: a BLOCK_STATUS of many extents.
_MAX_CHUNK_BYTES = 32 << 20

Extents = list[tuple[int, int]]


@dataclass
class InFlight:
    """One request, and what came of it so far. `data` is a READ's payload, zeros where the server sent a hole."""

    command: int
    offset: int
    data: bytearray
    error: OSError | None = None
    extents: dict[str, Extents] = field(default_factory=dict)
    done: bool = False
    then: Callable[[InFlight], None] | None = None


class Channel:
    """Takes a socket over after GO. `silence_seconds`: how long the server may say nothing while it owes a reply."""

    def __init__(self, sock: socket.socket, opened: Opened, silence_seconds: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._opened = opened
        self._silence_seconds = silence_seconds
        self._cookie = 0
        self._in_flight: dict[int, InFlight] = {}
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._at = self._end = 0
        self._broken: OSError | None = None

    def __len__(self) -> int:
        return len(self._in_flight)

    def send(
        self, command: int, flags: int, offset: int, length: int, payload: bytes | bytearray | memoryview | None = None,
        then: Callable[[InFlight], None] | None = None,
    ) -> InFlight:  # fmt: skip
        """Sends a request; `then` runs when it is answered, inside a later `send` or `receive`. Raises OSError."""
        self._check()
        self._cookie += 1
        request = InFlight(command, offset, bytearray(length if command == wire.READ else 0), then=then)
        self._in_flight[self._cookie] = request
        head = wire.REQUEST.pack(
            wire.REQUEST_MAGIC, flags, command, self._cookie.to_bytes(8, "big"), offset, length
        )  # fmt: skip
        self._push(head)
        if payload is not None:
            self._push(payload)
        return request

    def say_goodbye(self) -> None:
        """DISC if the socket takes it at once, and closes."""
        with contextlib.suppress(OSError):  # it may be gone already
            self._sock.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.DISC, bytes(8), 0, 0))
        self._sock.close()
        self._broken = self._broken or OSError(errno.EBADF, "the connection is closed")

    def receive(self) -> None:
        """One reply, or one chunk of one. Raises OSError when the connection fails."""
        self._check()
        answered = None
        try:
            answered = self._receive()
        except OSError as e:
            self._fail(e)
            raise
        except (struct.error, KeyError, ValueError, UnicodeDecodeError) as e:
            self._fail(OSError(errno.EPROTO, f"the NBD server broke the protocol: {e}"))
            self._check()
        if answered is not None and answered.then is not None:
            answered.then(answered)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _fail(self, error: OSError) -> None:
        self._broken = error
        self._sock.close()
        for request in self._in_flight.values():
            request.error, request.done = error, True
        self._in_flight.clear()

    def _wait(self, events: int) -> int:
        poll = select.poll()
        poll.register(self._sock, events)
        ready = poll.poll(self._silence_seconds * 1000)
        if not ready:
            raise TimeoutError(errno.ETIMEDOUT, f"the NBD server was silent for {self._silence_seconds:g} s")
        return ready[0][1]

    def _push(self, data: bytes | bytearray | memoryview) -> None:
        """Sends all of it; while the server does not read, its replies are received: it may wait for that."""
        rest = memoryview(data).cast("B")
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                if self._at < self._end or self._wait(select.POLLIN | select.POLLOUT) & select.POLLIN:
                    self.receive()
            except OSError as e:
                self._fail(e)
                raise

    # --- replies

    def _fill(self, target: memoryview) -> None:
        """The next bytes of the stream; large ones go straight where they belong."""
        while target:
            if self._at == self._end:
                direct = len(target) >= _RECEIVE_BYTES
                got = self._some(target if direct else self._buffer)
                if direct:
                    target = target[got:]
                    continue
                self._at, self._end = 0, got
            count = min(len(target), self._end - self._at)
            target[:count] = self._buffer[self._at : self._at + count]
            self._at += count
            target = target[count:]

    def _some(self, target: memoryview) -> int:
        while True:
            try:
                got = self._sock.recv_into(target)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            if not got:
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
            return got

    def _take(self, length: int) -> bytearray:
        taken = bytearray(length)
        self._fill(memoryview(taken))
        return taken

    def _receive(self) -> InFlight | None:
        """The request that is answered whole with it."""
        head = self._take(wire.SIMPLE_BYTES)
        magic, number, raw_cookie = wire.SIMPLE.unpack(head)
        cookie = int.from_bytes(raw_cookie, "big")
        if magic == wire.SIMPLE_MAGIC:
            request, last = self._in_flight[cookie], True
            if number:
                request.error = _refused(number)
            elif request.command == wire.READ:
                if self._opened.structured:
                    raise ValueError("a simple reply to a READ")
                self._fill(memoryview(request.data))
        elif magic == wire.CHUNK_MAGIC:
            _, flags, kind, _, length = wire.CHUNK.unpack(head + self._take(wire.CHUNK_BYTES - len(head)))
            request, last = self._in_flight[cookie], bool(flags & wire.CHUNK_DONE)
            self._chunk(request, kind, length)
        else:
            raise ValueError(f"a reply begins with {magic:#010x}")
        if not last:
            return None
        del self._in_flight[cookie]
        request.done = True
        return request

    def _chunk(self, request: InFlight, kind: int, length: int) -> None:
        if length > _MAX_CHUNK_BYTES + 8:
            raise ValueError(f"a chunk of {length} bytes")
        if kind == wire.TYPE_OFFSET_DATA:
            (offset,) = struct.unpack(">Q", self._take(8))
            self._fill(_part(request, offset, length - 8))
            return
        payload = self._take(length)
        if kind == wire.TYPE_OFFSET_HOLE:
            _part(request, *struct.unpack(">QI", payload))
        elif kind == wire.TYPE_BLOCK_STATUS:
            context, *numbers = struct.unpack(f">{length // 4}I", payload)
            pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
            request.extents[self._opened.contexts[context]] = pairs
        elif kind & (1 << 15):
            number, size = wire.CHUNK_ERROR.unpack_from(payload)
            request.error = _refused(number, payload[6 : 6 + size].decode(errors="replace"))
        elif kind != wire.TYPE_NONE:
            raise ValueError(f"a chunk of kind {kind}")


def _part(request: InFlight, offset: int, length: int) -> memoryview:
    start = offset - request.offset
    if start < 0 or length <= 0 or start + length > len(request.data):
        raise ValueError("data that was not asked for")
    return memoryview(request.data)[start : start + length]


def _refused(number: int, text: str = "") -> OSError:
    return OSError(number, f"the NBD server answered: {text or os.strerror(number)}")
