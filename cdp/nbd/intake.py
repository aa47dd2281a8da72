"""The receiving side of one connection in transmission: bytes off the socket, batches to the export.

A receive goes into one large buffer that all connections share, and everything complete in it is one batch. What is
left over is small and copied (`_tail`), or a WRITE with a large payload, which gets a buffer of its own from the
budget and is received straight into it; without budget the connection waits unread (`parked_need`).
"""

from __future__ import annotations

import socket

from cdp.nbd.budget import Budget
from cdp.nbd.connection import Connection
from cdp.nbd.contract import Limits
from cdp.nbd.transmission import BATCH_REPLY_BYTES, Parser
from cdp.nbd.wire import REQUEST_BYTES, REQUEST_HEAD, WRITE

# One receive: some hundred 4 KiB writes, more than a socket usually holds.
RECEIVE_BYTES = 2 << 20
# A rest up to this is copied in front of the next receive, free of charge: one page of payload and some.
SMALL_BYTES = 16 << 10


class Intake:
    """Made when the handshake ended. `first` is what was received behind it."""

    __slots__ = (
        "parked_need", "held_bytes", "unparsed", "admitted", "_admitted", "_connection", "_sock", "_budget",
        "_limits", "_parser", "_tail", "_shared", "_payload", "_payload_view", "_got", "_head",
    )  # fmt: skip

    def __init__(
        self, connection: Connection, parser: Parser, shared: memoryview, budget: Budget, limits: Limits, first: bytes
    ) -> None:
        self.parked_need = 0  # budget that must be there before anything goes on
        self.held_bytes = 0  # received of a request with a large payload, to see that it moves
        self.admitted = self._admitted = False
        self.unparsed = bool(first)  # the tail may hold whole requests: parse it before the next receive
        self._connection = connection
        self._sock: socket.socket = connection.sock
        self._budget = budget
        self._limits = limits
        self._parser = parser
        self._shared = shared
        self._tail = b""
        self._keep_tail(first)
        self._payload: bytearray | None = None
        self._payload_view = memoryview(b"")
        self._got = 0
        self._head = (0, b"", 0, 0)

    @property
    def blocked(self) -> bool:
        """Whether this client must first read replies, or wait for them, before more is read from it."""
        c, limits = self._connection, self._limits
        return bool(
            self.parked_need
            or c.outbox.backlog_bytes
            or c.closing
            or c.waiting_bytes > limits.unanswered_bytes
            or len(c.waiting) > limits.unanswered_requests
        )

    def receive(self) -> bool:
        """One receive, one batch; False at the end of the stream. Raises OSError, ProtocolError, what submit raises."""
        shared, tail = self._shared, self._tail
        if self._payload is not None:
            return self._receive_payload()
        kept = len(tail)
        if kept:
            shared[:kept] = tail
            got = self._sock.recv_into(shared[kept:])
            if got:
                self._keep_tail(b"")
        else:
            got = self._sock.recv_into(shared)
        if not got:
            return False
        self._process(0, kept + got)
        return True

    def resume(self) -> None:
        """Goes on with what was received before the connection was blocked or parked."""
        tail = self._tail
        self._admitted = self.admitted
        self.unparsed = self.admitted = False
        self._keep_tail(b"")
        self._shared[: len(tail)] = tail
        try:
            self._process(0, len(tail))
        finally:
            self._admitted = False

    def admit(self) -> None:
        """The budget has room for what is needed: `resume` may use it."""
        self.parked_need = 0
        self.admitted = True

    def _keep_tail(self, tail: bytes) -> None:
        for length, sign in ((len(self._tail), -1), (len(tail), 1)):
            if length > SMALL_BYTES:
                self._budget.parked_bytes += sign * length
        self._tail = tail

    def _receive_payload(self) -> bool:
        """Straight into the payload's buffer; what follows it goes to the shared one in the same call."""
        missing = len(self._payload_view) - self._got
        got = self._sock.recvmsg_into([self._payload_view[self._got :], self._shared])[0]
        if not got:
            return False
        self._got += min(got, missing)
        self.held_bytes = REQUEST_BYTES + self._got
        if got >= missing:
            self._process(0, got - missing)
        return True

    def _process(self, at: int, end: int) -> None:
        """Everything complete in the shared buffer, and a payload that is, in as few batches as replies allow."""
        c, parser, shared = self._connection, self._parser, self._shared
        while True:
            at = parser.parse(shared, at, end)
            need = parser.reply_bytes
            if need > BATCH_REPLY_BYTES and (self._payload is not None or not self._admit(need)):
                at -= REQUEST_BYTES  # a large READ, alone in its batch: not now
                parser.requests = []
            else:
                need = 0
            had_payload = self._payload is not None
            self._execute()
            if c.closed:
                return
            if need and not had_payload:
                self._park(shared[at:end], need)
                return
            rest = end - at
            if parser.disconnect:
                c.closing = True
                return
            if parser.needed_bytes > SMALL_BYTES and rest >= REQUEST_BYTES:
                self._begin_payload(shared[at:end], parser.needed_bytes - REQUEST_BYTES)
                return
            if parser.needed_bytes or rest < REQUEST_BYTES:
                self._keep_tail(bytes(shared[at:end]))
                return
            if self.blocked:
                self._keep_tail(bytes(shared[at:end]))
                self.unparsed = True
                return

    def _execute(self) -> None:
        """The parsed batch, with the payload in front that is complete, and the replies to what was refused."""
        c, parser, payload = self._connection, self._parser, self._payload
        requests = parser.requests
        if payload is not None:
            flags, cookie, offset, length = self._head
            requests.insert(0, (WRITE, flags, cookie, offset, length, self._payload_view))
        if parser.refused or parser.empty:
            c.answer_without_work(parser.refused, parser.empty)
            parser.refused, parser.empty = [], []
        try:
            if requests:
                c.submit(requests)
            else:
                c.flush()
        finally:
            if payload is not None:
                requests.clear()
                self.drop_payload()

    def _begin_payload(self, part: memoryview, length: int) -> None:
        if not self._admit(length):
            self._park(part, length)
            return
        head, cookie, offset, _ = REQUEST_HEAD.unpack_from(part)
        self._head = (head >> 16 & 0xFFFF, cookie, offset, length)
        self._payload = self._budget.take(length)
        self._payload_view = memoryview(self._payload)[:length]
        self._got, self.held_bytes = len(part) - REQUEST_BYTES, len(part)
        self._payload_view[: self._got] = part[REQUEST_BYTES:]

    def _admit(self, length: int) -> bool:
        """Whether the budget has room; who waits for it goes first."""
        return (self._admitted or not self._budget.waiters) and self._budget.fits(length)

    def _park(self, rest: memoryview, need: int) -> None:
        self._keep_tail(bytes(rest))
        self.parked_need = need
        self.unparsed = True

    def drop_payload(self) -> None:
        """Gives the payload's buffer back."""
        if self._payload is not None:
            self._payload_view = memoryview(b"")
            self._budget.give(self._payload)
            self._payload = None
            self._got = self.held_bytes = 0

    def drop(self) -> None:
        """The connection is gone."""
        self.drop_payload()
        self._keep_tail(b"")
        self.parked_need = 0
        self.unparsed = False
