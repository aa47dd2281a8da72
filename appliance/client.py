"""The client of the parents' APIs, for the CLI and for rollbacks: finds the sockets by the configuration.

Errors come back as they were raised on the other side; a process that is not there is an UnreachableError.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from appliance import paths
from cdp.errors import UnreachableError, from_dict

if TYPE_CHECKING:
    import httpx  # loaded when something is asked: what asks nothing (the parents, `cdp config`) starts without it

# The parent answers within its own time limit; this much later it is not there any more.
MARGIN_SECONDS = 5.0
STATUS_SECONDS = 10.0
COMMAND_SECONDS = 30.0
_DENIED = "permission denied"


class Client:
    """One appliance. Every call opens its own connection: a parent may have been started again in between."""

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir

    def status(self, role: str) -> dict[str, Any]:
        """The state of a parent and a fresh snapshot of its child's figures (None while the child is away)."""
        return self._call(role, "GET", "/v1/status", None, STATUS_SECONDS)

    def command(
        self, role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = COMMAND_SECONDS
    ) -> dict[str, Any]:
        """What the child answered. Raises CdpError."""
        path = f"/v1/command/{name}?timeout_seconds={timeout_seconds:g}"
        return self._call(role, "POST", path, arguments, timeout_seconds + MARGIN_SECONDS)

    def collector(self, command: str, timeout_seconds: float = COMMAND_SECONDS, /, **arguments: Any) -> dict[str, Any]:
        """A command of the collector."""
        return self.command(paths.COLLECTOR, command, arguments, timeout_seconds)

    def replayer(self, command: str, timeout_seconds: float = COMMAND_SECONDS, /, **arguments: Any) -> dict[str, Any]:
        """A command of the replayer."""
        return self.command(paths.REPLAYER, command, arguments, timeout_seconds)

    def rollbacks(self) -> list[dict[str, Any]]:
        """Every rollback job that the replayer's parent remembers, oldest first."""
        return list(self._call(paths.REPLAYER, "GET", "/v1/rollbacks", None, COMMAND_SECONDS)["rollbacks"])

    def rollback(self, number: str, wait_seconds: float = 0.0) -> dict[str, Any]:
        """One rollback job, when it runs no more or after so many seconds (10 at most)."""
        path = f"/v1/rollbacks/{number}?wait_seconds={wait_seconds:g}"
        return self._call(paths.REPLAYER, "GET", path, None, COMMAND_SECONDS)

    def begin_rollback(self, request: dict[str, Any]) -> dict[str, Any]:
        """Starts one; it goes on when this process ends."""
        return self._call(paths.REPLAYER, "POST", "/v1/rollbacks", request, COMMAND_SECONDS)

    def act_on_rollback(self, number: str, action: str) -> dict[str, Any]:
        """`resume`, `undo` or `abandon`."""
        return self._call(paths.REPLAYER, "POST", f"/v1/rollbacks/{number}/{action}", {}, COMMAND_SECONDS)

    def _call(
        self, role: str, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float
    ) -> dict[str, Any]:
        import httpx

        with self._connected(role) as http:
            try:
                answer = http.request(method, path, json=body, timeout=timeout_seconds)
                content = answer.json()
            except (httpx.HTTPError, ValueError) as e:
                raise self._unreachable(role, _why(e)) from None
        if answer.status_code == 200 and isinstance(content, dict):
            return content
        if "error" not in content:
            raise self._unreachable(role, f"it answered with HTTP status {answer.status_code}")
        raise from_dict(content["error"], int(content.get("exit_code", 6)))

    @contextlib.contextmanager
    def _connected(self, role: str) -> Iterator[httpx.Client]:
        import httpx

        try:
            short = paths.ShortPath(paths.api_socket(self._state_dir, role))
        except OSError as e:
            raise self._unreachable(role, _why(e)) from None
        # A unix socket knows no TLS: without `verify=False` each call would load all the system's certificates (80 ms).
        with short as path:
            transport = httpx.HTTPTransport(uds=path, verify=False)
            with httpx.Client(transport=transport, base_url="http://cdp") as http:
                yield http

    def _unreachable(self, role: str, why: str) -> UnreachableError:
        if why == _DENIED:
            hint = f"Run this as the owner of {self._state_dir}."
            return UnreachableError(f"The {role} cannot be reached: permission denied.", hint)
        return UnreachableError(f"The {role} cannot be reached: {why}.", "Start it with `cdp up`; is this its config?")


def _why(error: BaseException) -> str:
    """The reason in words, out of what the system or the HTTP client said."""
    text = str(error)
    if isinstance(error, PermissionError) or os.strerror(errno.EACCES) in text:
        return _DENIED
    if isinstance(error, FileNotFoundError) or any(os.strerror(n) in text for n in (errno.ENOENT, errno.ECONNREFUSED)):
        return "it is not running"
    return text or type(error).__name__
