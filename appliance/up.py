"""`cdp up`: all parents as processes, until Ctrl-C. Says where everything listens, then `ready` once they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys

from appliance import paths
from appliance.control import die_with_parent
from appliance.supervisor import FIRST_DELAY_SECONDS, HEALTHY_SECONDS, MAX_DELAY_SECONDS, environment

log = logging.getLogger("cdp")
# A parent needs up to 30 s to stop its child; a little more, then force.
STOP_SECONDS = 35.0


class Part:
    """One of `cdp collector`, `cdp replayer` and `cdp relay`."""

    def __init__(self, role: str, config_path: str, debug: bool) -> None:
        self.role = role
        self._arguments = ["--config", config_path, *(["--debug"] if debug else []), role]
        self.ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Until `stop` (0), or until it cannot start the first time: its exit code."""
        delay = FIRST_DELAY_SECONDS
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._live()
            if self._stopping.is_set():
                return 0
            if not self.ready.is_set():
                return code or 6
            if asyncio.get_running_loop().time() - began > HEALTHY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            log.warning("cdp %s ended (exit status %d); starting it again in %.1f s", self.role, code, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(delay * 2, MAX_DELAY_SECONDS)

    async def _live(self) -> int:
        # A session of its own: Ctrl-C reaches this process alone, which then stops all in order.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "appliance.cli.main", *self._arguments, env=environment(),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None  # it was asked for
        if self._stopping.is_set():
            self._process.terminate()
        while line := await self._process.stdout.readline():
            text = line.decode(errors="replace").rstrip("\n")
            if text == "ready":
                self.ready.set()
            elif not self.ready.is_set():
                print(text, flush=True)
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, and force after STOP_SECONDS."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.error("cdp %s did not stop within %.0f s and is killed", self.role, STOP_SECONDS)
            process.kill()
            await process.wait()


def run(config_path: str, debug: bool = False, relayed: bool = False) -> int:
    """The exit code: 0 after a clean stop, else that of the part that could not start. `relayed`: a relay too."""
    die_with_parent()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    return asyncio.run(_run(config_path, debug, relayed))


async def _run(config_path: str, debug: bool, relayed: bool) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    roles = [paths.COLLECTOR, *([paths.RELAY] if relayed else []), paths.REPLAYER]
    parts = [Part(role, config_path, debug) for role in roles]
    running = [asyncio.create_task(part.run()) for part in parts]
    announce = asyncio.create_task(_announce(*parts))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({*running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    announce.cancel()
    stopped.cancel()
    # The replayer first: it commits what it has while the collector still takes production's last writes.
    for part in reversed(parts):
        await part.stop()
    return max(await asyncio.gather(*running))


async def _announce(*parts: Part) -> None:
    for part in parts:
        await part.ready.wait()
    print("ready", flush=True)
