"""What leaves a connection: one send for each batch, and a backlog for a client that does not keep up.

Everything in a backlog is charged to the process's budget. The send buffer that READs are answered in is shared by
all connections; a backlog that is still large after a send keeps it, and the others get a new one.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence

from cdp.nbd.budget import Budget
from cdp.nbd.transmission import BATCH_REPLY_BYTES

# A rest of the shared send buffer up to this is copied, a longer one keeps the buffer.
_COPIED_BYTES = 64 << 10
# Pieces in one sendmsg, under the kernel's 1024.
_MAX_PIECES = 512


class SendBuffer:
    """Room for the READ replies of one batch, filled from the front."""

    __slots__ = ("buffer", "view", "at", "_budget")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._renew()

    def _renew(self) -> None:
        self.buffer = self._budget.take(BATCH_REPLY_BYTES)
        self._budget.release(len(self.buffer))  # the process always has one: it is no part of the budget
        self.view = memoryview(self.buffer)
        self.at = 0

    def detach(self) -> bytearray:
        """The buffer changes hands, charged; a new one takes its place."""
        buffer = self.buffer
        self._budget.charge(len(buffer))
        self._renew()
        return buffer


class Outbox:
    """The sending side of one socket."""

    __slots__ = ("backlog_bytes", "_sock", "_budget", "_backlog")

    def __init__(self, sock: socket.socket, budget: Budget) -> None:
        self._sock = sock
        self._budget = budget
        self._backlog: deque[tuple[memoryview, bytearray | None]] = deque()  # the buffer to give back, or a charge
        self.backlog_bytes = 0

    def send(self, parts: Sequence[bytes | memoryview], slots: SendBuffer | None = None) -> None:
        """Sends what the socket takes, keeps the rest. `slots` are sent last, and empty whatever happens: all
        connections share them. Raises OSError: the socket is dead."""
        try:
            if self._backlog:
                sent = 0
            elif slots is None or not slots.at:
                sent = self._try(parts)
            elif parts:
                sent = self._try((*parts, slots.view[: slots.at]))
            else:
                sent = self._try((slots.view[: slots.at],))
        except OSError:
            if slots is not None:
                slots.at = 0
            raise
        for part in parts:
            if sent < len(part):
                self._keep(memoryview(part)[sent:])
                sent = 0
            else:
                sent -= len(part)
        if slots is not None and slots.at:
            if sent < slots.at:
                self._keep_slots(slots, sent)
            slots.at = 0

    def _try(self, parts: Sequence[bytes | memoryview]) -> int:
        try:
            if len(parts) == 1:
                return self._sock.send(parts[0])
            return self._sock.sendmsg(parts[:_MAX_PIECES])
        except (BlockingIOError, InterruptedError):
            return 0

    def _keep(self, rest: memoryview) -> None:
        self._budget.charge(len(rest))
        self._backlog.append((rest, None))
        self.backlog_bytes += len(rest)

    def _keep_slots(self, slots: SendBuffer, sent: int) -> None:
        rest = slots.view[sent : slots.at]
        if len(rest) <= _COPIED_BYTES:
            self._keep(memoryview(bytes(rest)))
            return
        self._backlog.append((rest, slots.detach()))
        self.backlog_bytes += len(rest)

    def push_buffer(self, view: memoryview, buffer: bytearray) -> None:
        """Appends a buffer of the budget's, to be given back once it is sent."""
        self._backlog.append((view, buffer))
        self.backlog_bytes += len(view)

    def drain(self) -> None:
        """Sends on from the backlog. Raises OSError."""
        while self._backlog:
            view, buffer = self._backlog[0]
            sent = self._try((view,))
            self.backlog_bytes -= sent
            if buffer is None:
                self._budget.release(sent)
            if sent < len(view):
                self._backlog[0] = (view[sent:], buffer)
                return
            self._backlog.popleft()
            if buffer is not None:
                view.release()
                self._budget.give(buffer)

    def drop(self) -> None:
        """Forgets the backlog; its charges and buffers go back."""
        for view, buffer in self._backlog:
            if buffer is None:
                self._budget.release(len(view))
            else:
                self._budget.give(buffer)
        self._backlog.clear()
        self.backlog_bytes = 0
