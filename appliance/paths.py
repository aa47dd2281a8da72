"""Where the appliance keeps what is its own in the state folder, and unix sockets with paths of any length."""

from __future__ import annotations

import os
import socket

COLLECTOR, REPLAYER, RELAY = "collector", "replayer", "relay"
# In the replayer's folder: the files of rollback jobs.
ROLLBACKS = "rollbacks"
ROLLBACK_ACTIONS = ("resume", "undo", "abandon")


def folder(state_dir: str, role: str) -> str:
    """`STATE/collector`, `STATE/replayer` or `STATE/relay`."""
    return os.path.join(state_dir, role)


def journal_folder(state_dir: str, group: str) -> str:
    """The embedded journal of a group, on the collector's machine."""
    return os.path.join(folder(state_dir, COLLECTOR), "groups", group, "journal")


def api_socket(state_dir: str, role: str) -> str:
    """The socket of a parent's HTTP API."""
    return os.path.join(folder(state_dir, role), "api.sock")


def client_address(listen: list[str]) -> str:
    """Where a client on this machine connects: a unix socket if there is one, else TCP."""
    address = next((a for a in listen if a.startswith("unix:")), listen[0])
    for anywhere, here in (("tcp:0.0.0.0:", "tcp:127.0.0.1:"), ("tcp:[::]:", "tcp:[::1]:")):
        if address.startswith(anywhere):
            return here + address.removeprefix(anywhere)
    return address


class ShortPath:
    """A path to a file in a folder that fits a socket address however deep the folder lies (through /proc)."""

    def __init__(self, path: str) -> None:
        directory, name = os.path.split(path)
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}/{name}"

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def listen_private(path: str) -> socket.socket:
    """A listening unix socket of mode 0600 at `path`, in place of a stale one. The caller holds the folder's lock."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with ShortPath(path) as short:
        if os.path.lexists(short):
            os.unlink(short)
        mask = os.umask(0o177)
        try:
            server.bind(short)
        finally:
            os.umask(mask)
    server.listen(64)
    return server
