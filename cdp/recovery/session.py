"""One NBD session of recovery's own: opens an export and keeps a pipeline of requests on it.

What the server refuses comes back as the error that it is: NotFoundError, RefusedError with the server's words, and
UnreachableError for a server that is not there or stops.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from cdp.errors import ConfigError, NotFoundError, RefusedError, UnreachableError
from cdp.nbd import wire
from cdp.recovery.pipeline import Extents, Pipeline

# A server under load answers a handshake in well under a second; opening a point takes milliseconds.
HANDSHAKE_SECONDS = 30.0
# The longest answer to an option: an error text.
_MAX_ANSWER_BYTES = 64 << 10


class Session:
    """An open export."""

    def __init__(self, pipeline: Pipeline, size: int) -> None:
        self.pipeline, self.size = pipeline, size

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pipeline.close()

    def block_status(self, offset: int, length: int) -> dict[str, Extents]:
        """(length, flags) by context, from `offset` on, for at least the beginning of the range. Raises OSError."""
        return self.pipeline.extents(self.pipeline.send([(wire.BLOCK_STATUS, 0, offset, length, None)])[0])

    def flush(self) -> None:
        """What was written is durable. Raises OSError."""
        self.pipeline.done(self.pipeline.send([(wire.FLUSH, 0, 0, 0, None)]))


def connect(address: str, name: str, contexts: Sequence[str] = ()) -> Session:
    """Opens the export `name` at `unix:/path` or `tcp:host:port`, with those of the contexts that it offers.

    Raises ConfigError, NotFoundError, RefusedError, UnreachableError.
    """
    sock = _socket(address)
    try:
        return _negotiate(sock, name, contexts)
    except OSError as e:
        sock.close()
        raise UnreachableError(f"The NBD server at {address} does not answer ({e}).", "Is it running?") from None
    except BaseException:
        sock.close()
        raise


def _socket(address: str) -> socket.socket:
    kind, _, where = address.partition(":")
    try:
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(HANDSHAKE_SECONDS)
                sock.connect(where)
            except BaseException:
                sock.close()
                raise
            return sock
        host, _, port = where.rpartition(":")
        if kind != "tcp" or not port.isdecimal():
            raise ConfigError(f"{address!r} is no NBD address.", "Write unix:/path or tcp:host:port.")
        sock = socket.create_connection((host.strip("[]"), int(port)), HANDSHAKE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except OSError as e:
        raise UnreachableError(f"The NBD server at {address} cannot be reached ({e}).", "Is it running?") from None


def _negotiate(sock: socket.socket, name: str, contexts: Sequence[str]) -> Session:
    init, option, _ = struct.unpack(">8s8sH", _exact(sock, 18))
    if init != wire.INIT_MAGIC or option != b"IHAVEOPT":
        raise OSError("it does not speak NBD")
    sock.sendall(struct.pack(">I", wire.FLAG_C_FIXED_NEWSTYLE | wire.FLAG_C_NO_ZEROES))
    _option(sock, wire.OPT_STRUCTURED_REPLY, b"")
    raw_name = name.encode()
    ids: dict[int, str] = {}
    if contexts:
        queries = b"".join(struct.pack(">I", len(c)) + c.encode() for c in contexts)
        payload = struct.pack(">I", len(raw_name)) + raw_name + struct.pack(">I", len(contexts)) + queries
        for kind, answer in _option(sock, wire.OPT_SET_META_CONTEXT, payload):
            if kind == wire.REP_META_CONTEXT:
                ids[int.from_bytes(answer[:4], "big")] = answer[4:].decode()
    payload = struct.pack(">I", len(raw_name)) + raw_name + struct.pack(">H", 0)
    size = None
    for kind, answer in _option(sock, wire.OPT_GO, payload):
        if kind == wire.REP_INFO and len(answer) >= 10 and answer[:2] == b"\0\0":
            size = int.from_bytes(answer[2:10], "big")
    if size is None:
        raise OSError("it does not say the size of the export")
    return Session(Pipeline(sock, ids), size)


def _option(sock: socket.socket, option: int, payload: bytes) -> list[tuple[int, bytes]]:
    """Everything that an option is answered with before its ACK."""
    sock.sendall(wire.OPTION.pack(b"IHAVEOPT", option, len(payload)) + payload)
    answers: list[tuple[int, bytes]] = []
    while True:
        magic, _, kind, length = wire.OPTION_REPLY.unpack(_exact(sock, wire.OPTION_REPLY.size))
        if magic != wire.OPTION_REPLY_MAGIC or length > _MAX_ANSWER_BYTES:
            raise OSError("it does not speak fixed newstyle NBD")
        answer = _exact(sock, length)
        if kind == wire.REP_ACK:
            return answers
        if kind & wire.REP_ERROR:
            _refuse(kind, answer.decode("utf-8", "replace"))
        answers.append((kind, answer))


def _refuse(kind: int, text: str) -> None:
    if kind == wire.REP_ERR_SHUTDOWN:
        raise OSError("it is stopping")
    if kind == wire.REP_ERR_UNKNOWN:
        raise NotFoundError(text)
    raise RefusedError(text)


def _exact(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise OSError("it closed the connection")
        data += more
    return data
