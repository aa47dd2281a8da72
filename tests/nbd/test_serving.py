"""The loop under real clients of ours: every command, late answers, errors, and what a rude client costs the others."""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path

import pytest

from cdp.errors import NotFoundError, UnreachableError
from cdp.nbd import wire
from cdp.nbd.client import Client, list_exports
from cdp.nbd.client_handshake import exactly
from cdp.nbd.connection import Connection
from cdp.nbd.contract import Limits, Request
from tests.nbd.memory_export import FileExport, OneExport
from tests.nbd.serving import SIZE, WAIT_SECONDS, Server, at_end, on_loop, opened, request, serving, until


class LateExport(FileExport):
    """Answers nothing inside `submit`: what the loop's owner asks for later, in `answer`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.owed: list[tuple[Connection, Request]] = []

    def submit(self, connection: Connection, requests: list[Request]) -> None:
        for command, flags, cookie, offset, length, data in requests:
            kept = None if data is None else memoryview(bytes(data))
            self.owed.append((connection, (command, flags, cookie, offset, length, kept)))

    def answer(self) -> None:
        owed, self.owed = self.owed, []
        for connection, (command, _, cookie, offset, length, data) in owed:
            if command == wire.READ:
                connection.data(cookie, offset, os.pread(self.fd, length, offset))
            else:
                if data is not None:
                    os.pwrite(self.fd, data, offset)
                connection.done(cookie)


def test_every_command(server: Server) -> None:
    model = bytearray(SIZE)
    with Client.connect(server.uri(), contexts=["base:allocation"]) as c:
        assert (c.size, c.read_only, c.contexts) == (SIZE, False, ("base:allocation",))
        for offset, length in [(0, 1), (4095, 3), (1 << 20, 5 << 20), (33, 32 << 20), (SIZE - 7, 7)]:
            data = os.urandom(length)
            c.write(offset, data, fua=length == 1)
            model[offset : offset + length] = data
            assert c.read(offset, length) == data
        c.zero(100, 5000, no_hole=True)
        c.trim(1 << 20, 1 << 20)
        model[100:5100] = bytes(5000)
        model[1 << 20 : 2 << 20] = bytes(1 << 20)
        c.flush()
        c.cache(0, 1 << 20)
        assert c.read(0, 32 << 20) + c.read(32 << 20, 32 << 20) == model
        status = c.block_status(0, SIZE)["base:allocation"]
        assert sum(length for length, _ in status) == SIZE and {flags for _, flags in status} == {0, 3}
        assert c.block_status(0, SIZE, one=True)["base:allocation"] == status[:1]
        assert c.read(5, 0) == b""
        for call, number in [
            (lambda: c.read(SIZE, 1), errno.EINVAL),
            (lambda: c.write(SIZE - 1, b"ab"), errno.ENOSPC),
            (lambda: c.write(0, bytes((32 << 20) + 1)), errno.EINVAL),
        ]:
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == number
        assert c.read(0, 1) == model[:1], "the connection lives on"


def test_pipeline_with_more_in_flight_than_sockets_hold(server: Server) -> None:
    pieces = [os.urandom(1 << 20) for _ in range(24)]
    got: dict[int, bytes] = {}
    with Client.connect(server.uri()) as c:
        with c.pipeline(24) as p:
            for i, piece in enumerate(pieces):
                p.write(i << 20, piece)
        with c.pipeline(48) as p:
            for i in range(24):
                p.read(i << 20, 1 << 20, got.__setitem__)
                p.write((24 + i) << 20, pieces[i])
        assert [got[i << 20] for i in range(24)] == pieces
        with pytest.raises(OSError, match="answered"), c.pipeline(4) as p:
            p.write(SIZE, b"x")
        assert c.read(47 << 20, 1 << 20) == pieces[23]


def test_requests_byte_by_byte(server: Server) -> None:
    with opened(server) as sock:
        for byte in request(wire.WRITE, 10, 3, data=b"abc") + request(wire.FLUSH, 0, 0, 2):
            sock.send(bytes([byte]))
        assert [wire.SIMPLE.unpack(exactly(sock, 16))[1] for _ in range(2)] == [0, 0]
    with Client.connect(server.uri()) as c:
        assert c.read(10, 3) == b"abc"


def test_simple_replies_for_a_client_without_structured_ones(server: Server) -> None:
    with opened(server, structured=False) as sock:
        sock.sendall(request(wire.READ, 0, 100) + request(wire.READ, SIZE, 1, 2) + request(wire.READ, 0, 8 << 20, 3))
        found = {}
        for _ in range(3):
            _, number, cookie = wire.SIMPLE.unpack(exactly(sock, 16))
            found[cookie[-1]] = number
            exactly(sock, 0 if number else {1: 100, 3: 8 << 20}[cookie[-1]])
        assert found == {1: 0, 2: 22, 3: 0}


def test_names(server: Server) -> None:
    assert list_exports(server.address) == [("", "a test export"), ("x", "a test export")]
    with pytest.raises(NotFoundError, match="There is no export 'y'"):
        Client.connect(server.uri("y"))


def test_a_protocol_error_ends_its_own_connection_only(server: Server) -> None:
    with Client.connect(server.uri()) as good, opened(server) as bad, opened(server) as large:
        bad.sendall(request(wire.WRITE, 0, 5, data=b"right"))
        assert wire.SIMPLE.unpack(exactly(bad, 16))[1] == 0
        bad.sendall(b"garbage of at least twenty-eight bytes")
        assert at_end(bad)
        large.sendall(struct.pack(">IHH", 0, 0, 0) + bytes(20))
        assert at_end(large)
        assert good.read(0, 5) == b"right"
    until(lambda: not server.loop.connections(), "all connections are gone")


def test_late_answers_and_stop(tmp_path: Path, image: str) -> None:
    export = LateExport(image)
    with serving(OneExport(export), tmp_path) as server, opened(server) as sock, opened(server) as gone:
        sock.sendall(request(wire.WRITE, 0, 3, 1, data=b"abc") + request(wire.READ, 0, 3, 2))
        gone.sendall(request(wire.READ, 0, 1 << 20, 9))
        until(lambda: len(export.owed) == 3, "all were submitted")
        gone.close()
        until(lambda: len(server.loop.connections()) == 1, "the closed one is gone")
        on_loop(server, export.answer)
        assert wire.SIMPLE.unpack(exactly(sock, 16))[2][-1] == 1
        assert exactly(sock, wire.CHUNK_DATA_BYTES + 3)[-3:] == b"abc"
        sock.sendall(request(wire.FLUSH, 0, 0, 3))
        until(lambda: export.owed, "the flush was submitted")
        server.loop.stop()
        chunk = exactly(sock, wire.CHUNK_BYTES + 6)
        assert chunk[8:16][-1] == 3 and struct.unpack_from(">I", chunk, 20)[0] == errno.ESHUTDOWN
        assert at_end(sock)


def test_slots_taken_back_and_answered_later(tmp_path: Path, image: str) -> None:
    """A READ that turns out to be slow: among quick ones, small and larger than a send buffer."""
    with open(image, "r+b") as f:
        f.write(os.urandom(16 << 20))

    class Cold(LateExport):
        def submit(self, connection: Connection, requests: list[Request]) -> None:
            for r in requests:
                view = connection.slot(r[2], r[3], r[4])
                if r[3] % 3 == 0:
                    del view
                    connection.unslot()
                    self.owed.append((connection, r))
                else:
                    os.preadv(self.fd, [view], r[3])

    export = Cold(image)
    with serving(OneExport(export), tmp_path) as server, Client.connect(server.uri()) as c:
        server.loop.add_reader(event := os.eventfd(1, os.EFD_NONBLOCK | os.EFD_SEMAPHORE), export.answer)
        with open(image, "rb") as f, c.pipeline(16) as p:
            whole = f.read(16 << 20)

            def check(offset: int, data: bytearray) -> None:
                assert data == whole[offset : offset + len(data)]

            for i in range(200):
                p.read(i * 37, 6 << 20 if i % 40 < 2 else 1 + i * 11, check)
            p.finish()
        on_loop(server, lambda: server.loop.remove_reader(event))
        os.close(event)
        assert server.loop.connections()[0].waiting_bytes == 0
    assert server.loop.budget.used_bytes == 0


def test_a_connection_with_too_much_unanswered_is_not_read(tmp_path: Path, image: str) -> None:
    export = LateExport(image)
    limits = Limits(unanswered_requests=10)
    with serving(OneExport(export), tmp_path, limits) as server, opened(server) as sock:
        sock.sendall(b"".join(request(wire.CACHE, 0, 1, i) for i in range(11)))
        until(lambda: len(export.owed) == 11, "the first are submitted")
        sock.sendall(request(wire.CACHE, 0, 1, 99))
        until(lambda: server.loop.connections()[0].interest == 0, "it is not read any more")
        assert len(export.owed) == 11
        on_loop(server, export.answer)
        until(lambda: len(export.owed) == 1, "it is read again")


def test_disconnect_waits_for_answers(tmp_path: Path, image: str) -> None:
    export = LateExport(image)
    with serving(OneExport(export), tmp_path) as server, opened(server) as sock:
        sock.sendall(request(wire.FLUSH, 0, 0, 5) + request(wire.DISC, 0, 0, 6))
        until(lambda: export.owed, "the flush was submitted")
        on_loop(server, export.answer)
        assert wire.SIMPLE.unpack(exactly(sock, 16))[1:] == (0, (5).to_bytes(8, "big"))
        assert at_end(sock)


# --- limits


def test_a_client_that_never_reads_is_bounded(server: Server) -> None:
    """Promise 9."""
    with opened(server) as rude, Client.connect(server.uri()) as good:
        rude.settimeout(0.3)
        with pytest.raises(TimeoutError):
            for i in range(200_000):
                rude.sendall(request(wire.READ, 0, 1 << 20, i))
        assert good.read(0, 4096) == bytes(4096)
        assert server.loop.budget.used_bytes <= 8 << 20
    until(lambda: server.loop.budget.used_bytes == 0, "everything was given back")


@pytest.mark.parametrize("length", [4096, 1 << 20, 16 << 20])
def test_what_a_client_that_left_had_asked_for_reaches_nobody_else(server: Server, length: int) -> None:
    """Promise 9 too: a reply that could not be sent leaves nothing in what the connections share."""
    with opened(server) as idle, opened(server) as writer:
        writer.sendall(request(wire.WRITE, 0, 4096, data=b"secret!!" * 512))
        exactly(writer, 16)
        for _ in range(5):
            rude = opened(server)
            rude.sendall(request(wire.READ, 0, length))
            rude.close()
            with opened(server, structured=False) as good:
                good.sendall(request(wire.READ, 8192, 512, 7))
                assert exactly(good, 16) == wire.SIMPLE.pack(wire.SIMPLE_MAGIC, 0, (7).to_bytes(8, "big"))
                assert exactly(good, 512) == bytes(512)
        idle.sendall(request(wire.FLUSH, 0, 0, 9))
        assert exactly(idle, 16) == wire.SIMPLE.pack(wire.SIMPLE_MAGIC, 0, (9).to_bytes(8, "big"))
    until(lambda: server.loop.budget.used_bytes == 0, "everything was given back")


def test_budget_makes_large_payloads_wait_and_small_ones_pass(tmp_path: Path, image: str) -> None:
    """Promise 9."""
    limits = Limits(budget_bytes=8 << 20)
    with serving(OneExport(FileExport(image)), tmp_path, limits) as server:
        holders = [opened(server) for _ in range(2)]
        for holder in holders:
            holder.sendall(request(wire.WRITE, 0, 4 << 20, data=b"a" * 100))
        until(lambda: server.loop.budget.used_bytes == 8 << 20, "the budget is held")
        waiting = opened(server)
        waiting.sendall(request(wire.WRITE, 0, 1 << 20, data=b"b" * 1000))
        until(lambda: server.loop.budget.waiters == 1, "one waits")
        with Client.connect(server.uri()) as small:
            small.write(0, b"small")
            assert small.read(0, 5) == b"small"
        holders[0].close()
        until(lambda: server.loop.budget.waiters == 0, "its turn came")
        waiting.sendall(b"b" * ((1 << 20) - 1000))
        assert wire.SIMPLE.unpack(exactly(waiting, 16))[1] == 0
        for sock in (holders[1], waiting):
            sock.close()
        until(lambda: server.loop.budget.used_bytes == 0, "everything was given back")
        assert server.loop.budget.parked_bytes == 0


def test_who_holds_the_budget_and_stands_still_is_dropped(tmp_path: Path, image: str) -> None:
    limits = Limits(budget_bytes=4 << 20, stall_seconds=1.0)
    with serving(OneExport(FileExport(image)), tmp_path, limits) as server, opened(server) as holder:
        holder.sendall(request(wire.WRITE, 0, 4 << 20))
        until(lambda: server.loop.budget.used_bytes, "the budget is held")
        with Client.connect(server.uri()) as good:
            good.write(0, bytes(1 << 20))
        assert at_end(holder)


def test_slow_handshake_and_too_many_connections(tmp_path: Path, image: str) -> None:
    limits = Limits(connections=2, handshake_seconds=0.5)
    with serving(OneExport(FileExport(image)), tmp_path, limits) as server:
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(server.path)
        with Client.connect(server.uri()) as good:
            with pytest.raises(UnreachableError):
                Client.connect(server.uri())
            slow.settimeout(WAIT_SECONDS)
            assert at_end(slow)
            until(lambda: len(server.loop.connections()) == 1, "a place is free")
            Client.connect(server.uri()).close()
            good.flush()


def test_a_failing_export_ends_its_connection_only(tmp_path: Path, image: str) -> None:
    class Failing(FileExport):
        def submit(self, connection: Connection, requests: list[Request]) -> None:
            if any(r[0] == wire.TRIM for r in requests):
                connection.slot(b"12345678", 0, 100)
                raise RuntimeError("a bug")
            super().submit(connection, requests)

    with serving(OneExport(Failing(image)), tmp_path) as server, Client.connect(server.uri()) as good:
        with opened(server) as bad:
            bad.sendall(request(wire.TRIM, 0, 1))
            assert at_end(bad)
        assert good.read(0, 10) == bytes(10)
