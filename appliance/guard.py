"""What stands before the API on every socket: the bearer token, and bounds for what a request may cost.

A request is read whole before the application sees it, so its body is bounded in bytes and in time for every path.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from appliance.control import MAX_COMMAND_BYTES
from appliance.monitor import PATHS
from cdp.errors import CdpError, RefusedError, UsageError
from cdp.said import Said

log = logging.getLogger("cdp")

# A child takes no longer command than this; less by what surrounds the arguments on their way to it.
MAX_BODY_BYTES = MAX_COMMAND_BYTES - 4096
# The largest body passes any network worth the name in this time; who is slower only holds a connection.
BODY_SECONDS = 20.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Rejected(Exception):
    """The request goes no further: this status, and this sentence."""

    def __init__(self, status: int, error: CdpError) -> None:
        super().__init__(error.message)
        self.status, self.error = status, error


class Guard:
    """An ASGI application around another one. `token` None: none is asked for."""

    def __init__(self, app: App, role: str, token: str | None, *, from_network: bool) -> None:
        self._app, self._role, self._from_network = app, role, from_network
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._said = Said(log)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if self._from_network:
                self._check(scope)
            whole = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except _Rejected as e:
            await _answer(e, scope, receive, send)
            return
        except TimeoutError:
            late = UsageError(f"The request did not come whole within {BODY_SECONDS:g} s.", "Is the network well?")
            await _answer(_Rejected(408, late), scope, receive, send)
            return
        if whole is not None:
            await self._app(scope, _again(whole, receive), send)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if b"origin" in headers:
            # A browser sends it with what a page of another site makes it ask: no page may roll a volume back.
            raise _Rejected(403, RefusedError("Web pages may not use this API.", "Use the CLI.", code="unauthorized"))
        if self._expected is None or scope["path"] in PATHS:
            return
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            return
        self._said.tick()
        self._said.add("token", logging.WARNING, "a request from %s had no valid token", (scope["client"] or "?")[0])
        what = "without a token" if not given else "with another token than its own"
        raise _Rejected(401, RefusedError(
            f"The {self._role} refuses a request {what}.",
            "Set token_file in [control] to a file with the same token as on its machine.",
            code="unauthorized",
        ))  # fmt: skip

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None when the client went away before it was whole."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                large = f"The request is larger than {MAX_BODY_BYTES} bytes."
                raise _Rejected(413, UsageError(large, "Ask for less at once."))
            if not message.get("more_body"):
                return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """The whole body once; after it whatever comes, which is the news that the client went away."""
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _answer(rejected: _Rejected, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    error = rejected.error
    # What of the request was not read is not read any more.
    headers = {"Connection": "close"} | ({"WWW-Authenticate": "Bearer"} if rejected.status == 401 else {})
    body = {"error": error.to_dict(), "exit_code": error.exit_code}
    await JSONResponse(body, rejected.status, headers)(scope, receive, send)
