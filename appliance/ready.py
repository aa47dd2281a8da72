"""`cdp ready ROLE`: the role's /readyz, for health checks of containers.

It is run every few seconds, so it loads the standard library alone: no pydantic, no HTTP library, no check of the whole
configuration. /readyz needs no token.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from appliance import paths
from cdp import config_file
from cdp.errors import CdpError, ConfigError, UnreachableError

ROLES = (paths.COLLECTOR, paths.RELAY, paths.REPLAYER)
NOT_READY = 1
# A parent that lives answers at once; health checks have time limits of their own above this.
TIMEOUT_SECONDS = 3.0
# A status line, a few headers and a sentence.
MAX_ANSWER_BYTES = 16 << 10


class Asked(NamedTuple):
    """The command line: which configuration, which role."""

    config: str | None
    role: str


def asked(arguments: list[str]) -> Asked | None:
    """What `cdp [--config FILE] ready ROLE` asks; None when the arguments are anything else."""
    config: str | None = None
    if len(arguments) > 2 and arguments[0] == "--config":
        config, arguments = arguments[1], arguments[2:]
    elif arguments and arguments[0].startswith("--config="):
        config, arguments = arguments[0].partition("=")[2], arguments[1:]
    if len(arguments) == 2 and arguments[0] == "ready" and arguments[1] in ROLES:
        return Asked(config, arguments[1])
    return None


def run(config: str | None, role: str) -> int:
    """0 ready, 1 not ready (why stands on stderr). Raises UnreachableError, ConfigError."""
    status, text = _ask(config_file.find(config), role)
    print(text, file=sys.stdout if status == 200 else sys.stderr)
    return 0 if status == 200 else NOT_READY


def main(what: Asked) -> int:
    """The same as an exit code; a failure is a sentence on stderr."""
    try:
        return run(*what)
    except CdpError as e:
        print(f"cdp: {e}", file=sys.stderr)
        return e.exit_code


def _ask(path: str, role: str) -> tuple[int, str]:
    content = config_file.read(path)
    state_dir = _text(content, "appliance", "state_dir", path) or config_file.DEFAULT_STATE_DIR
    url = _text(content, role, "control_at", path)
    folder = os.path.dirname(path)
    try:
        with _unix(os.path.join(folder, state_dir), role) as sock:
            return _get(sock, "cdp")
    except (OSError, ValueError) as e:
        if url is None:
            raise UnreachableError(
                f"The {role} cannot be reached: {_why(e)}.", "Does it run, with this configuration?"
            ) from None
    ca = _text(content, "control", "ca", path)
    try:
        with _network(url, None if ca is None else os.path.join(folder, ca)) as (sock, host):
            return _get(sock, host)
    except (OSError, ValueError) as e:
        raise UnreachableError(
            f"The {role} cannot be reached at {url}: {_why(e)}.", "Does it run there, and may you through?"
        ) from None


def _why(e: OSError | ValueError) -> str:
    if isinstance(e, (FileNotFoundError, ConnectionRefusedError)):
        return "it is not running"
    return (isinstance(e, OSError) and e.strerror) or str(e)


def _text(content: dict[str, Any], section: str, key: str, path: str) -> str | None:
    """A string of the file. Raises ConfigError where it is something else."""
    table = content.get(section, {})
    value = table.get(key) if isinstance(table, dict) else table
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{path}: {section}.{key} must be a string.", "`cdp config` checks the whole file.")
    return value


@contextlib.contextmanager
def _unix(state_dir: str, role: str) -> Iterator[socket.socket]:
    with paths.ShortPath(paths.api_socket(state_dir, role)) as name, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_SECONDS)
        sock.connect(name)
        yield sock


@contextlib.contextmanager
def _network(url: str, ca: str | None) -> Iterator[tuple[socket.socket, str]]:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)
    with socket.create_connection((host, port), TIMEOUT_SECONDS) as plain:
        if parts.scheme != "https":
            yield plain, parts.netloc
            return
        import ssl

        with ssl.create_default_context(cafile=ca).wrap_socket(plain, server_hostname=host) as sock:
            yield sock, parts.netloc


def _get(sock: socket.socket, host: str) -> tuple[int, str]:
    """Status and body of /readyz. Raises OSError, ValueError when the answer is none of HTTP."""
    sock.sendall(f"GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = b""
    while len(answer) < MAX_ANSWER_BYTES and (got := sock.recv(MAX_ANSWER_BYTES)):
        answer += got
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ValueError("what answers there is no part of cdp")
    return int(words[1]), body.decode(errors="replace").strip()
