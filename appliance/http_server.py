"""The HTTP servers of a parent, all on its one loop: uvicorn on sockets that are open already, with limits.

Each endpoint counts its own connections, so that a crowd on the network never keeps the unix socket from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from appliance.reaching import KEEPALIVE

log = logging.getLogger("cdp")

# Requests under way at a stop get this long; their callers hear "ended before it answered" after it.
GRACE_SECONDS = 2
# The CLI, rollbacks and a few watchers. Who comes above it hears 503.
MAX_CONNECTIONS = 64
# Above it even that answer costs too much, and a connection is closed unheard: descriptors are the child's pipe too.
MAX_OPEN_CONNECTIONS = 2 * MAX_CONNECTIONS
# A request's head is a line, a token and a few fields; it comes in one packet.
MAX_HEAD_BYTES = 16 << 10
HEAD_SECONDS = 10.0
# Between two requests of one connection; every client of ours opens a new one for each.
IDLE_SECONDS = 5


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application on a listening socket; with a certificate (and its key) over TLS."""

    app: Any
    listener: socket.socket
    certificate: str | None = None
    key: str | None = None


@contextlib.asynccontextmanager
async def serving(*endpoints: Endpoint) -> AsyncIterator[None]:
    """Serves all of them inside the block; their sockets are closed after it."""
    servers = [_Server(_configuration(endpoint)) for endpoint in endpoints]
    tasks = [
        asyncio.create_task(server.serve(sockets=[endpoint.listener]))
        for server, endpoint in zip(servers, endpoints, strict=True)
    ]
    try:
        yield
    finally:
        for server in servers:
            server.leave()
        for failure in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(failure, Exception):
                log.error("an HTTP server ended by %r", failure)


def _configuration(endpoint: Endpoint) -> uvicorn.Config:
    return uvicorn.Config(
        endpoint.app, http=_Connection, ws="none", lifespan="off", log_config=None, log_level="error",
        access_log=False, server_header=False, date_header=False, backlog=MAX_CONNECTIONS,
        limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_certfile=endpoint.certificate, ssl_keyfile=endpoint.key,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """Signals are the parent's business, and nothing wakes it ten times a second while nobody asks."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leave = asyncio.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._leave.set()

    async def main_loop(self) -> None:
        await self._leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """One that is closed when no request comes in time: holding it open is not for nothing."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_OPEN_CONNECTIONS:
            transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            for option in KEEPALIVE:
                sock.setsockopt(*option)
        self._expect_request()

    def _expect_request(self) -> None:
        self._cancel()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self._is_busy():
            self.transport.abort()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_busy():
            self._cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_busy() and not self.transport.is_closing():
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)
