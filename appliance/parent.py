"""A parent: supervises one child, serves its API on a unix socket (and on TCP where asked for), ends with it.

`run` is what `cdp collector`, `cdp replayer` and `cdp relay` are. Its stdout says where everything
listens and then `ready`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator

from appliance import api, endpoints, monitor, paths
from appliance.control import die_with_parent
from appliance.http_server import serving
from appliance.rollbacks import RollbackJobs
from appliance.settings import child_settings
from appliance.supervisor import Supervisor
from cdp import storage
from cdp.config import Config
from cdp.errors import StorageError

# "A start waits up to 10 s for locks": as long as a process that was told to stop may need to go.
LOCK_SECONDS = 10.0
MODULES = {
    paths.COLLECTOR: "appliance.collector_child",
    paths.REPLAYER: "appliance.replayer_child",
    paths.RELAY: "appliance.relay_child",
}


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
    apps = api.build(supervisor, rollbacks, config.groups), monitor.build(supervisor, config.groups)
    served = endpoints.open_all(role, config, *apps)
    async with serving(*served.endpoints), _unlinked(paths.api_socket(config.appliance.state_dir, role)):
        child = asyncio.create_task(supervisor.run())
        announce = asyncio.create_task(_announce(supervisor, served.lines))
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


@contextlib.asynccontextmanager
async def _unlinked(path: str) -> AsyncIterator[None]:
    """Nobody finds the socket after the block."""
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


async def _announce(supervisor: Supervisor, served: list[str]) -> None:
    await supervisor.ready.wait()
    for line in served:
        print(f"{supervisor.role}: {line}", flush=True)
    for address in supervisor.listen:
        print(f"{supervisor.role}: {describe(address)}", flush=True)
    print("ready", flush=True)


def describe(address: str) -> str:
    """An address as an NBD URI that tools take."""
    if address.startswith("unix:"):
        return f"nbd+unix:///?socket={address.removeprefix('unix:')}"
    return f"nbd://{address.removeprefix('tcp:')}"
