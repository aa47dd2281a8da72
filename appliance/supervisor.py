"""One child process, kept alive, and the parent's end of its control channel.

A child that cannot start the first time ends the whole command with its own sentence and exit code; one that ran
once is started again for as long as the parent lives, each time a little later.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from typing import Any

from appliance.control import FD_VARIABLE, MAX_COMMANDS, PARENT_VARIABLE
from cdp.errors import CdpError, RefusedError, StorageError, UnreachableError, from_dict

log = logging.getLogger("cdp")

# A killed child is back before clients give up; one that fails at once does not take a core.
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.1, 10.0
# Who ran this long is healthy: its next end starts from the first delay again.
HEALTHY_SECONDS = 30.0
# Ends without a reason before it was ever ready: something outside is wrong, and the caller must hear of it.
MAX_FIRST_STARTS = 5
# A clean stop syncs journal, primaries and replica; a disk that needs longer is left to the next start's recovery.
STOP_SECONDS = 30.0
# The largest answer is a list of extents: some 40 bytes each, a million of them.
MAX_LINE_BYTES = 64 << 20
# "At most ten snapshots a second": a status in a loop must not cost production.
FIGURES_INTERVAL_SECONDS = 0.1
FIGURES_TIMEOUT_SECONDS = 3.0

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def environment() -> dict[str, str]:
    """What a process of the appliance is started with: this very code, and to die with who starts it."""
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
    # glibc keeps an arena for each thread that ever allocated; two are enough for threads that sit in system calls.
    return os.environ | {"PYTHONPATH": path, PARENT_VARIABLE: str(os.getpid()), "MALLOC_ARENA_MAX": "2"}


class Supervisor:
    """Runs `python -m module` with `settings`. All methods belong to the thread of the asyncio loop."""

    def __init__(self, role: str, module: str, settings: dict[str, Any]) -> None:
        self.role = role
        self._module = module
        self._settings = settings
        self.pid: int | None = None
        self.listen: list[str] = []
        self.restarts = 0
        self.last_error: CdpError | None = None
        self.ready = asyncio.Event()
        # The figures that the child sent last by itself, and when (the loop's clock): for who only watches.
        self.latest: dict[str, Any] | None = None
        self.heard_at = 0.0
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._asked_at = 0.0
        self._asking: asyncio.Task[dict[str, Any]] | None = None

    async def run(self) -> None:
        """Until `stop`. Raises CdpError when the child cannot start the first time."""
        delay, started_once, failures = FIRST_DELAY_SECONDS, False, 0
        while not self._stopping.is_set():
            began, self.last_error = time.monotonic(), None
            await self._live()
            started_once = started_once or self.ready.is_set()
            self._lost()
            if self._stopping.is_set():
                return
            failures += 1
            if not started_once and (self.last_error or failures >= MAX_FIRST_STARTS):
                raise self.last_error or StorageError(f"The {self.role} process cannot be started.", "See its log.")
            if time.monotonic() - began > HEALTHY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            reason = self.last_error or f"exit status {self._process.returncode if self._process else '?'}"
            log.warning("%s ended (%s); starting it again in %.1f s", self.role, reason, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(delay * 2, MAX_DELAY_SECONDS)
            self.restarts += 1

    async def _live(self) -> None:
        """One life of the child, from its start to its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL,
                env=environment() | {FD_VARIABLE: str(theirs.fileno())},
            )  # fmt: skip
        if self._stopping.is_set():
            self._process.terminate()  # `stop` came while it was being made, and could not tell it
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        self._write({"settings": self._settings})
        try:
            while line := await reader.readline():
                self._receive(json.loads(line))
        except ConnectionError:
            pass  # it ended with something of ours unread
        except ValueError as e:
            log.error("%s sent what cannot be read: %s", self.role, e)
            self._process.kill()
        await self._process.wait()
        self._writer.close()

    def _receive(self, message: dict[str, Any]) -> None:
        if "figures" in message:
            self.latest, self.heard_at = message["figures"], asyncio.get_running_loop().time()
        elif "ready" in message:
            self.heard_at = asyncio.get_running_loop().time()
            self.listen = message["ready"].get("listen", [])
            self.pid = self._process.pid if self._process else None
            self.ready.set()
        elif "fatal" in message:
            self.last_error = from_dict(message["fatal"], message["exit_code"])
        elif "id" in message:
            waiting = self._answers.pop(message["id"], None)
            if waiting is not None and not waiting.done():
                if "error" in message:
                    waiting.set_exception(from_dict(message["error"], message["exit_code"]))
                else:
                    waiting.set_result(message["result"])

    def _lost(self) -> None:
        self.ready.clear()
        self.pid, self._writer, self.latest = None, None, None
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(self._unreachable("ended before it answered"))
        self._answers.clear()

    def _unreachable(self, why: str) -> CdpError:
        because = f" ({self.last_error.message})" if self.last_error else ""
        return UnreachableError(f"The {self.role} {why}{because}.", "It is started again by itself; try again.")

    def _write(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def command(self, name: str, arguments: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """The child's answer. Raises the error it answered with, or UnreachableError."""
        if not self.ready.is_set():
            raise self._unreachable("is not ready")
        if len(self._answers) >= MAX_COMMANDS:
            raise RefusedError(f"The {self.role} has {MAX_COMMANDS} commands under way.", "Try again.", code="busy")
        self._next_id += 1
        number = self._next_id
        waiting = self._answers[number] = asyncio.get_running_loop().create_future()
        self._write({"id": number, "command": name, "arguments": arguments})
        try:
            return await asyncio.wait_for(waiting, timeout_seconds)
        except TimeoutError:
            raise UnreachableError(
                f"The {self.role} did not answer {name} within {timeout_seconds:g} s.", "Look at `cdp status`."
            ) from None
        finally:
            self._answers.pop(number, None)

    async def figures(self) -> dict[str, Any]:
        """A snapshot taken after the call; callers at the same time share one. Raises UnreachableError."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, self._asked_at + FIGURES_INTERVAL_SECONDS - time.monotonic()))
        self._asked_at = time.monotonic()
        self._asking = None  # whoever asks from here on wants a newer one
        return await self.command("figures", {}, FIGURES_TIMEOUT_SECONDS)

    async def stop(self) -> None:
        """Ends the child cleanly, or by force after STOP_SECONDS."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        if self.ready.is_set():
            self._next_id += 1
            self._write({"id": self._next_id, "command": "stop"})
        else:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.error("%s did not stop within %.0f s and is killed; the next start recovers", self.role, STOP_SECONDS)
            process.kill()
            await process.wait()
