"""A small blocking NBD client, for rollback, upstream primaries, the demo and tests.

One request after another through `Client`, many at once through `Client.pipeline`. The server's refusal of an export is
a NotFoundError or RefusedError with its words; a failed request is an OSError with its errno.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from cdp.errors import UnreachableError
from cdp.nbd import client_handshake, wire
from cdp.nbd.channel import Channel, Extents, InFlight
from cdp.nbd.client_handshake import Opened
from cdp.nbd.uri import parse_uri
from cdp.nbd.wire import ProtocolError

# A server under load answers a handshake in well under a second; a collector that starts may take some.
HANDSHAKE_SECONDS = 30.0
# The longest that a server may be silent while it owes a reply: a FLUSH of a slow disk's whole cache.
SILENCE_SECONDS = 120.0

Data = bytes | bytearray | memoryview


def list_exports(address: str, timeout_seconds: float = HANDSHAKE_SECONDS) -> list[tuple[str, str]]:
    """(name, description) of everything that a server at an address or URI lists. Raises CdpError."""
    sock = client_handshake.connect(parse_uri(address).address, timeout_seconds)
    try:
        return client_handshake.list_exports(sock)
    except (OSError, ProtocolError) as e:
        raise UnreachableError(f"The NBD server at {address} broke off ({e}).") from e
    finally:
        sock.close()


class Client:
    """An open export. Not for several threads at once."""

    def __init__(self, channel: Channel, opened: Opened) -> None:
        self._channel = channel
        self.size = opened.size
        self.flags = opened.flags
        self.read_only = bool(opened.flags & wire.READ_ONLY)
        self.structured = opened.structured
        self.contexts = tuple(opened.contexts.values())

    @classmethod
    def connect(
        cls, where: str, export: str | None = None, contexts: Sequence[str] = (), *,
        timeout_seconds: float = HANDSHAKE_SECONDS, silence_seconds: float = SILENCE_SECONDS,
    ) -> Client:  # fmt: skip
        """Opens an export at `unix:/path`, `tcp:host:port` or an NBD URI (whose export `export` replaces).

        Of `contexts` those that the server offers are agreed on. Raises ConfigError, UnreachableError,
        NotFoundError, RefusedError.
        """
        place = parse_uri(where)
        sock = client_handshake.connect(place.address, timeout_seconds)
        try:
            opened = client_handshake.go(sock, place.export if export is None else export, contexts)
        except (OSError, ProtocolError) as e:
            sock.close()
            raise UnreachableError(f"The NBD server at {place.address} broke off ({e}).", "Is it running?") from e
        except BaseException:
            sock.close()
            raise
        return cls(Channel(sock, opened, silence_seconds), opened)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects; what is in flight is given up. Idempotent."""
        self._channel.say_goodbye()

    def _do(self, command: int, flags: int, offset: int, length: int, payload: Data | None = None) -> InFlight:
        request = self._channel.send(command, flags, offset, length, payload)
        while not request.done:
            self._channel.receive()
        if request.error is not None:
            raise request.error
        return request

    def read(self, offset: int, length: int) -> bytearray:
        """Those bytes, at most 32 MiB. Raises OSError."""
        return self._do(wire.READ, 0, offset, length).data

    def write(self, offset: int, data: Data, *, fua: bool = False) -> None:
        """Writes, at most 32 MiB; with `fua` it is durable on return. Raises OSError."""
        self._do(wire.WRITE, wire.FUA if fua else 0, offset, len(data), data)

    def zero(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Zeros. `no_hole`: space stays allocated; `fast`: ENOTSUP unless it is cheap. Raises OSError."""
        flags = (wire.FUA if fua else 0) | (wire.NO_HOLE if no_hole else 0) | (wire.FAST_ZERO if fast else 0)
        self._do(wire.WRITE_ZEROES, flags, offset, length)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """What is there is not needed any more. Raises OSError."""
        self._do(wire.TRIM, wire.FUA if fua else 0, offset, length)

    def flush(self) -> None:
        """Everything that was answered before is durable on return. Raises OSError."""
        self._do(wire.FLUSH, 0, 0, 0)

    def cache(self, offset: int, length: int) -> None:
        """Asks the server to have that at hand. Raises OSError."""
        self._do(wire.CACHE, 0, offset, length)

    def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[str, Extents]:
        """(length, flags) by agreed context, for the beginning of the range at least. Raises OSError."""
        return self._do(wire.BLOCK_STATUS, wire.REQ_ONE if one else 0, offset, length).extents

    def pipeline(self, depth: int) -> Pipeline:
        """Up to `depth` requests in flight on this connection."""
        return Pipeline(self._channel, depth)


class Pipeline:
    """Requests that do not wait for each other. Each call may block until one of `depth` is answered.

    The first error of any request is raised by the next call or by `finish`; replies come in any order.
    """

    def __init__(self, channel: Channel, depth: int) -> None:
        self._channel = channel
        self._depth = depth
        self._error: OSError | None = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def read(self, offset: int, length: int, then: Callable[[int, bytearray], None]) -> None:
        """`then(offset, data)` runs inside a later call; it may use a pipeline of another connection."""
        self._send(wire.READ, 0, offset, length, None, lambda request: then(request.offset, request.data))

    def write(
        self, offset: int, data: Data, *, fua: bool = False, then: Callable[[], None] | None = None
    ) -> None:  # fmt: skip
        """`data` is sent before this returns; `then` runs inside a later call, once the server took it."""
        self._send(wire.WRITE, wire.FUA if fua else 0, offset, len(data), data, then and (lambda _: then()))

    def zero(
        self, offset: int, length: int, *, no_hole: bool = False, then: Callable[[], None] | None = None
    ) -> None:  # fmt: skip
        """`then` as for `write`."""
        self._send(wire.WRITE_ZEROES, wire.NO_HOLE if no_hole else 0, offset, length, None, then and (lambda _: then()))

    def trim(self, offset: int, length: int) -> None:
        self._send(wire.TRIM, 0, offset, length)

    def flush(self) -> None:
        """Covers what was answered before it was sent: `finish` first to cover everything."""
        self._send(wire.FLUSH, 0, 0, 0)

    def finish(self) -> None:
        """Waits until everything is answered. Raises the first error."""
        while len(self._channel):
            self._channel.receive()
        self._raise()

    def _send(
        self, command: int, flags: int, offset: int, length: int, data: Data | None = None,
        good: Callable[[InFlight], None] | None = None,
    ) -> None:  # fmt: skip
        while len(self._channel) >= self._depth:
            self._channel.receive()
        self._raise()

        def then(request: InFlight) -> None:
            if request.error is not None:
                self._error = self._error or request.error
            elif good is not None:
                good(request)

        self._channel.send(command, flags, offset, length, data, then)

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
