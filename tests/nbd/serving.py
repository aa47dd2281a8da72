"""A real loop on a thread of its own, for tests; and raw sockets that speak as much of the protocol as a test wants."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cdp.nbd import wire
from cdp.nbd.client_handshake import connect, exactly, go
from cdp.nbd.contract import Exports, Limits
from cdp.nbd.loop import Loop

WAIT_SECONDS = 10.0
SIZE = 64 << 20  # of the image in `conftest.py`


class Server:
    """`loop` runs until the block ends; `call` runs something on its thread."""

    def __init__(self, loop: Loop, address: str, thread: threading.Thread) -> None:
        self.loop, self.address, self.thread = loop, address, thread
        self.path = address.removeprefix("unix:")

    def uri(self, export: str = "x") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"


@contextmanager
def serving(exports: Exports, folder: object, limits: Limits | None = None) -> Iterator[Server]:
    loop = Loop(exports, limits)
    address = loop.listen(f"unix:{folder}/nbd.sock")
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    try:
        yield Server(loop, address, thread)
        assert thread.is_alive() or loop.stopping, "the loop ended by itself"
    finally:
        loop.stop()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Waits for a condition, with a limit."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        threading.Event().wait(0.005)


def opened(server: Server, structured: bool = True, export: str = "x") -> socket.socket:
    """A raw socket behind its handshake."""
    sock = connect(server.address, WAIT_SECONDS)
    if structured:
        go(sock, export, ())
        return sock
    raw = export.encode()
    payload = struct.pack(">I", len(raw)) + raw + b"\0\0"
    sock.sendall(wire.OPTION.pack(wire.OPTION_MAGIC, wire.OPT_GO, len(payload)) + payload)
    while True:
        _, _, kind, length = wire.OPTION_REPLY.unpack(exactly(sock, 20))
        exactly(sock, length)
        if kind == wire.REP_ACK:
            return sock


def request(command: int, offset: int, length: int, cookie: int = 1, flags: int = 0, data: bytes = b"") -> bytes:
    return (
        wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, cookie.to_bytes(8, "big"), offset, length) + data
    )


def at_end(sock: socket.socket) -> bool:
    """Whether the server closed: reads up to the end of the stream."""
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionError:
        pass
    return True


def on_loop(server: Server, call: Callable[[], object]) -> None:
    """Runs something on the loop's thread, through a descriptor it watches."""
    done = threading.Event()
    read, write = os.pipe()

    def run() -> None:
        server.loop.remove_reader(read)
        call()
        done.set()

    server.loop.add_reader(read, run)
    os.write(write, b"x")
    assert done.wait(WAIT_SECONDS)
    os.close(read)
    os.close(write)
