"""The batch loop that every NBD server of the appliance runs: one thread, epoll, no work of its own per request.

After a reply it polls its sockets for a moment before it sleeps, as long as that has paid lately: at queue depth 1
the next request comes sooner than a sleeping thread would wake.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from cdp.nbd import listening
from cdp.nbd.budget import Budget
from cdp.nbd.connection import Connection
from cdp.nbd.contract import Export, Exports, Limits
from cdp.nbd.handshake import Handshake
from cdp.nbd.intake import RECEIVE_BYTES, Intake
from cdp.nbd.outbox import SendBuffer
from cdp.nbd.transmission import Parser
from cdp.nbd.wire import ProtocolError

# How long a poll may last: a few times what a client at queue depth 1 takes to send its next request.
_POLL_SECONDS = 50e-6
# Polling goes on while this credit is above 0: a poll (or a sleep that was as short) that brought something earns
# one, a vain one costs as much as it wastes compared with what a good one saves.
_MAX_CREDIT, _VAIN_POLL_COST = 16, 4
_EVENTS_AT_ONCE = 64
# Sleeps are at most this long, so that nothing depends on a timer being exact.
_MAX_SLEEP_SECONDS = 1.0

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_log = logging.getLogger("cdp.nbd")


class Loop:
    """Sockets, timers and foreign descriptors of one thread. All but `stop` is for that thread."""

    def __init__(self, exports: Exports, limits: Limits | None = None) -> None:
        self.exports = exports
        self.limits = limits or Limits()
        self.budget = Budget(self.limits.budget_bytes)
        self.slots = SendBuffer(self.budget)
        self.shared = memoryview(bytearray(RECEIVE_BYTES))
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}  # foreign descriptors and listeners
        self._connections: dict[int, Connection] = {}
        self._handshakes: dict[int, Handshake] = {}
        self._listeners: list[tuple[socket.socket, str | None]] = []
        self._timers: list[tuple[float, int, float, Callable[[], None]]] = []
        self._timer_count = 0
        self._soon: deque[Callable[[], None]] = deque()
        self._answered: list[Connection] = []
        self._parked: deque[Connection] = deque()
        self._ends: dict[int, float] = {}  # connections that are closing: when they go anyway
        self._marks: dict[int, tuple[tuple[int, int], int]] = {}  # who holds budget: its progress, seconds without
        self._replied = False
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add_reader(self._wake, self._woken)
        self.every(1.0, self._look_after)

    # --- what it watches

    def listen(self, address: str) -> str:
        """Accepts clients at "unix:/path" or "tcp:host:port" (port 0: a free one); returns the bound address.

        Raises ConfigError, RefusedError when it is in use, StorageError.
        """
        kind, where, port = listening.parse_address(address)
        sock = listening.listen_unix(where) if kind == "unix" else listening.listen_tcp(where, port)
        self._listeners.append((sock, where if kind == "unix" else None))
        self.add_reader(sock.fileno(), lambda: self._accept(sock))
        if kind == "unix":
            return address
        host, bound = sock.getsockname()[:2]
        return f"tcp:[{host}]:{bound}" if ":" in host else f"tcp:{host}:{bound}"

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        """Calls whenever `fd` is readable (level-triggered)."""
        self._calls[fd] = call
        self._epoll.register(fd, _IN)

    def remove_reader(self, fd: int) -> None:
        """Watches `fd` no longer. To be called before it is closed."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls about every so many seconds, first after them."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_count, seconds, call))

    def call_soon(self, call: Callable[[], None]) -> None:
        """Calls before the loop sleeps next. Only from the loop's own thread."""
        self._soon.append(call)

    def connections(self, export: Export | None = None) -> list[Connection]:
        """Those in transmission, all or those of one export."""
        return [
            c for fd, c in self._connections.items()
            if fd not in self._handshakes and (export is None or c.export is export)
        ]  # fmt: skip

    def disconnect(self, connection: Connection, reason: str) -> None:
        """Closes a connection now; `closed` of its export is called from inside."""
        self._drop(connection, reason)

    # --- running

    def run(self) -> None:
        """Until `stop`. What a timer, a reader or a `call_soon` raises ends the loop and comes out here."""
        poll, credit = self._epoll.poll, 0
        try:
            while not self._stopping:
                events = poll(0, _EVENTS_AT_ONCE)
                if not events:
                    events, credit = self._wait(credit)
                self._replied = False
                for fd, event in events:
                    connection = self._connections.get(fd)
                    if connection is not None:
                        self._serve(connection, event)
                    elif (call := self._calls.get(fd)) is not None:
                        call()
                        self._replied = True
                self._catch_up()
        finally:
            self._end()

    def stop(self) -> None:
        """Ends `run`: unanswered requests get ESHUTDOWN, listeners and connections close. From any thread."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)

    def _wait(self, credit: int) -> tuple[list[tuple[int, int]], int]:
        """Polls while it pays, then sleeps until something is ready or a timer is due."""
        poll, clock = self._epoll.poll, time.perf_counter
        begin = clock()
        if self._replied and credit > 0:
            end = begin + _POLL_SECONDS
            while clock() < end:
                if events := poll(0, _EVENTS_AT_ONCE):
                    return events, min(credit + 1, _MAX_CREDIT)
            credit = max(credit - _VAIN_POLL_COST, 0)
        sleep = min(max(self._timers[0][0] - time.monotonic(), 0.0), _MAX_SLEEP_SECONDS)
        events = poll(sleep, _EVENTS_AT_ONCE)
        if self._replied and clock() - begin < _POLL_SECONDS:
            credit = min(credit + 1, _MAX_CREDIT)
        return events, credit

    def _catch_up(self) -> None:
        """What is due before the loop may sleep: timers, calls, late answers, connections that can go on."""
        now = time.monotonic()
        while self._timers[0][0] <= now:
            _, number, seconds, call = heapq.heapreplace(self._timers, self._next_turn(now))
            call()
        for _ in range(len(self._soon)):
            self._soon.popleft()()
        while self._answered:
            answered, self._answered = self._answered, []
            for connection in answered:
                self._guard(connection, connection.flush_queued)
                self._settle(connection)
            self._replied = True
        while self._parked and self._unpark():
            pass

    def _next_turn(self, now: float) -> tuple[float, int, float, Callable[[], None]]:
        _, number, seconds, call = self._timers[0]
        return now + seconds, number, seconds, call

    def flush_later(self, connection: Connection) -> None:
        """A connection has answers to send."""
        self._answered.append(connection)

    # --- connections

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as e:
            _log.warning("accept failed: %s", e)
            return
        if len(self._connections) >= self.limits.connections:
            _log.warning("refused a client: %d connections are open", len(self._connections))
            sock.close()
            return
        try:
            connection = Connection(self, sock, listening.prepare(sock))
        except OSError:
            sock.close()
            return
        self._connections[connection.fd] = connection
        handshake = Handshake(connection, self.exports, time.monotonic() + self.limits.handshake_seconds)
        self._handshakes[connection.fd] = handshake
        self._epoll.register(connection.fd, _IN)
        connection.interest = _IN
        self._guard(connection, handshake.greet)

    def _serve(self, connection: Connection, event: int) -> None:
        """One socket is ready."""
        if event & _OUT:
            self._guard(connection, connection.outbox.drain)
        if event & ~_OUT and not connection.closed:
            self._replied = True
            if connection.fd in self._handshakes:
                self._guard(connection, lambda: self._shake(connection))
            elif connection.interest & _IN:
                self._receive(connection)
                if connection.outbox.backlog_bytes or connection.waiting or connection.intake.blocked:
                    self._settle(connection)
                return
            else:  # it is not read at present: only a hang-up wakes us
                self._drop(connection, "hung up")
        self._settle(connection)

    def _receive(self, connection: Connection) -> None:
        try:
            if not connection.intake.receive():
                self._drop(connection, "closed by the client")
        except (BlockingIOError, InterruptedError):
            pass
        except Exception as e:
            self._broken(connection, e)

    def _guard(self, connection: Connection, call: Callable[[], object]) -> None:
        """Whatever goes wrong inside ends this connection and no other."""
        if not connection.closed:
            try:
                call()
            except (BlockingIOError, InterruptedError):
                pass
            except Exception as e:
                self._broken(connection, e)

    def _broken(self, connection: Connection, error: Exception) -> None:
        if not isinstance(error, OSError | ProtocolError):
            _log.error("%s: a batch failed", connection.peer, exc_info=error)
        self._drop(connection, f"{type(error).__name__}: {error}")

    def _shake(self, connection: Connection) -> None:
        handshake = self._handshakes[connection.fd]
        if not handshake.receive():
            self._drop(connection, "closed during the handshake")
        elif handshake.aborted:
            connection.closing = True
        elif handshake.finished:
            del self._handshakes[connection.fd]
            export, negotiation = handshake.negotiation.export, handshake.negotiation
            connection.agreed(export, negotiation.structured, negotiation.contexts)
            parser = Parser(export, negotiation.structured, connection.contexts)
            connection.intake = Intake(
                connection, parser, self.shared, self.budget, self.limits, negotiation.leftover()
            )
            _log.info("%s opened %r", connection.peer, negotiation.name)

    def _settle(self, connection: Connection) -> None:
        """After anything happened: goes on with input that was held back, closes, and sets what epoll watches."""
        if connection.closed:
            return
        in_handshake = connection.fd in self._handshakes
        if not in_handshake and connection.intake.unparsed and not connection.intake.blocked:
            self._guard(connection, connection.intake.resume)
            if connection.closed:
                return
        backlog = connection.outbox.backlog_bytes
        if connection.closing:
            if not backlog and not connection.waiting:
                self._drop(connection, "disconnected")
                return
            self._ends.setdefault(connection.fd, time.monotonic() + self.limits.linger_seconds)
        blocked = bool(backlog) or connection.closing if in_handshake else connection.intake.blocked
        if not in_handshake:
            intake = connection.intake
            if intake.parked_need and connection not in self._parked:
                self._parked.append(connection)
            elif intake.unparsed and not blocked:
                self.call_soon(lambda: self._settle(connection))
        wanted = (0 if blocked else _IN) | (_OUT if backlog else 0)
        if wanted != connection.interest:
            self._epoll.modify(connection.fd, wanted)
            connection.interest = wanted

    def _unpark(self) -> bool:
        """Lets the first connection that waits for budget go on; False if it must wait longer."""
        connection = self._parked[0]
        if connection.closed or not connection.intake.parked_need:
            self._parked.popleft()
            return True
        if not self.budget.fits(connection.intake.parked_need):
            return False
        self._parked.popleft()
        connection.intake.parked_need = 0
        self._settle(connection)
        return True

    def _drop(self, connection: Connection, reason: str) -> None:
        """The end of a connection: everything it holds goes back."""
        if connection.closed:
            return
        _log.info("%s: %s", connection.peer, reason)
        fd = connection.fd
        self._handshakes.pop(fd, None)
        self._ends.pop(fd, None)
        self._marks.pop(fd, None)
        del self._connections[fd]
        self._epoll.unregister(fd)
        if connection.in_submit:
            self.slots.at = 0
        connection.drop_answers()
        connection.sock.close()
        export, connection.export = connection.export, None
        if export is not None:
            export.closed(connection)

    def _look_after(self) -> None:
        """Once a second: handshakes that take too long, last words that do not leave, holders that stand still."""
        now = time.monotonic()
        for handshake in list(self._handshakes.values()):
            if handshake.deadline < now:
                self._drop(handshake.connection, "the handshake took too long")
        for fd, end in list(self._ends.items()):
            if end < now:
                self._drop(self._connections[fd], "did not read its last replies")
        if not self._parked:
            self._marks.clear()
            return
        for connection in self.connections():
            held = connection.intake.held_bytes, connection.outbox.backlog_bytes
            if held == (0, 0):
                self._marks.pop(connection.fd, None)
                continue
            before, seconds = self._marks.get(connection.fd, (held, -1))
            self._marks[connection.fd] = held, seconds + 1 if held == before else 0
            if held == before and seconds + 1 >= self.limits.stall_seconds:
                self._drop(connection, "held the payload budget without moving while others waited")

    def _end(self) -> None:
        """ESHUTDOWN for what is unanswered, one attempt to send it, and everything is closed."""
        for sock, path in self._listeners:
            self.remove_reader(sock.fileno())
            sock.close()
            if path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        for connection in list(self._connections.values()):
            self._guard(connection, connection.shut_down)
            self._guard(connection, connection.flush)
            self._drop(connection, "the server is stopping")
        self._epoll.close()
        os.close(self._wake)
