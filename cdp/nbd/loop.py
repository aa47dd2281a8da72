"""The batch loop that every NBD server of the appliance runs: one thread, epoll, no work of its own per request.

A connection is in its handshake, or in transmission (it has an `Intake`). After anything happened to it, `_settle`
decides what it may do next: go on with held input, wait for budget, be read, be written, or go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable

from cdp.nbd import listening
from cdp.nbd.budget import Budget
from cdp.nbd.connection import Connection
from cdp.nbd.contract import SECRET_MARK, Export, Exports, Limits
from cdp.nbd.handshake import Handshake
from cdp.nbd.intake import RECEIVE_BYTES, Intake
from cdp.nbd.outbox import SendBuffer
from cdp.nbd.reactor import IN, OUT, Reactor
from cdp.nbd.transmission import Parser
from cdp.nbd.wire import ProtocolError
from cdp.said import Said

_log = logging.getLogger("cdp.nbd")
# Lines of one kind in a few seconds, before they are only counted: many clients at once, not one that never stops.
LINES = 20


class Loop(Reactor):
    """The server of one thread: sockets, and what `Reactor` watches for the process."""

    def __init__(self, exports: Exports, limits: Limits | None = None) -> None:
        super().__init__()
        self.exports = exports
        self.limits = limits or Limits()
        self.budget = Budget(self.limits.budget_bytes)
        self.slots = SendBuffer(self.budget)
        self.shared = memoryview(bytearray(RECEIVE_BYTES))
        self._connections: dict[int, Connection] = {}
        self._handshakes: dict[int, Handshake] = {}
        self._listeners: list[tuple[socket.socket, str | None]] = []
        self._paused: list[socket.socket] = []
        self._answered: list[Connection] = []
        self._parked: deque[Connection] = deque()
        self._ends: dict[int, float] = {}  # connections that are closing: when they go anyway
        self._marks: dict[int, tuple[tuple[int, int], int]] = {}  # who holds budget: its progress, seconds without
        self._said = Said(_log, LINES)
        self.every(1.0, self._look_after)

    # --- what it watches

    def listen(self, address: str) -> str:
        """Accepts clients at "unix:/path" or "tcp:host:port" (port 0: a free one); returns the bound address.

        Raises ConfigError, RefusedError when it is in use, StorageError.
        """
        kind, where, port = listening.parse_address(address)
        sock = listening.listen_unix(where) if kind == "unix" else listening.listen_tcp(where, port)
        self._listeners.append((sock, where if kind == "unix" else None))
        self._watch(sock)
        if kind == "unix":
            return address
        host, bound = sock.getsockname()[:2]
        return f"tcp:[{host}]:{bound}" if ":" in host else f"tcp:{host}:{bound}"

    def _watch(self, listener: socket.socket) -> None:
        self.add_reader(listener.fileno(), lambda: self._accept(listener))

    def connections(self, export: Export | None = None) -> list[Connection]:
        """Those in transmission, all or those of one export."""
        open_ones = (c for c in self._connections.values() if c.intake is not None)
        return [c for c in open_ones if export is None or c.export is export]

    def disconnect(self, connection: Connection, reason: str) -> None:
        """Closes a connection now; `closed` of its export is called from inside."""
        self._drop(connection, reason)

    # --- running

    def run(self) -> None:
        """Until `stop`: then unanswered requests get ESHUTDOWN, listeners and connections close.

        What a timer, a reader or a `call_soon` raises ends the loop and comes out here.
        """
        try:
            while not self.stopping:
                events = self.wait()
                self.replied = False
                for fd, event in events:
                    connection = self._connections.get(fd)
                    if connection is not None:
                        self._serve(connection, event)
                    elif (call := self.calls.get(fd)) is not None:
                        call()
                        self.replied = True
                self.run_due()
                while self._parked and self._unpark():
                    pass
                self._flush_answered()
        finally:
            self._end()

    def _flush_answered(self) -> None:
        """Sends the answers that came outside of a submit."""
        while self._answered:
            answered, self._answered = self._answered, []
            for connection in answered:
                self._guard(connection, connection.flush_queued)
                self._settle(connection)
            self.replied = True

    def flush_later(self, connection: Connection) -> None:
        """A connection has answers to send."""
        self._answered.append(connection)

    # --- connections

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as e:  # out of descriptors: not again before some may be free, it would be a busy loop
            self._said.add("accept", logging.WARNING, "accept failed: %s", e)
            self.remove_reader(listener.fileno())
            self._paused.append(listener)
            return
        if len(self._connections) >= self.limits.connections:
            text = "refused a client: %d connections are open"
            self._said.add("too many", logging.WARNING, text, len(self._connections))
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
        self.epoll.register(connection.fd, IN)
        connection.interest = IN
        self._guard(connection, handshake.greet)

    def _serve(self, connection: Connection, event: int) -> None:
        """One socket is ready."""
        if event & OUT:
            self._guard(connection, connection.outbox.drain)
        if event & ~OUT and not connection.closed:
            self.replied = True
            intake = connection.intake
            if not connection.interest & IN:  # it is not read at present: only a hang-up wakes us
                self._drop(connection, "hung up")
            elif intake is None:
                self._shake(connection)
            else:
                self._receive(connection, intake)
                if not (intake.unparsed or intake.blocked):
                    return
        self._settle(connection)

    def _receive(self, connection: Connection, intake: Intake) -> None:
        try:
            if not intake.receive():
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
        """One step of a handshake, and what follows its end."""
        handshake = self._handshakes[connection.fd]
        alive = [True]

        def step() -> None:
            alive[0] = handshake.receive()

        self._guard(connection, step)
        if not alive[0]:
            self._drop(connection, "closed during the handshake")
        if connection.closed or not handshake.finished:
            return
        del self._handshakes[connection.fd]
        if handshake.aborted:
            connection.closing = True
            return
        negotiation = handshake.negotiation
        connection.agreed(negotiation.export, negotiation.structured, negotiation.contexts)
        parser = Parser(negotiation.export, negotiation.structured, connection.contexts)
        connection.intake = Intake(connection, parser, self.shared, self.budget, self.limits, negotiation.leftover())
        name = negotiation.name.partition(SECRET_MARK)[0]
        self._said.add("opened", logging.INFO, "%s opened %r", connection.peer, name)

    def _settle(self, connection: Connection) -> None:
        """After anything happened: goes on with input that was held back, closes, and sets what epoll watches."""
        intake = connection.intake
        if intake is not None and intake.unparsed and not intake.blocked:
            self._guard(connection, intake.resume)
        if connection.closed:
            return
        backlog = connection.outbox.backlog_bytes
        if connection.closing:
            if not backlog and not connection.waiting:
                self._drop(connection, "disconnected")
                return
            self._ends.setdefault(connection.fd, time.monotonic() + self.limits.linger_seconds)
        blocked = bool(backlog) or connection.closing or (intake is not None and intake.blocked)
        if intake is not None and intake.unparsed:
            if not blocked:
                self.call_soon(lambda: self._settle(connection))
            elif intake.parked_need and connection not in self._parked:
                self._parked.append(connection)
                self.budget.waiters = len(self._parked)
        wanted = (0 if blocked else IN) | (OUT if backlog else 0)
        if wanted != connection.interest:
            self.epoll.modify(connection.fd, wanted)
            connection.interest = wanted

    def _unpark(self) -> bool:
        """Lets the first connection that waits for budget go on; False if it must wait longer."""
        connection = self._parked[0]
        intake = connection.intake
        if intake is not None and intake.parked_need:
            if not self.budget.fits(intake.parked_need):
                return False
            intake.admit()
        self._parked.popleft()
        self.budget.waiters = len(self._parked)
        self._settle(connection)
        return True

    def _drop(self, connection: Connection, reason: str) -> None:
        """The end of a connection: everything it holds goes back."""
        if connection.closed:
            return
        self._said.add("closed", logging.INFO, "%s: %s", connection.peer, reason)
        fd = connection.fd
        self._handshakes.pop(fd, None)
        self._ends.pop(fd, None)
        self._marks.pop(fd, None)
        del self._connections[fd]
        self.epoll.unregister(fd)
        connection.drop_answers()
        connection.sock.close()
        export, connection.export = connection.export, None
        if export is not None:
            try:
                export.closed(connection)
            except Exception:  # one client's export must not end the others'
                _log.exception("%s: closing its export failed", connection.peer)

    def _look_after(self) -> None:
        """Once a second: handshakes that take too long, last words that do not leave, holders that stand still."""
        self._said.tick()
        while self._paused:
            self._watch(self._paused.pop())
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
            assert connection.intake is not None
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
        self.close()
