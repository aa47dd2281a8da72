"""One client's connection as an export sees it: how requests are answered.

Answers are collected and leave together: those of a batch when `submit` returns, later ones before the loop sleeps.
What is not answered when `submit` returns is remembered with its cookie, so that it can be bounded, and told
ESHUTDOWN when the server stops.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cdp.nbd import transmission
from cdp.nbd.contract import Export, Request
from cdp.nbd.outbox import Outbox
from cdp.nbd.transmission import OK8
from cdp.nbd.wire import (
    BLOCK_STATUS,
    CHUNK_DATA,
    CHUNK_DATA_BYTES,
    CHUNK_DONE,
    CHUNK_MAGIC,
    READ,
    REQ_ONE,
    SIMPLE,
    SIMPLE_BYTES,
    SIMPLE_MAGIC,
    TYPE_OFFSET_DATA,
    WRITE,
    ProtocolError,
)  # fmt: skip

if TYPE_CHECKING:
    from cdp.nbd.intake import Intake
    from cdp.nbd.loop import Loop


class Connection:
    """Made by the loop. All methods are for the loop's thread; after `closed` they do nothing."""

    def __init__(self, loop: Loop, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.export: Export | None = None
        self.structured = False
        self.contexts: tuple[str, ...] = ()  # agreed metadata contexts: each is owed by every BLOCK_STATUS
        self.closed = False
        self.closing = False  # after DISC or a last word: goes when everything is answered and sent
        self.intake: Intake | None = None  # from the end of the handshake on
        self.sock = sock
        self.fd = sock.fileno()
        self.interest = 0  # what epoll watches
        self.outbox = Outbox(sock, loop.budget)
        self.waiting: dict[bytes, int] = {}  # unanswered after their submit: cookie, payload length
        self.waiting_bytes = 0
        self.in_submit = False
        self._loop = loop
        self._slots = loop.slots
        self._context_ids: dict[str, int] = {}
        self._ok: list[bytes] = []  # cookies answered with success since the last flush
        self._others: list[bytes] = []  # cookies answered otherwise since then
        self._pieces: list[bytes | memoryview] = []
        self._starts: list[int] = []  # where the slots of this batch begin
        self._large: tuple[bytes, bytes, bytearray, memoryview] | None = None  # a slot that needed a buffer of its own
        self._statuses: dict[bytes, tuple[int, int, int]] = {}  # BLOCK_STATUS: length, flags, contexts still owed
        self._queued = False  # the loop will flush it

    def agreed(self, export: Export, structured: bool, contexts: dict[str, int]) -> None:
        """The handshake ended."""
        self.export = export
        self.structured = structured
        self._context_ids = contexts
        self.contexts = tuple(contexts)

    # --- answers

    def done(self, cookie: bytes) -> None:
        """Success without payload."""
        self.done_many((cookie,))

    def done_many(self, cookies: Iterable[bytes]) -> None:
        """The same for many at once."""
        if self.closed:
            return
        self._ok += cookies
        if not self._queued:
            self._queue()

    def fail(self, cookie: bytes, number: int, message: str = "") -> None:
        """Failure with an errno; a message reaches clients that agreed on structured replies."""
        self._statuses.pop(cookie, None)
        self._answer(cookie, transmission.error(cookie, number, self.structured, message))

    def slot(self, cookie: bytes, offset: int, length: int) -> memoryview:
        """Room for the payload of a READ of this batch, to be filled before `submit` returns."""
        slots = self._slots
        start = slots.at
        if self.structured:
            begin = start + CHUNK_DATA_BYTES
            stop = begin + length
            if stop > len(slots.buffer):
                return self._large_slot(cookie, offset, length)
            CHUNK_DATA.pack_into(
                slots.buffer, start, CHUNK_MAGIC, CHUNK_DONE, TYPE_OFFSET_DATA, cookie, length + 8, offset
            )
        else:
            begin = start + SIMPLE_BYTES
            stop = begin + length
            if stop > len(slots.buffer):
                return self._large_slot(cookie, offset, length)
            SIMPLE.pack_into(slots.buffer, start, SIMPLE_MAGIC, 0, cookie)
        slots.at = stop
        self._others.append(cookie)
        self._starts.append(start)
        return slots.view[begin:stop]

    def unslot(self) -> None:
        """Takes the newest slot back; its READ is to be answered in another way."""
        if self._large is not None:
            cookie, _, buffer, view = self._large
            view.release()
            self._loop.budget.give(buffer)
            self._large = None
        else:
            start = self._starts.pop()
            self._slots.at = start
            cookie = bytes(self._slots.buffer[start + 8 : start + 16])  # in both kinds of head
        if self._others[-1] == cookie:
            self._others.pop()
        else:
            self._others.remove(cookie)

    def _large_slot(self, cookie: bytes, offset: int, length: int) -> memoryview:
        if self._large is not None or not self.in_submit:
            raise RuntimeError("slot: only for the READs of the batch being submitted")
        buffer = self._loop.budget.take(length)
        view = memoryview(buffer)[:length]
        self._large = (cookie, transmission.data_head(cookie, offset, length, self.structured), buffer, view)
        self._others.append(cookie)
        return view

    def data(self, cookie: bytes, offset: int, payload: bytes | bytearray | memoryview) -> None:
        """The payload of a READ, from memory that does not change until it is sent."""
        head = transmission.data_head(cookie, offset, len(payload), self.structured)
        if len(payload) <= 1 << 16:
            self._answer(cookie, b"".join((head, payload)))
        else:
            self._answer(cookie, head, memoryview(payload))

    def zeros(self, cookie: bytes, offset: int, length: int) -> None:
        """A READ that found nothing but zeros: a hole on the wire where structured replies were agreed on."""
        if self.structured:
            self._answer(cookie, transmission.hole(cookie, offset, length))
        else:
            self.data(cookie, offset, bytes(length))

    def extents(self, cookie: bytes, context: str, extents: Iterable[tuple[int, int]]) -> None:
        """One context's (length, flags) list from a BLOCK_STATUS's offset on; call once for each of `contexts`."""
        if self.closed:
            return
        length, flags, owed = self._statuses[cookie]
        clipped = transmission.clip_extents(extents, length, bool(flags & REQ_ONE))
        chunk = transmission.block_status(cookie, self._context_ids[context], clipped, owed == 1)
        if owed == 1:
            del self._statuses[cookie]
            self._answer(cookie, chunk)
        else:
            self._statuses[cookie] = (length, flags, owed - 1)
            self._pieces.append(chunk)
            self._queue()

    def _answer(self, cookie: bytes, *pieces: bytes | memoryview) -> None:
        if self.closed:
            return
        self._others.append(cookie)
        self._pieces += pieces
        self._queue()

    def _queue(self) -> None:
        """The loop flushes it before it sleeps, unless it does so after the submit that runs."""
        if not self._queued and not self.closed:
            self._queued = True
            self._loop.flush_later(self)

    # --- for the loop

    def submit(self, requests: list[Request]) -> None:
        """Hands a batch to the export and sends what it answered. Raises what the export raises, OSError of send."""
        assert self.export is not None
        if self.waiting and any(request[2] in self.waiting for request in requests):
            raise ProtocolError("a cookie is used again before its reply")
        if self.contexts:
            for command, flags, cookie, _, length, _ in requests:
                if command == BLOCK_STATUS:
                    self._statuses[cookie] = (length, flags, len(self.contexts))
        was_queued, self._queued, self.in_submit = self._queued, True, True
        whole = False
        try:
            self.export.submit(self, requests)
            whole = not self.closed
        finally:
            self.in_submit = False
            self._queued = was_queued
            if not whole:
                self._slots.at = 0  # what it answered is not sent, to nobody
        if self.closed:
            return
        if self.waiting or len(self._ok) + len(self._others) != len(requests):
            self._remember(requests)
        self.flush()

    def answer_without_work(
        self, refused: Iterable[tuple[bytes, int]], empty: Iterable[tuple[int, bytes, int]]
    ) -> None:
        """What the parser settled by itself; leaves with the batch."""
        for cookie, number in refused:
            self._pieces.append(transmission.error(cookie, number, self.structured))
        for command, cookie, _ in empty:
            self._pieces.append(transmission.empty_reply(command, cookie, self.structured))

    def _remember(self, requests: Sequence[Request]) -> None:
        answered = {*self._ok, *self._others}
        for command, _, cookie, _, length, _ in requests:
            if cookie not in answered:
                self.waiting[cookie] = payload = length if command in (READ, WRITE) else 0
                self._loop.owed += 1
                self._wait_for(payload)

    def _wait_for(self, payload_bytes: int) -> None:
        self.waiting_bytes += payload_bytes
        self._loop.budget.charge(payload_bytes)

    def flush(self) -> None:
        """One send with everything that was answered. Raises OSError when the socket is dead."""
        if self.waiting:
            for cookies in (self._ok, self._others):
                for cookie in cookies:
                    if (payload := self.waiting.pop(cookie, None)) is not None:
                        self._loop.owed -= 1
                        self._wait_for(-payload)
        parts: list[bytes | memoryview] = []
        if self._ok:
            parts.append(OK8.join((b"", *self._ok)))
            self._ok = []
        if self._others:
            self._others = []
            self._starts = []
        if self._pieces:
            parts += self._pieces
            self._pieces = []
        if self._large is not None:
            _, head, buffer, view = self._large
            self.outbox.send((*parts, head))
            self._large = None  # until here it is given back with the connection
            self.outbox.push_buffer(view, buffer)
            self.outbox.drain()
        elif parts or self._slots.at:
            self.outbox.send(parts, self._slots)

    def flush_queued(self) -> None:
        """The loop's turn for answers that came outside of a submit. Raises OSError."""
        self._queued = False
        self.flush()

    def shut_down(self) -> None:
        """The server stops: everybody who still waits is told so."""
        for cookie in list(self.waiting):
            self.fail(cookie, errno.ESHUTDOWN, "the server is stopping")

    def drop_answers(self) -> None:
        """The connection is gone: what it holds goes back."""
        self.closed = True
        self.outbox.drop()
        self._loop.owed -= len(self.waiting)
        self.waiting.clear()
        self._wait_for(-self.waiting_bytes)
        self._pieces.clear()
        self._statuses.clear()
        self._ok, self._others = [], []
        if self.intake is not None:
            self.intake.drop()
        if self._large is not None:
            self._loop.budget.give(self._large[2])
            self._large = None

    def send_now(self, data: bytes) -> None:
        """Bytes of the handshake. Raises OSError."""
        if data:
            self.outbox.send((data,))
