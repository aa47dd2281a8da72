"""The handshake of one socket: feeds `Negotiation` and pairs `opened` with `closed` for what it opens."""

from __future__ import annotations

from cdp.nbd.connection import Connection
from cdp.nbd.contract import Export, Exports
from cdp.nbd.negotiation import ABORT, GREETING, Negotiation

# One receive while a client negotiates: the options of most handshakes, and few enough to keep nobody waiting.
_RECEIVE_BYTES = 8 << 10


class Handshake:
    """Lives until the negotiation's outcome is known."""

    def __init__(self, connection: Connection, exports: Exports, deadline: float) -> None:
        self.deadline = deadline  # monotonic seconds
        self.negotiation = Negotiation(exports.names, self._open)
        self.connection = connection
        self._exports = exports

    @property
    def finished(self) -> bool:
        return self.negotiation.outcome is not None

    @property
    def aborted(self) -> bool:
        return self.negotiation.outcome == ABORT

    def greet(self) -> None:
        """The server speaks first. Raises OSError."""
        self.connection.send_now(GREETING)

    def receive(self) -> bool:
        """One receive and the answers to it; False at the end of the stream. Raises OSError, ProtocolError."""
        data = self.connection.sock.recv(_RECEIVE_BYTES)
        if data:
            self.connection.send_now(self.negotiation.receive(data))
        return bool(data)

    def _open(self, name: str) -> Export:
        connection = self.connection
        if connection.export is not None:
            before, connection.export = connection.export, None
            before.closed(connection)
        export = self._exports.open(name, connection.peer)
        connection.export = export
        export.opened(connection)
        return export
