"""Addresses and URIs."""

from __future__ import annotations

import pytest

from cdp.errors import ConfigError
from cdp.nbd.uri import parse_uri


@pytest.mark.parametrize(
    ("text", "address", "export"),
    [
        ("unix:/run/a b.sock", "unix:/run/a b.sock", ""),
        ("tcp:[::1]:10809", "tcp:[::1]:10809", ""),
        ("nbd://host/db@-10m", "tcp:host:10809", "db@-10m"),
        ("nbd://host:1/db@2026-11-22T14:05:00%2B01:00", "tcp:host:1", "db@2026-11-22T14:05:00+01:00"),
        ("nbd://[::1]:5/", "tcp:[::1]:5", ""),
        ("nbd+unix:///a%20b?socket=/tmp/x%3Fy", "unix:/tmp/x?y", "a b"),
        ("nbd+unix:///?socket=rel.sock", "unix:rel.sock", ""),
    ],
)
def test_good(text: str, address: str, export: str) -> None:
    assert parse_uri(text) == (address, export)


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "tcp:host", "tcp:host:x", "nbds://host/x", "nbd:///x", "nbd+unix:///x", "nbd://h:99999/x",
     "nbd://h/db@#5", "nbd+unix://host/x?socket=/y", "http://x"],
)  # fmt: skip
def test_bad(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_uri(text)
