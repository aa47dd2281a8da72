"""What an NBD server is made of: who offers exports, what an export is, and the limits of a process.

`Connection` is in `connection.py`; a request is a plain tuple because it is made for every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cdp.nbd.connection import Connection

# What follows it in an export's name is a secret: it is never logged.
SECRET_MARK = "!"

# command, flags, cookie, offset, length, data (a WRITE's, else None). Length is never 0 but for FLUSH.
Request = tuple[int, int, bytes, int, int, "memoryview | None"]


class Export(Protocol):
    """One opened export. Subclasses inherit the defaults; all attributes are read once, when a connection opens it."""

    size: int  # bytes
    read_only: bool = False
    # True only if a FLUSH on one connection covers the writes of all, and all see the same bytes.
    multi_conn: bool = False
    rotational: bool = False
    can_flush: bool = True  # FUA too
    can_trim: bool = True
    can_zero: bool = True
    can_zero_fast: bool = True  # else a FAST_ZERO is answered with ENOTSUP by the loop
    can_cache: bool = True
    contexts: Sequence[str] = ()  # metadata contexts, e.g. "base:allocation"

    def submit(self, connection: Connection, requests: list[Request]) -> None:
        """Every complete request that one receive brought, valid for this export, in order.

        Each is answered once through the connection, now or later. An exception ends that connection.
        """

    def opened(self, connection: Connection) -> None:
        """A connection opened it (also one that only asks for INFO). Paired with `closed`."""

    def closed(self, connection: Connection) -> None:
        """That connection is gone or opens another export; answers to it are dropped silently from here on."""


class Exports(Protocol):
    """What a server offers."""

    def names(self) -> Iterable[tuple[str, str]]:
        """(name, description) of each export for LIST."""

    def open(self, name: str, peer: str) -> Export:
        """The export of that name for one connection; `opened` follows. CdpError: its text goes to the client."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one process; each keeps one rude client from costing the others more than its share."""

    # A QEMU uses one connection, nbdcopy four, a rollback eight: room for some dozen clients.
    connections: int = 128
    # A person's machine under load answers a handshake in well under a second.
    handshake_seconds: float = 10.0
    # Payloads being received, answers being sent or computed; one request of 32 MiB and one of half that fit.
    budget_bytes: int = 48 << 20
    # Unanswered requests of a connection after which it is not read: twice what real clients keep in flight.
    unanswered_requests: int = 4096
    # The same in bytes of their READ and WRITE payloads.
    unanswered_bytes: int = 8 << 20
    # While others wait for budget, who holds some and moves no byte for this long loses its connection.
    stall_seconds: float = 15.0
    # How long the last answers may take to leave after a DISC, a stop or a dropped handshake.
    linger_seconds: float = 5.0
