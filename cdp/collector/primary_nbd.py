"""A primary behind another NBD server: one queue, one connection, one thread; order is kept because it is one.

Before the loop runs it is used by the blocking methods; afterwards only through `write_later`, `read_later` and
`sync_later`, whose answers come from the loop's thread. When the connection is lost, what was not answered stays in
the queue, and whoever owns the volume is told; it brings the journal's tail, which goes before everything else.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from cdp import storage
from cdp.collector.primary import Extent
from cdp.errors import CdpError, ConfigError, StorageError
from cdp.nbd import wire
from cdp.nbd.client import Client

# One turn of the thread: enough to be cheap, few enough that answers do not wait long.
_TURN = 32
# The longest piece that every server takes.
_PIECE_BYTES = 32 << 20
_ZERO_BYTES = 1 << 30
_RECONNECT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
# What a server says about a request; every other error is about the connection.
_REFUSALS = (
    errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.EOPNOTSUPP,
)  # fmt: skip
# The upstream's EIO may be its own journal's stop; it is an answer nevertheless.
_LOST = StorageError("The upstream NBD server is not connected.")

Answer = Callable[["bytearray | None", "BaseException | None"], None]


class Operation(NamedTuple):
    kind: int  # wire.READ, WRITE, WRITE_ZEROES or FLUSH
    offset: int
    length: int
    data: bytes | None
    punch: bool
    done: Answer


class NbdPrimary:
    """See the module. `address` is an NBD URI."""

    fd, inline, readable, created = -1, False, True, False

    def __init__(self, address: str, size_bytes: int) -> None:
        """Raises ConfigError for another size, UnreachableError, RefusedError."""
        self.address = address
        self._client = Client.connect(address, timeout_seconds=_CONNECT_SECONDS)
        self._size = size_bytes
        self._check()
        self.can_zero = bool(self._client.flags & wire.SEND_WRITE_ZEROES)
        self.worker = storage.Worker(1, "upstream")
        self.on_lost: Callable[[BaseException], None] = lambda error: None
        self.on_back: Callable[[], None] = lambda: None
        self.connected = True
        self._queue: deque[Operation] = deque()
        self._first: Iterator[list[Operation]] | None = None
        self._busy = self._closed = False

    def _check(self) -> None:
        if self._client.size != self._size or self._client.read_only:
            size, read_only = self._client.size, self._client.read_only
            self._client.close()
            raise ConfigError(
                f"The upstream {self.address} has {size} bytes{' and is read-only' if read_only else ''}; "
                f"its volume is configured with {self._size}."
            )

    # --- blocking: before the loop runs, and on the thread

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._read(offset, length))

    def _read(self, offset: int, length: int) -> bytearray:
        return self._client.read(offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for at in range(0, len(view), _PIECE_BYTES):
            self._client.write(offset + at, view[at : at + _PIECE_BYTES])

    def zero(self, offset: int, length: int, punch: bool) -> None:
        piece = _ZERO_BYTES if self.can_zero else _PIECE_BYTES
        for at in range(offset, offset + length, piece):
            size = min(piece, offset + length - at)
            if self.can_zero:
                self._client.zero(at, size, no_hole=not punch)
            else:
                self._client.write(at, bytes(size))

    def sync(self) -> None:
        if self._client.flags & wire.SEND_FLUSH:
            self._client.flush()

    def extents(self, offset: int, end: int, limit: int = 1) -> list[Extent]:
        """All of it may be data; zeros are told apart when they are read."""
        return [(end - offset, True)]

    def identity(self) -> dict[str, int | str]:
        return {"kind": "nbd", "address": self.address, "size": self._size}

    def quiesce(self) -> None:
        """The loop has ended: waits for what the thread is at; what is queued stays undone (the journal has it)."""
        if not self._closed:
            self._closed = True
            self.worker.close()

    def close(self) -> None:
        self.quiesce()
        self._client.close()

    # --- later: from the loop's thread, in order

    def write_later(self, offset: int, length: int, data: bytes | None, punch: bool, done: Answer) -> None:
        """`data` None: zeros. While the connection is lost it waits."""
        kind = wire.WRITE_ZEROES if data is None else wire.WRITE
        self._add(Operation(kind, offset, length, data, punch, done))

    def read_later(self, offset: int, length: int, done: Answer) -> None:
        """Fails at once while the connection is lost."""
        if not self.connected:
            return done(None, OSError(errno.EIO, str(_LOST)))
        self._add(Operation(wire.READ, offset, length, None, False, done))

    def sync_later(self, done: Answer) -> None:
        """Covers everything that was queued before. Fails at once while the connection is lost."""
        if not self.connected:
            return done(None, OSError(errno.EIO, str(_LOST)))
        self._add(Operation(wire.FLUSH, 0, 0, None, False, done))

    def go_first(self, turns: Iterator[list[Operation]]) -> None:
        """These operations, a list at a time, before everything that is queued; then `on_back`."""
        self._first = turns
        self._go()

    def hold(self) -> None:
        """For a while nothing goes on, as if the connection had just come back; then `on_back`."""
        self.connected, self._busy = False, True

        def held(_: object, error: BaseException | None) -> None:
            self._busy = False
            self.on_back()

        self.worker.submit(held, storage.pause, _RECONNECT_SECONDS)

    def _add(self, operation: Operation) -> None:
        self._queue.append(operation)
        self._go()

    def _go(self) -> None:
        """Gives the thread its next turn, if it has none."""
        while not self._busy and not self._closed:
            first = self._first is not None
            if self._first is not None:
                turn = next(self._first, None)
                if turn is None:
                    self._first, self.connected = None, True
                    self.on_back()
                    continue
            elif self.connected and self._queue:
                turn = [self._queue.popleft() for _ in range(min(len(self._queue), _TURN))]
            else:
                return
            if turn:
                self._busy = True
                self.worker.submit(partial(self._ran, turn, first), self._run, turn)

    def _run(self, turn: list[Operation]) -> list[tuple[bytearray | None, OSError | None]]:
        """On the thread. Ends early, without a result for what is left, when the connection is lost."""
        results: list[tuple[bytearray | None, OSError | None]] = []
        for operation in turn:
            try:
                results.append((self._execute(operation), None))
            except OSError as e:
                if e.errno not in _REFUSALS:
                    break
                results.append((None, e))
        return results

    def _execute(self, operation: Operation) -> bytearray | None:
        kind, offset, length, data, punch, _ = operation
        if kind == wire.READ:
            return self._read(offset, length)
        if data is not None:
            self.write(offset, data)
        elif kind == wire.WRITE_ZEROES:
            self.zero(offset, length, punch)
        else:
            self.sync()
        return None

    def _ran(
        self, turn: list[Operation], first: bool, results: list[tuple[bytearray | None, OSError | None]] | None,
        error: BaseException | None,
    ) -> None:  # fmt: skip
        if results is None:
            raise error or StorageError("the upstream's thread failed")
        left = turn[len(results) :]
        if left and not first:
            writes = [o for o in left if o.kind in (wire.WRITE, wire.WRITE_ZEROES)]
            self._queue.extendleft(reversed(writes))
            others = [o for o in left if o not in writes]
        else:
            others = []
        for operation, (data, refused) in zip(turn, results, strict=False):
            operation.done(data, refused)
        self._busy = False  # not before: what an answer asks for must not go to a connection that is lost
        if left:
            self._lost(others)
        self._go()

    def _lost(self, others: list[Operation]) -> None:
        self.connected, self._first = False, None
        others += [o for o in self._queue if o.kind in (wire.READ, wire.FLUSH)]
        self._queue = deque(o for o in self._queue if o.kind not in (wire.READ, wire.FLUSH))
        self.on_lost(_LOST)
        for operation in others:
            operation.done(None, OSError(errno.EIO, str(_LOST)))
        self._busy = True
        self.worker.submit(self._reconnected, self._reconnect)

    def _reconnect(self) -> Client | None:
        """On the thread: one attempt."""
        storage.pause(_RECONNECT_SECONDS)
        try:
            return Client.connect(self.address, timeout_seconds=_CONNECT_SECONDS)
        except (CdpError, OSError):
            return None

    def _reconnected(self, client: Client | None, error: BaseException | None) -> None:
        if self._closed:
            return client.close() if client is not None else None
        if client is None or client.size != self._size or client.read_only:
            if client is not None:
                client.close()
            self.worker.submit(self._reconnected, self._reconnect)
            return
        self._client, self._busy = client, False
        self.on_back()
