"""What both children have in common: start, say `ready`, serve NBD and control on one loop, stop cleanly.

A child imports neither pydantic nor FastAPI nor typer: it is what the memory is counted for, and what must be
small enough to be started again at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from appliance.control import Channel, Done
from cdp.errors import CdpError, StorageError
from cdp.nbd.contract import Exports, Limits
from cdp.nbd.loop import Loop

# Figures for those who only watch; whoever asks gets fresh ones.
FIGURES_SECONDS = 1.0


class Service(Protocol):
    """What a child runs on its loop."""

    def start(self, loop: Loop) -> None: ...
    def command(self, name: str, arguments: dict[str, Any], done: Done) -> None: ...
    def figures(self) -> dict[str, Any]: ...
    def stop(self) -> None: ...


Make = Callable[[dict[str, Any]], tuple[Service, Exports]]


def main(make: Make) -> int:
    """Runs the service that `make` builds from the settings until the parent says stop. Returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    channel = Channel.from_environment()
    try:
        _run(channel, make)
    except CdpError as e:
        channel.fatal(e)
        return e.exit_code
    except Exception as e:  # a bug, or an I/O error without a sentence of its own: the parent starts us again
        logging.getLogger("cdp").error("%s", traceback.format_exc())
        channel.fatal(StorageError(f"The process ended by an unexpected error: {e!r}.", "See the log above."))
        return StorageError.exit_code
    finally:
        channel.close()
    return 0


def _run(channel: Channel, make: Make) -> None:
    settings = channel.settings()
    service, exports = make(settings)
    loop = Loop(exports, Limits())
    try:
        service.start(loop)
        bound = [_listen(loop, address) for address in settings["listen"]]
        handle = _handler(service, loop)
        loop.add_reader(channel.fileno(), lambda: channel.receive(handle, loop.stop))
        _stop_on_sigterm(loop)
        loop.every(FIGURES_SECONDS, lambda: channel.send({"figures": service.figures()}))
        channel.send({"ready": {"listen": bound}})
        channel.send({"figures": service.figures()})
        loop.run()
    finally:
        service.stop()


def _handler(service: Service, loop: Loop) -> Callable[[str, dict[str, Any], Done], None]:
    def handle(name: str, arguments: dict[str, Any], done: Done) -> None:
        try:
            if name == "stop":
                loop.stop()
            elif name == "figures":
                done(service.figures(), None)
            else:
                service.command(name, arguments, done)
        except CdpError as e:
            done(None, e)
        except Exception as e:  # a bug in one command must not end production
            logging.getLogger("cdp").error("%s: %s", name, traceback.format_exc())
            done(None, StorageError(f"The command {name} failed unexpectedly: {e!r}.", "See the log."))

    return handle


def _stop_on_sigterm(loop: Loop) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(event, 1))
    loop.add_reader(event, loop.stop)


def _listen(loop: Loop, address: str) -> str:
    if address.startswith("unix:"):
        folder = os.path.dirname(address.removeprefix("unix:"))
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as e:
            raise StorageError(f"The folder {folder} cannot be made: {e.strerror}.", "Set another `listen`.") from None
    return loop.listen(address)
