"""Random requests, cut anywhere on their way through a real socket: every reply and every byte is as the model says."""

from __future__ import annotations

import os
import random
import struct
import threading
from pathlib import Path

import pytest

from cdp.nbd import wire
from cdp.nbd.client_handshake import exactly
from cdp.nbd.contract import Limits
from tests.nbd.memory_export import FileExport, OneExport
from tests.nbd.serving import opened, request, serving, until

SIZE = 8 << 20
LENGTHS = [1, 100, 4096, 4096, 16 << 10, (16 << 10) - 27, (16 << 10) + 1, 70_000, 1 << 20, 3 << 20, 5 << 20]


Expected = dict[int, tuple[int, int, bytes]]


def stream_of(rng: random.Random, model: bytearray, low: int, high: int) -> tuple[bytes, Expected]:
    """Requests in a row, and by cookie: command, errno and payload of the reply. Reads are of what nobody writes."""
    parts, expected = [], {}
    for cookie in range(rng.randint(1, 60)):
        length = rng.choice(LENGTHS)
        kind = rng.randrange(5)
        if kind == 0:
            offset = rng.randrange(0, SIZE // 2)
            length = min(length, SIZE // 2 - offset)
            parts.append(request(wire.READ, offset, length, cookie))
            expected[cookie] = (wire.READ, 0, bytes(model[offset : offset + length]))
        elif kind == 1:
            parts.append(request(wire.WRITE, SIZE - length + 1, length, cookie, data=bytes(length)))
            expected[cookie] = (wire.WRITE, 28, b"")
        elif kind == 2:
            parts.append(request(wire.READ, SIZE, length, cookie))
            expected[cookie] = (wire.READ, 22, b"")
        else:
            offset = rng.randrange(low, high)
            data = rng.randbytes(min(length, high - offset))
            parts.append(request(wire.WRITE, offset, len(data), cookie, rng.choice([0, wire.FUA]), data))
            model[offset : offset + len(data)] = data
            expected[cookie] = (wire.WRITE, 0, b"")
    return b"".join(parts), expected


def reply_of(sock: object) -> tuple[int, int, bytes]:
    head = exactly(sock, 16)  # type: ignore[arg-type]
    magic, number, cookie = wire.SIMPLE.unpack(head)
    if magic == wire.SIMPLE_MAGIC:
        return int.from_bytes(cookie, "big"), number, b""
    _, flags, kind, cookie, length = wire.CHUNK.unpack(head + exactly(sock, 4))  # type: ignore[arg-type]
    assert flags == wire.CHUNK_DONE
    payload = exactly(sock, length)  # type: ignore[arg-type]
    if kind == wire.TYPE_ERROR:
        return int.from_bytes(cookie, "big"), struct.unpack_from(">I", payload)[0], b""
    return int.from_bytes(cookie, "big"), 0, payload[8:]


@pytest.mark.parametrize("seed", range(6))
def test_any_cuts_through_a_socket(tmp_path: Path, seed: int) -> None:
    """Three clients share a budget that holds one of their larger payloads at a time."""
    rng = random.Random(seed)
    model = bytearray(os.urandom(SIZE))
    image = tmp_path / "image"
    image.write_bytes(model)
    with serving(OneExport(FileExport(str(image))), tmp_path, Limits(budget_bytes=6 << 20)) as server:
        failures: list[BaseException] = []

        def client(number: int, stream: bytes, expected: Expected) -> None:
            own = random.Random(number)
            try:
                with opened(server) as sock:
                    sender = threading.Thread(target=send, args=(sock, stream, own))
                    sender.start()
                    for _ in range(len(expected)):
                        cookie, error, payload = reply_of(sock)
                        command, wanted, content = expected.pop(cookie)
                        assert (error, payload) == (wanted, content), (cookie, command)
                    sender.join()
            except BaseException as e:
                failures.append(e)

        def send(sock: object, stream: bytes, own: random.Random) -> None:
            at = 0
            while at < len(stream):
                step = own.choice([1, 27, 28, 29, 5000, 66_000, 1 << 20])
                sock.sendall(stream[at : at + step])  # type: ignore[attr-defined]
                at += step

        third = SIZE // 6  # each client writes to a part of its own, so that the model has one order
        jobs = [stream_of(rng, model, SIZE // 2 + i * third, SIZE // 2 + (i + 1) * third) for i in range(3)]
        threads = [threading.Thread(target=client, args=(i, *job)) for i, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not failures, failures
        until(lambda: not server.loop.connections(), "all are gone")
        assert server.loop.budget.used_bytes == server.loop.budget.parked_bytes == 0
    assert image.read_bytes() == model
