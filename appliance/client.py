"""The client of the parents' APIs, for the CLI and for rollbacks: over the unix socket, or to another machine.

Errors come back as they were raised on the other side; a process that is not there is an UnreachableError.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from appliance import paths
from appliance.reaching import KEEPALIVE, Reach
from cdp.errors import ConfigError, UnreachableError, from_dict

if TYPE_CHECKING:
    import ssl

    import httpx  # loaded when something is asked: what asks nothing (the parents, `cdp config`) starts without it

# The parent answers within its own time limit; this much later it is not there any more.
MARGIN_SECONDS = 5.0
STATUS_SECONDS = 10.0
COMMAND_SECONDS = 30.0
# To another machine: two lost packets of a handshake. A network that is cut would take each whole time limit instead.
CONNECT_SECONDS = 5.0
_DENIED = "permission denied"
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"


class Client:
    """One appliance. Every call opens its own connection: a parent may have been started again in between."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

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

        url = self._reach.remote(role)
        with self._here(role) if url is None else self._there(url) as http:
            limits = httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS))
            try:
                answer = http.request(method, path, json=body, timeout=limits)
            except httpx.HTTPError as e:
                raise self._unreachable(role, url, _why(e)) from None
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict) or (answer.status_code != 200 and "error" not in content):
            raise self._unreachable(role, url, f"it answered with HTTP status {answer.status_code}")
        if answer.status_code == 200:
            return content
        raise from_dict(content["error"], int(content.get("exit_code", 6)))

    @contextlib.contextmanager
    def _here(self, role: str) -> Iterator[httpx.Client]:
        import httpx

        try:
            short = paths.ShortPath(paths.api_socket(self._reach.state_dir, role))
        except OSError as e:
            raise self._unreachable(role, None, _why(e)) from None
        # A unix socket knows no TLS: without `verify=False` each call would load all the system's certificates (80 ms).
        with short as path:
            transport = httpx.HTTPTransport(uds=path, verify=False)
            with httpx.Client(transport=transport, base_url="http://cdp") as http:
                yield http

    @contextlib.contextmanager
    def _there(self, url: str) -> Iterator[httpx.Client]:
        """Its own transport, so that no proxy of the environment sees the token; redirects are not followed."""
        import httpx

        verify = self._trusted() if url.startswith("https:") else False
        transport = httpx.HTTPTransport(verify=verify, socket_options=KEEPALIVE)
        token = self._reach.token()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with httpx.Client(transport=transport, base_url=url, headers=headers) as http:
            yield http

    def _trusted(self) -> ssl.SSLContext:
        """Raises ConfigError."""
        import ssl

        try:
            return ssl.create_default_context(cafile=self._reach.ca)
        except (OSError, ssl.SSLError) as e:
            why = f"The ca {self._reach.ca} of [control] cannot be read: {e.strerror or e}."
            raise ConfigError(why, "It is a PEM file with the certificates of authorities.") from None

    def _unreachable(self, role: str, url: str | None, why: str) -> UnreachableError:
        if url is not None:
            hint = "Does it run there, and does the network let you through?"
            if _UNTRUSTED in why:
                hint = "Set ca in [control] to the authority that signed its certificate, for the name in control_at."
            return UnreachableError(f"The {role} cannot be reached at {url}: {why}.", hint)
        if why == _DENIED:
            hint = f"Run this as the owner of {self._reach.state_dir}."
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
