"""A parent: supervises one child, serves its API on a unix socket, ends with it.

`run` is what `cdp collector`, `cdp replayer` and `cdp relay` are. Its stdout says where everything
listens and then `ready`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from appliance import api, paths
from appliance.control import die_with_parent
from appliance.rollbacks import RollbackJobs
from appliance.settings import child_settings
from appliance.supervisor import Supervisor
from cdp import storage
from cdp.config import Config
from cdp.errors import StorageError

# "A start waits up to 10 s for locks": as long as a process that was told to stop may need to go.
LOCK_SECONDS = 10.0
# Requests under way at a stop get this long; their callers hear "ended before it answered" after it.
GRACE_SECONDS = 2
# The CLI, rollbacks and a few watchers; more connections than this wait unread.
MAX_CONNECTIONS = 64
MODULES = {
    paths.COLLECTOR: "appliance.collector_child",
    paths.REPLAYER: "appliance.replayer_child",
    paths.RELAY: "appliance.relay_child",
}


class _Server(uvicorn.Server):
    """Signals are the parent's business, not the HTTP server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(role: str, config: Config) -> int:
    """Until SIGTERM or Ctrl-C (0), or until the child cannot start the first time: raises its CdpError."""
    die_with_parent()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = paths.folder(config.appliance.state_dir, role)
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        lock = storage.lock_file(os.path.join(home, "parent.lock"), LOCK_SECONDS, f"The state folder {home}")
    except OSError as e:
        raise StorageError(f"The state folder {home} cannot be used: {e.strerror}.", "Set `state_dir`.") from None
    try:
        return asyncio.run(_serve(role, config))
    finally:
        os.close(lock)


async def _serve(role: str, config: Config) -> int:
    supervisor = Supervisor(role, MODULES[role], child_settings(role, config))
    rollbacks = RollbackJobs(config, supervisor) if role == paths.REPLAYER else None
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _http(api.build(supervisor, rollbacks), paths.api_socket(config.appliance.state_dir, role)):
        child = asyncio.create_task(supervisor.run())
        announce = asyncio.create_task(_announce(supervisor))
        resumer = asyncio.create_task(rollbacks.resume_when_ready()) if rollbacks else None
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({child, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if rollbacks:
            await rollbacks.stop()
        await supervisor.stop()
        for task in filter(None, (announce, resumer, stopped)):
            task.cancel()
        await child  # raises what kept it from starting
    return 0


async def _announce(supervisor: Supervisor) -> None:
    await supervisor.ready.wait()
    for address in supervisor.listen:
        print(f"{supervisor.role}: {describe(address)}", flush=True)
    print("ready", flush=True)


def describe(address: str) -> str:
    """An address as an NBD URI that tools take."""
    if address.startswith("unix:"):
        return f"nbd+unix:///?socket={address.removeprefix('unix:')}"
    return f"nbd://{address.removeprefix('tcp:')}"


@contextlib.asynccontextmanager
async def _http(app: FastAPI, path: str) -> AsyncIterator[None]:
    """Serves `app` on the unix socket `path` inside the block."""
    listener: socket.socket = paths.listen_private(path)
    server = _Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
        )
    )  # fmt: skip
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
