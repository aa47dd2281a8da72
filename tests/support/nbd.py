"""An NBD client of the tests' own, written from the protocol document and sharing nothing with the product.

It speaks fixed newstyle with GO and simple replies, one connection, and can keep many requests in flight.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path
from types import TracebackType

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FUA, NO_HOLE = 1, 2

_MAGIC = 0x4E42444D41474943
_OPTION = 0x49484156454F5054
_OPTION_REPLY = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPT_GO = 7
_REP_ACK, _REP_INFO = 1, 3
TIMEOUT_SECONDS = 60.0


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host, int(port)


class NbdRefused(Exception):
    """The server refused the export; the text is its reason."""


class NbdClient:
    """`NbdClient(path, "db@seq:4")`, or `tcp:host:port` for the path; use it as a context manager."""

    def __init__(self, path: Path | str, export: str, timeout: float = TIMEOUT_SECONDS) -> None:
        tcp = str(path).startswith("tcp:")
        self.socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.size = self.flags = 0
        self._cookie = 0
        self._reads: dict[int, int] = {}
        try:
            self.socket.connect(_host_and_port(str(path)) if tcp else str(path))
            if tcp:
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._handshake(export.encode())
        except BaseException:
            self.socket.close()
            raise

    def _exact(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            parts += part
        return bytes(parts)

    def _handshake(self, export: bytes) -> None:
        magic, option, flags = struct.unpack(">QQH", self._exact(18))
        if magic != _MAGIC or option != _OPTION or not flags & 1:
            raise ConnectionError("not a fixed newstyle NBD server")
        payload = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self.socket.sendall(
            struct.pack(">I", flags & 3) + struct.pack(">QII", _OPTION, _OPT_GO, len(payload)) + payload
        )
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._exact(20))
            if magic != _OPTION_REPLY:
                raise ConnectionError("bad magic in an option reply")
            data = self._exact(length)
            if kind == _REP_ACK:
                return
            if kind & 0x80000000:
                raise NbdRefused(data.decode(errors="replace") or f"error {kind & 0x7FFFFFFF}")
            if kind == _REP_INFO and struct.unpack_from(">H", data)[0] == 0:
                _, self.size, self.flags = struct.unpack(">HQH", data)

    # --- many in flight

    def send(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Sends one request; its cookie."""
        self._cookie += 1
        if command == READ:
            self._reads[self._cookie] = length
        header = _REQUEST.pack(0x25609513, flags, command, self._cookie, offset, len(data) or length)
        self.socket.sendall(header + data)
        return self._cookie

    def receive(self) -> tuple[int, int, bytes]:
        """(cookie, errno, data) of the next reply."""
        magic, error, cookie = _REPLY.unpack(self._exact(_REPLY.size))
        if magic != 0x67446698:
            raise ConnectionError("bad magic in a reply")
        length = self._reads.pop(cookie, 0)
        return cookie, error, self._exact(length) if length and not error else b""

    # --- one at a time

    def call(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> bytes:
        """One request and its reply. Raises OSError with the server's errno."""
        sent = self.send(command, offset, length, data, flags)
        cookie, error, payload = self.receive()
        if cookie != sent:
            raise ConnectionError(f"a reply to {cookie}, which was not asked")
        if error:
            raise OSError(error, os.strerror(error) if error in errno.errorcode else f"NBD error {error}")
        return payload

    def read(self, offset: int, length: int) -> bytes:
        return self.call(READ, offset, length)

    def read_all(self) -> bytes:
        """The whole export, which must be small."""
        step = 1 << 20
        return b"".join(self.read(at, min(step, self.size - at)) for at in range(0, self.size, step))

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.call(WRITE, offset, 0, data, flags)

    def flush(self) -> None:
        self.call(FLUSH)

    def trim(self, offset: int, length: int) -> None:
        self.call(TRIM, offset, length)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(WRITE_ZEROES, offset, length, b"", flags)

    def close(self) -> None:
        """A polite goodbye, if the server is still there."""
        try:
            self.send(DISC)
        except OSError:
            pass
        self.socket.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
