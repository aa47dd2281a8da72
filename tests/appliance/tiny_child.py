"""A child with a very small service, to test channel, supervision and API without the rooms behind them.

It is a real process on the real loop: a read-only volume of zeros, and commands that answer, fail or end the process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from appliance import child
from appliance.control import Done
from cdp import storage
from cdp.errors import ConfigError, RefusedError
from cdp.nbd import wire
from cdp.nbd.contract import Export, Request
from cdp.nbd.loop import Loop


class Zeros(Export):
    """One volume that reads as zeros."""

    size = 1 << 20
    read_only = True

    def submit(self, connection: Any, requests: list[Request]) -> None:
        for command, _, cookie, offset, length, _ in requests:
            if command == wire.READ:
                connection.slot(cookie, offset, length)[:] = bytes(length)
            else:
                connection.done(cookie)

    def opened(self, connection: Any) -> None:
        return None

    def closed(self, connection: Any) -> None:
        return None


class Tiny:
    """The service, and what it exports."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def names(self) -> list[tuple[str, str]]:
        return [("zeros", "")]

    def open(self, name: str, peer: str) -> Export:
        return Zeros()

    def start(self, loop: Loop) -> None:
        if "refuse" in self.settings:
            raise ConfigError(self.settings["refuse"], "A hint.")
        if "die_once" in self.settings and not os.path.exists(self.settings["die_once"]):
            storage.write_file(self.settings["die_once"], b"")
            os._exit(9)

    def command(self, name: str, arguments: dict[str, Any], done: Done) -> None:
        if name == "bookmark":
            done({"echo": arguments}, None)
        elif name == "consumers":
            done(None, RefusedError("Refused for a test.", "Hint.", code="busy", before={"seq": 1, "time_ns": 2}))
        elif name == "verify":
            raise ZeroDivisionError("a bug")
        elif name == "trust":
            os._exit(7)
        elif name == "clients":
            return  # never answered

    def figures(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def stop(self) -> None:
        if "stopped" in self.settings:
            storage.write_file(self.settings["stopped"], b"clean")


def make(settings: dict[str, Any]) -> tuple[Tiny, Tiny]:
    service = Tiny(settings)
    return service, service


if __name__ == "__main__":
    sys.exit(child.main(make))
