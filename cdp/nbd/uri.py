"""Where an NBD server and its export are: `unix:/path`, `tcp:host:port`, and NBD URIs."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from cdp.errors import ConfigError
from cdp.nbd.listening import parse_address

DEFAULT_PORT = 10809


class Place(NamedTuple):
    """`address` as `Loop.listen` takes it; the export's name, "" for the default one."""

    address: str
    export: str


def parse_uri(text: str) -> Place:
    """`nbd://host[:port]/export`, `nbd+unix:///export?socket=/path` (percent-decoded), or an address. ConfigError."""
    if not text.startswith(("nbd:", "nbd+unix:", "nbds:", "nbds+unix:")):
        parse_address(text)
        return Place(text, "")
    hint = "Write nbd://host:port/export or nbd+unix:///export?socket=/path."
    if text.startswith("nbds"):
        raise ConfigError(f"{text!r} asks for TLS, which is not supported.", hint)
    try:
        parts = urlsplit(text)
        port = parts.port or DEFAULT_PORT
        export = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError as e:
        raise ConfigError(f"{text!r} is no NBD URI: {e}.", hint) from e
    if parts.fragment or "#" in text:
        raise ConfigError(f"{text!r}: a # begins a fragment in a URI.", "Write %23 where the export's name has one.")
    if parts.scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if len(sockets) != 1 or parts.netloc:
            raise ConfigError(f"{text!r} names no socket.", hint)
        return Place(f"unix:{sockets[0]}", export)
    if not parts.hostname:
        raise ConfigError(f"{text!r} names no host.", hint)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Place(f"tcp:{host}:{port}", export)
