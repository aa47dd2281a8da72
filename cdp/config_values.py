"""The values of a configuration: sizes, durations, names, paths, addresses, as pydantic types.

Each is read from text with its unit and says in its ValueError how it is written right.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated
from urllib.parse import parse_qs, quote, urlsplit

from pydantic import BeforeValidator, ValidationInfo

# Names are those of bookmarks: they stand in export names, file names and command lines without quoting.
NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9._-]{0,63}"
# The words of point expressions; a volume or a group with such a name could not be told from them.
RESERVED_NAMES = frozenset({"now", "seq", "barrier"})
# sun_path of a unix socket address has 108 bytes, the last one zero.
MAX_SOCKET_PATH_BYTES = 107

_SIZE = re.compile(r"\s*(\d{1,18})(?:\.(\d{1,6}))?\s*([A-Za-z]*)\s*", re.ASCII)
_DURATION = re.compile(r"\s*(\d{1,9})(?:\.(\d{1,6}))?\s*(ms|s|m|h|d|w)\s*", re.ASCII)
_URL = re.compile(r"[!-~]+")  # what a header of a request can carry
_SIZE_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZE_UNITS["kB"] = 1000
_DURATION_UNITS_NS = {
    "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9, "w": 7 * 86400 * 10**9,
}  # fmt: skip


def parse_size(value: object) -> int:
    """Bytes from `64MiB`, `1.5GiB`, `10GB` or a plain number of bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[3] not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is no size; write it like 512B, 64MiB, 10GiB or 1TiB")
    return _exact(match[1], match[2], _SIZE_UNITS[match[3]], value)


def parse_duration_ns(value: object) -> int:
    """Nanoseconds from `500ms`, `90s`, `10m`, `24h`, `7d` or `2w`. Raises ValueError (also without a unit)."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no duration; write it with its unit, like 90s, 10m, 24h or 7d")
    return _exact(match[1], match[2], _DURATION_UNITS_NS[match[3]], value)


def _exact(whole: str, fraction: str | None, unit: int, value: object) -> int:
    fraction = fraction or ""
    scale: int = 10 ** len(fraction)
    number, rest = divmod(int(whole + fraction) * unit, scale)
    if rest:
        raise ValueError(f"{value!r} is not a whole number of its smallest unit")
    return number


def format_size(number: int) -> str:
    """The shortest text that `parse_size` reads as the same number."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if number and number % _SIZE_UNITS[unit] == 0:
            return f"{number // _SIZE_UNITS[unit]}{unit}"
    return f"{number}B"


def format_duration(number_ns: int) -> str:
    """The shortest text that `parse_duration_ns` reads as the same number (whole milliseconds)."""
    for unit in ("d", "h", "m", "s"):
        if number_ns and number_ns % _DURATION_UNITS_NS[unit] == 0:
            return f"{number_ns // _DURATION_UNITS_NS[unit]}{unit}"
    return f"{number_ns // 10**6}ms"


def _name(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(f"{value!r} is no name: a letter or _, then up to 63 letters, digits, '.', '_' or '-'")
    if value in RESERVED_NAMES:
        raise ValueError(f"the name {value!r} is a word of point expressions; choose another one")
    return value


def _absolute(path: str, info: ValidationInfo) -> str:
    if not path or "\0" in path:
        raise ValueError("the path is empty")
    return os.path.normpath(os.path.join((info.context or {}).get("folder", os.getcwd()), path))


def _path(value: object, info: ValidationInfo) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no path")
    return _absolute(value, info)


def _address(value: object, info: ValidationInfo) -> str:
    kind, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "unix" and rest:
        path = _absolute(rest, info)
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"the socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
        return f"unix:{path}"
    host, colon, port = rest.rpartition(":")
    if kind == "tcp" and host and colon and re.fullmatch(r"\d{1,5}", port) and int(port) < 65536:
        return f"tcp:{host}:{int(port)}"
    raise ValueError(f'{value!r} is no address; write "unix:/path/to.sock" or "tcp:127.0.0.1:10809"')


def _primary(value: object, info: ValidationInfo) -> str:
    text = value if isinstance(value, str) else ""
    if text == "none":
        return text
    if text.startswith("file:") and text != "file:":
        return "file:" + _absolute(text.removeprefix("file:"), info)
    url = urlsplit(text)
    if url.scheme == "nbd" and url.hostname:
        return text
    sockets = parse_qs(url.query).get("socket", [])
    if url.scheme == "nbd+unix" and not url.netloc and len(sockets) == 1:
        return f"nbd+unix:///{url.path.lstrip('/')}?socket={quote(_absolute(sockets[0], info))}"
    raise ValueError(
        f'{value!r} is no primary; write "file:/path", "nbd://host:port/export", '
        '"nbd+unix:///export?socket=/path" or "none"'
    )


def _tcp_address(value: object, info: ValidationInfo) -> str:
    if isinstance(value, str) and value.startswith("tcp:"):
        return _address(value, info)
    raise ValueError(f'{value!r} is no TCP address; write "tcp:127.0.0.1:10811" or "tcp:0.0.0.0:10811"')


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `tcp:host:port`. A name other than localhost may mean anything."""
    host = address.removeprefix("tcp:").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(value: object) -> str:
    text = value if isinstance(value, str) else ""
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and url.username is None
    except ValueError:  # brackets or a port that are none
        good = False
    if not good or url.path not in ("", "/") or url.query or url.fragment or not _URL.fullmatch(text):
        raise ValueError(f'{value!r} is no base URL; write "https://host:10811" or "http://host:10811"')
    return f"{url.scheme}://{url.netloc}"


def _broker(value: object) -> str:
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if host and colon and re.fullmatch(r"\d{1,5}", port) and 0 < int(port) < 65536:
        return f"{host}:{int(port)}"
    raise ValueError(f'{value!r} is no broker; write "host:9092"')


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[int, BeforeValidator(parse_duration_ns)]
Name = Annotated[str, BeforeValidator(_name)]
Path = Annotated[str, BeforeValidator(_path)]
Address = Annotated[str, BeforeValidator(_address)]
TcpAddress = Annotated[str, BeforeValidator(_tcp_address)]
Url = Annotated[str, BeforeValidator(_url)]
Primary = Annotated[str, BeforeValidator(_primary)]
Broker = Annotated[str, BeforeValidator(_broker)]
