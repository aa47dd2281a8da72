"""The rollback jobs of an appliance: files under STATE/replayer/rollbacks, each run by a process of its own.

They belong to the replayer's parent: killing the CLI does not stop one, and a job that is unfinished when the parent
starts goes on by itself. A run that ends by what may pass (a process that is away) is tried again, later each time;
one that was refused or failed waits for `--resume`, `--undo` or `--abandon`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from appliance import paths
from appliance.control import FD_VARIABLE
from appliance.settings import rollback_settings
from appliance.supervisor import FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS, Supervisor, environment
from cdp import storage
from cdp.config import Config
from cdp.errors import CdpError, NotFoundError, RefusedError, StorageError, UnreachableError, UsageError, from_dict
from cdp.recovery import job as job_file
from cdp.recovery.job import ABANDON, FORWARD, UNDO, Job

log = logging.getLogger("cdp")

MODULE = "appliance.rollback_child"
# Finished jobs are kept for people to look up; the oldest go first.
MAX_KEPT = 200
# A rollback reads both servers as fast as it can: more at once only makes each slower.
MAX_RUNNING = 4
# A progress message or an error: far below.
MAX_LINE_BYTES = 1 << 20
# Copying stops at once; the step that was under way is done again by the next run.
STOP_SECONDS = 5.0
ACTIONS = dict(zip(paths.ROLLBACK_ACTIONS, (FORWARD, UNDO, ABANDON), strict=True))


@dataclass
class _Run:
    """A job's process, while there is one."""

    task: asyncio.Task[None] | None = None
    process: asyncio.subprocess.Process | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    error: CdpError | None = None


class RollbackJobs:
    """All methods belong to the thread of the parent's asyncio loop."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self._config = config
        self._supervisor = supervisor
        self._folder = os.path.join(paths.folder(config.appliance.state_dir, paths.REPLAYER), paths.ROLLBACKS)
        self._runs: dict[str, _Run] = {}
        self._stopping = False
        storage.makedirs(self._folder, mode=0o700, exist_ok=True)

    # --- for the API

    def jobs(self) -> list[dict[str, Any]]:
        """Every job, oldest first."""
        return [self.job(number) for number in self._numbers()]

    def job(self, number: str) -> dict[str, Any]:
        """One job, whether it runs, its progress, and the error it stopped with. Raises NotFoundError."""
        job, run = self._load(number), self._runs.get(number, _Run())
        return job.to_json() | {
            "id": number,
            "active": job.active,
            "running": run.task is not None and not run.task.done(),
            "progress": run.progress,
            "failure": None if run.error is None else run.error.to_dict() | {"exit_code": run.error.exit_code},
        }

    async def watch(self, number: str, seconds: float) -> dict[str, Any]:
        """As `job`, when it runs no more, and in so many seconds at the latest. Raises NotFoundError."""
        run = self._runs.get(number)
        if run is not None and run.task is not None:
            await asyncio.wait({run.task}, timeout=seconds)
        return self.job(number)

    def begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Starts a job of `{"group", "volumes", "target_seq", "target_time_ns", "expression", "disconnect"}`."""
        self._refuse_stopping()
        volumes = list(request["volumes"])
        self._refuse_overlap(volumes)
        job = Job(
            group=request["group"], volumes=volumes, target_seq=int(request["target_seq"]),
            target_time_ns=int(request["target_time_ns"]), expression=str(request["expression"]),
            secret=job_file.new_secret(), disconnect=bool(request["disconnect"]), started_ns=storage.wall_ns(),
        )  # fmt: skip
        self._forget_old()
        number = str(int(max(self._numbers(), key=int, default="0")) + 1)
        job_file.save(self._path(number), job)
        self._start(number, None)
        return self.job(number)

    def act(self, number: str, action: str) -> dict[str, Any]:
        """`resume`, `undo` or `abandon` of an unfinished job."""
        if action not in ACTIONS:
            raise UsageError(f"{action!r} is nothing a rollback can do.", f"It can: {', '.join(ACTIONS)}.")
        self._refuse_stopping()
        job = self._load(number)
        if not job.active:
            raise RefusedError(f"The rollback {number} has ended.", "Start a new one.", code="busy")
        if action != "resume" or not self.job(number)["running"]:
            self._start(number, ACTIONS[action])
        return self.job(number)

    def _refuse_stopping(self) -> None:
        if self._stopping:
            raise UnreachableError("The replayer is stopping.", "Try again when it runs.")

    def _refuse_overlap(self, volumes: list[str]) -> None:
        known = {volume.name for _, volume in self._config.volumes()}
        if not volumes or not set(volumes) <= known:
            raise NotFoundError(f"There is no volume {', '.join(sorted(set(volumes) - known)) or '(none named)'}.")
        active = [(n, job) for n in self._numbers() if (job := self._load(n)).active]
        for number, job in active:
            if set(job.volumes) & set(volumes):
                raise RefusedError(
                    f"The rollback {number} of {', '.join(job.volumes)} is not finished.",
                    f"Let it end, or use --resume, --undo or --abandon on {job.volumes[0]}.",
                    code="busy",
                )
        if len(active) >= MAX_RUNNING:
            raise RefusedError(f"{MAX_RUNNING} rollbacks are under way.", "Wait for one of them.", code="busy")

    # --- files

    def _path(self, number: str) -> str:
        return os.path.join(self._folder, f"{number}.json")

    def _numbers(self) -> list[str]:
        names = (name.removesuffix(".json") for name in storage.listdir(self._folder) if name.endswith(".json"))
        return sorted((name for name in names if name.isdigit()), key=int)

    def _load(self, number: str) -> Job:
        if not number.isdigit():
            raise NotFoundError(f"There is no rollback {number!r}.")
        return job_file.load(self._path(number))

    def _forget_old(self) -> None:
        ended = [n for n in self._numbers() if not self._load(n).active]
        for number in ended[: max(0, len(ended) - MAX_KEPT + 1)]:
            for path in (self._path(number) + ".lock", self._path(number)):
                with contextlib.suppress(FileNotFoundError):
                    storage.unlink(path)
            self._runs.pop(number, None)

    # --- processes

    async def resume_when_ready(self) -> None:
        """Every unfinished job goes on, once the replayer serves; not those that somebody has given a direction."""
        await self._supervisor.ready.wait()
        for number in self._numbers():
            try:
                if number not in self._runs and self._load(number).active:
                    log.info("the rollback %s was interrupted and goes on", number)
                    self._start(number, None)
            except CdpError as e:
                log.error("the rollback %s: %s", number, e)

    def _start(self, number: str, direction: str | None) -> None:
        previous = self._runs.get(number)
        run = self._runs[number] = _Run()
        run.task = asyncio.create_task(self._keep_running(number, run, direction, previous))

    async def _keep_running(self, number: str, run: _Run, direction: str | None, previous: _Run | None) -> None:
        if previous is not None:
            await self._end(previous)
        delay = FIRST_DELAY_SECONDS
        while self._load(number).active:
            run.error = None
            code = await self._live(number, run, direction)
            if run.error is not None and not run.error.retriable:
                log.error("the rollback %s stopped: %s", number, run.error)
                return
            if code == 0 or not self._load(number).active:
                return
            reason = run.error or f"exit status {code}"
            log.warning("the rollback %s was interrupted (%s) and goes on in %.1f s", number, reason, delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, MAX_DELAY_SECONDS)

    async def _live(self, number: str, run: _Run, direction: str | None) -> int:
        ours, theirs = socket.socketpair()
        with theirs:
            run.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", MODULE, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL,
                env=environment() | {FD_VARIABLE: str(theirs.fileno())},
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        settings = rollback_settings(self._config, self._path(number), direction)
        writer.write(json.dumps({"settings": settings}).encode() + b"\n")
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "progress" in message:
                    run.progress = message["progress"]
                elif "fatal" in message:
                    run.error = from_dict(message["fatal"], message["exit_code"])
        except ConnectionError:
            pass  # it was killed before it read its settings
        except ValueError as e:
            log.error("the rollback %s sent what cannot be read: %s", number, e)
            run.process.kill()
        writer.close()
        return await run.process.wait()

    async def _end(self, run: _Run) -> None:
        if run.task is not None:
            run.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, CdpError, StorageError):
                await run.task
        if run.process is not None and run.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                run.process.terminate()
            try:
                await asyncio.wait_for(run.process.wait(), STOP_SECONDS)
            except TimeoutError:
                run.process.kill()
                await run.process.wait()

    async def stop(self) -> None:
        """Ends the processes; unfinished jobs go on at the next start."""
        self._stopping = True
        for run in self._runs.values():
            await self._end(run)
