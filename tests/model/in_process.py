"""Collector and replayer in this process, each on a thread of its own: the very services that the children run.

Without processes an example takes a fraction of a second. `restart` is a clean stop and a new start; kills are for
the profile with real processes.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance import paths
from appliance.child import Service
from appliance.collector_child import make as make_collector
from appliance.replayer_child import ReplayerService
from appliance.settings import child_settings
from cdp.config import load
from cdp.errors import CdpError, UnreachableError
from cdp.nbd.contract import Exports, Limits
from cdp.nbd.loop import Loop
from cdp.recovery.plan import plan
from cdp.recovery.rollback import Rollback
from tests.model.rig import read_point
from tests.support.nbd import NbdClient
from tests.support.running import Appliance, wait_for

# A command of a healthy service on a busy machine.
COMMAND_SECONDS = 30.0


def make_replayer(settings: dict[str, Any]) -> tuple[Service, Exports]:
    """As the child does, without lowering this process's priority."""
    service = ReplayerService(settings)
    return service, service.exports()


class ServiceThread:
    """One service on one loop on one thread; commands are handed to the loop and waited for."""

    def __init__(self, make: Callable[[dict[str, Any]], tuple[Service, Exports]], settings: dict[str, Any]) -> None:
        self._make, self._settings = make, settings
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ready = threading.Event()
        self.error: BaseException | None = None
        self._loop: Loop | None = None
        self.service: Service | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(COMMAND_SECONDS)
        self._raise()

    def _run(self) -> None:
        try:
            service, exports = self._make(self._settings)
            self._loop = loop = Loop(exports, Limits())
            try:
                service.start(loop)
                self.service = service
                for address in self._settings["listen"]:
                    loop.listen(address)
                loop.add_reader(self._event, self._serve_calls)
                self._ready.set()
                loop.run()
            finally:
                service.stop()
        except BaseException as e:  # raised again by whoever asks this service for something
            self.error = e
        finally:
            self._ready.set()

    def _serve_calls(self) -> None:
        os.eventfd_read(self._event)
        while not self._calls.empty():
            self._calls.get()()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error
        if self.service is None:
            raise AssertionError("the service did not start")

    def command(self, name: str, arguments: dict[str, Any], timeout_seconds: float = COMMAND_SECONDS) -> dict[str, Any]:
        """The answer to a command. Raises the CdpError that came back."""
        self._raise()
        answers: queue.SimpleQueue[tuple[dict[str, Any] | None, CdpError | None]] = queue.SimpleQueue()
        service = self.service
        assert service is not None

        def ask() -> None:
            try:
                if name == "figures":
                    answers.put((service.figures(), None))
                else:
                    service.command(name, arguments, lambda result, error: answers.put((result, error)))
            except CdpError as e:
                answers.put((None, e))

        self._calls.put(ask)
        os.eventfd_write(self._event, 1)
        try:
            result, error = answers.get(timeout=timeout_seconds)
        except queue.Empty:
            self._raise()
            raise UnreachableError(f"{name} was not answered in {timeout_seconds} s.") from None
        if error is not None:
            raise error
        assert result is not None
        return result

    def stop(self) -> None:
        """A clean stop; what went wrong in the thread comes out here."""
        if self._loop is not None and self.error is None:
            self._loop.stop()
        self._thread.join(COMMAND_SECONDS)
        if self._thread.is_alive():
            raise AssertionError("the service did not stop")
        os.close(self._event)
        if self.error is not None:
            raise self.error


class InProcessRig:
    """Both services for one generated configuration. It is a `Control` too, for recovery's commands."""

    GROUP = "modelgroup"

    def __init__(self, folder: Path, volumes: dict[str, int], **options: Any) -> None:
        self.appliance = Appliance(folder, volumes, group=self.GROUP, **options)
        self.appliance.write_config()
        self.config = load(str(self.appliance.config))
        self.volumes = volumes
        self.services: dict[str, ServiceThread] = {}
        for side in (paths.COLLECTOR, paths.REPLAYER):
            self._start(side)
        self._wait_protected()

    def _start(self, side: str) -> None:
        make = make_collector if side == paths.COLLECTOR else make_replayer
        self.services[side] = ServiceThread(make, child_settings(side, self.config))

    def _wait_protected(self) -> None:
        def protected() -> bool:
            figures = self.services[paths.COLLECTOR].command("figures", {})["groups"][self.GROUP]
            return all(v["state"] == "protected" for v in figures["volumes"].values())

        wait_for(protected, "the initial sync ends")

    def command(
        self, role: str, name: str, arguments: dict[str, Any], timeout_seconds: float = COMMAND_SECONDS, /
    ) -> dict[str, Any]:
        return self.services[role].command(name, arguments, timeout_seconds)

    def client(self, volume: str) -> NbdClient:
        return NbdClient(self.appliance.socket("collector"), volume)

    def read(self, volume: str, seq: int) -> bytes | None:
        return read_point(self.appliance.socket("replayer"), volume, seq)

    def _wait_applied(self, seq: int) -> None:
        answer = self.command(paths.REPLAYER, "wait", {"group": self.GROUP, "seq": seq, "timeout_seconds": 20.0})
        assert answer["applied"], f"seq {seq} was not applied in 20 s"

    def bookmark(self, name: str) -> int:
        seq = int(self.command(paths.COLLECTOR, "bookmark", {"group": self.GROUP, "name": name})["seq"])
        self._wait_applied(seq)
        return seq

    def oldest(self) -> int:
        answer = self.command(paths.REPLAYER, "points", {"name": next(iter(self.volumes)), "limit": 1})
        return int(answer["oldest"]["seq"])

    def rollback(self, volumes: list[str], seq: int) -> tuple[int, int]:
        """The job itself, on this thread."""
        job = plan(self, self.GROUP, volumes, f"seq:{seq}", None, time.time_ns()).job(disconnect=True)
        path = self.appliance.folder / f"rollback-{len(list(self.appliance.folder.glob('rollback-*')))}"
        collector, replayer = (f"unix:{self.appliance.socket(side)}" for side in (paths.COLLECTOR, paths.REPLAYER))
        rollback = Rollback(str(path), job, self, collector, replayer)
        try:
            done = rollback.run()
        finally:
            rollback.close()
        assert done.begin is not None and done.end is not None
        self._wait_applied(done.end["seq"])
        return int(done.begin["seq"]), int(done.end["seq"])

    def equal(self, volume: str) -> bool:
        answer = self.command(paths.COLLECTOR, "verify", {"volume": volume})
        self._wait_applied(answer["last_seq"])
        ends = {"volume": volume, "first_seq": answer["first_seq"], "last_seq": answer["last_seq"]}
        return not self.command(paths.REPLAYER, "verify_result", ends)["mismatches"]

    def restart(self, side: str) -> None:
        self.services[side].stop()
        self._start(side)

    def close(self) -> None:
        for side in (paths.REPLAYER, paths.COLLECTOR):
            self.services[side].stop()
