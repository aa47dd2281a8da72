"""How each process is reached from here: its unix socket in the state folder if it answers, else over the network.

Plain data made from the configuration, so that it can be handed to a rollback's process.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from appliance import paths
from cdp.errors import ConfigError

# A parent's loop accepts at once; one that does not is as good as away.
PROBE_SECONDS = 1.0
# Long enough that nobody guesses it, short enough for a person to have made it.
MIN_TOKEN_CHARACTERS = 16
# A token is a line; more than this is another file.
MAX_TOKEN_BYTES = 4096
# Options of a TCP socket of the API. A network that is cut is noticed in some 30 s on both sides: a `verify` may wait
# an hour for its answer, and who died gives its connection back.
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """The ways to the processes that share a configuration; by role where there is one for each."""

    state_dir: str
    listen: dict[str, list[str]] = field(default_factory=dict)
    control_at: dict[str, str] = field(default_factory=dict)
    nbd_at: dict[str, str] = field(default_factory=dict)
    token_file: str | None = None
    ca: str | None = None

    def is_here(self, role: str) -> bool:
        """Whether the role's parent answers on its unix socket."""
        return _answers(paths.api_socket(self.state_dir, role))

    def remote(self, role: str) -> str | None:
        """The base URL of the role's API where its unix socket does not answer; None: the unix socket it is."""
        url = self.control_at.get(role)
        return None if url is None or self.is_here(role) else url

    def nbd(self, role: str) -> str:
        """Where the role's NBD server is: its unix socket if it answers, else `nbd_at`, else TCP on this machine."""
        here, away = paths.client_address(self.listen[role]), self.nbd_at.get(role)
        if away is None or (here.startswith("unix:") and _answers(here.removeprefix("unix:"))):
            return here
        return away

    def token(self) -> str | None:
        """The bearer token, None where there is none. Raises ConfigError."""
        return None if self.token_file is None else read_token(self.token_file)


def _answers(path: str) -> bool:
    try:
        with paths.ShortPath(path) as short, socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(PROBE_SECONDS)
            probe.connect(short)
    except OSError:
        return False
    return True


def read_token(path: str) -> str:
    """The one line of a token's file. Raises ConfigError; its text never holds what the file says."""
    hint = "Make one with: openssl rand -hex 32"
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_TOKEN_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"The token_file {path} of [control] cannot be read: {e.strerror}.", hint) from None
    token = raw.decode("ascii", "replace").strip()
    if len(token) < MIN_TOKEN_CHARACTERS:
        short = f"The token in {path} is shorter than {MIN_TOKEN_CHARACTERS} characters."
        raise ConfigError(short, hint)
    if len(raw) > MAX_TOKEN_BYTES or any(not "!" <= c <= "~" for c in token):
        raise ConfigError(f"{path} holds no token: one line of letters, digits and signs, without spaces.", hint)
    return token


def is_readable_by_all(path: str) -> bool:
    """Whether any user of this machine may read a file that can be read."""
    return bool(os.stat(path).st_mode & 0o004)
