"""The client's side of the handshake, on a blocking socket: GO with structured replies and metadata contexts, LIST."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cdp.errors import CdpError, NotFoundError, RefusedError, UnreachableError
from cdp.nbd import wire
from cdp.nbd.listening import connect_unix, parse_address
from cdp.nbd.wire import ProtocolError

# Longest answer to one option: a name and a description with room to spare.
_MAX_ANSWER_BYTES = 64 << 10
# Answers to one option: more than any server here lists.
_MAX_ANSWERS = 100_000


class Opened(NamedTuple):
    """What GO agreed on."""

    size: int
    flags: int
    structured: bool
    contexts: dict[int, str]


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """A connected, greeted socket. Raises ConfigError, UnreachableError."""
    kind, host, port = parse_address(address)
    try:
        if kind == "unix":
            sock = connect_unix(host, timeout_seconds)
        else:
            sock = socket.create_connection((host, port), timeout_seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as e:
        raise UnreachableError(f"The NBD server at {address} cannot be reached ({e}).", "Is it running?") from e
    try:
        _greet(sock)
    except (OSError, ProtocolError) as e:
        sock.close()
        raise UnreachableError(f"What listens at {address} does not answer as an NBD server ({e}).") from e
    return sock


def _greet(sock: socket.socket) -> None:
    magic, option_magic, flags = struct.unpack(">8s8sH", exactly(sock, 18))
    if magic != wire.INIT_MAGIC or option_magic != wire.OPTION_MAGIC or not flags & wire.FLAG_FIXED_NEWSTYLE:
        raise ProtocolError("no fixed newstyle greeting")
    no_zeroes = wire.FLAG_C_NO_ZEROES if flags & wire.FLAG_NO_ZEROES else 0
    sock.sendall(struct.pack(">I", wire.FLAG_C_FIXED_NEWSTYLE | no_zeroes))


def exactly(sock: socket.socket, length: int) -> bytes:
    """That many bytes. Raises OSError, ConnectionResetError at the end of the stream."""
    got = bytearray()
    while len(got) < length:
        piece = sock.recv(length - len(got))
        if not piece:
            raise ConnectionResetError(104, "the server closed the connection")
        got += piece
    return bytes(got)


def _ask(sock: socket.socket, option: int, payload: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """The answers to an option up to its ACK. An error reply is raised: NotFoundError, RefusedError."""
    sock.sendall(wire.OPTION.pack(wire.OPTION_MAGIC, option, len(payload)) + payload)
    for _ in range(_MAX_ANSWERS):
        magic, answered, kind, length = wire.OPTION_REPLY.unpack(exactly(sock, wire.OPTION_REPLY.size))
        if magic != wire.OPTION_REPLY_MAGIC or answered != option or length > _MAX_ANSWER_BYTES:
            raise ProtocolError(f"reply to option {option} is malformed")
        answer = exactly(sock, length)
        if kind == wire.REP_ACK:
            return
        if kind & wire.REP_ERROR:
            text = answer.decode(errors="replace") or f"The server refuses (reply {kind - wire.REP_ERROR})."
            raise NotFoundError(text) if kind == wire.REP_ERR_UNKNOWN else RefusedError(text)
        yield kind, answer
    raise ProtocolError(f"option {option} is answered without end")


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw


def go(sock: socket.socket, name: str, contexts: Sequence[str]) -> Opened:
    """Opens an export. Raises NotFoundError, RefusedError (with the server's text), OSError, ProtocolError."""
    structured = True
    try:
        list(_ask(sock, wire.OPT_STRUCTURED_REPLY))
    except CdpError:
        structured = False
    agreed: dict[int, str] = {}
    if contexts and structured:
        queries = struct.pack(">I", len(contexts)) + b"".join(_string(context) for context in contexts)
        try:
            for kind, answer in _ask(sock, wire.OPT_SET_META_CONTEXT, _string(name) + queries):
                if kind == wire.REP_META_CONTEXT and len(answer) > 4:
                    agreed[int.from_bytes(answer[:4], "big")] = answer[4:].decode(errors="replace")
        except CdpError:
            agreed = {}  # GO says why, if it is the export
    size = flags = None
    for kind, answer in _ask(sock, wire.OPT_GO, _string(name) + struct.pack(">H", 0)):
        if kind == wire.REP_INFO and answer[:2] == b"\0\0" and len(answer) == 12:
            _, size, flags = struct.unpack(">HQH", answer)
    if size is None or flags is None:
        raise ProtocolError("GO does not tell the size")
    return Opened(size, flags, structured, agreed)


def list_exports(sock: socket.socket) -> list[tuple[str, str]]:
    """(name, description) of everything the server lists, then says goodbye. Raises as `go`."""
    found = []
    for kind, answer in _ask(sock, wire.OPT_LIST):
        if kind == wire.REP_SERVER and len(answer) >= 4:
            length = int.from_bytes(answer[:4], "big")
            name, description = answer[4 : 4 + length], answer[4 + length :]
            found.append((name.decode(errors="replace"), description.decode(errors="replace")))
    list(_ask(sock, wire.OPT_ABORT))
    return found
