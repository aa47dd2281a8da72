"""Addresses and the sockets behind them: "unix:/path" and "tcp:host:port".

A Unix socket's address holds 107 bytes; a longer path is reached through a descriptor of its folder.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cdp.errors import ConfigError, RefusedError, StorageError

MAX_UNIX_PATH_BYTES = 107
# Connections that wait to be accepted; the loop accepts them as soon as it comes round.
_BACKLOG = 64
# More than the kernel usually grants; a reply of a few MiB leaves in fewer calls.
_SEND_BUFFER_BYTES = 1 << 20
# A client whose machine died must not keep its export open for hours.
_KEEPALIVE_SECONDS = 60


def parse_address(address: str) -> tuple[str, str, int]:
    """("unix", path, 0) or ("tcp", host, port). Raises ConfigError."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return kind, rest, 0
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if kind == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return kind, host, int(port)
    raise ConfigError(f"{address!r} is no address.", 'Write "unix:/path" or "tcp:host:port".')


@contextmanager
def unix_name(path: str) -> Iterator[str]:
    """A name of `path` that fits into a socket address, valid inside the block."""
    if len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES:
        yield path
        return
    folder, name = os.path.split(path)
    fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{fd}/{name}"
        if len(os.fsencode(short)) > MAX_UNIX_PATH_BYTES:
            raise ConfigError(f"The socket's name {name!r} is too long.", "Use a name of less than 80 bytes.")
        yield short
    finally:
        os.close(fd)


def connect_unix(path: str, timeout_seconds: float | None) -> socket.socket:
    """A connected stream socket. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_seconds)
        with unix_name(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_live(path: str) -> bool:
    try:
        connect_unix(path, 1.0).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True  # full backlog, no permission: somebody is there
    return True


def listen_unix(path: str) -> socket.socket:
    """A listening socket at `path`. A socket file that nobody listens on is replaced.

    Raises RefusedError when somebody does, or when something else than a socket is there; StorageError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with unix_name(path) as name:
            try:
                sock.bind(name)
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
                _clear(path)
                sock.bind(name)
        sock.listen(_BACKLOG)
    except OSError as e:
        sock.close()
        raise StorageError(f"Cannot listen at {path}: {e.strerror}.", "Choose a path that may be written.") from e
    except BaseException:
        sock.close()
        raise
    return sock


def _clear(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise RefusedError(f"{path} exists and is no socket.", "Choose another path.", code="exists")
    if _is_live(path):
        hint = "Stop the process that listens there, or choose another path."
        raise RefusedError(f"{path} is in use by another process.", hint, code="locked")
    os.unlink(path)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises RefusedError when the port is in use, StorageError."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as e:
        kind = RefusedError if e.errno == errno.EADDRINUSE else StorageError
        code = "locked" if e.errno == errno.EADDRINUSE else "storage"
        raise kind(f"Cannot listen at {host}:{port}: {e.strerror}.", "Choose another address.", code=code) from e
    return sock


def prepare(sock: socket.socket) -> str:
    """Options of an accepted socket; returns the peer's name for people."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        return "unix"
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS // 4)
    host, port = sock.getpeername()[:2]
    return f"{host}:{port}"
