"""A real appliance from a generated configuration: `cdp up`, or `cdp collector` and `cdp replayer`, as processes.

Everything is waited for with a limit; nothing sleeps for luck.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance import health
from appliance.client import Client
from appliance.reaching import Reach
from cdp.config import load
from cdp.errors import UnreachableError

CDP = str(Path(sys.executable).parent / "cdp")
# A cold start with recovery on a machine whose cores are busy with other tests.
READY_SECONDS = 40
CLI_SECONDS = 120
# Between two looks at a condition: long enough not to be the load itself.
POLL_SECONDS = 0.02


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For preexec_fn: no server outlives tests or benchmarks that were killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class CliFailed(AssertionError):
    """A command ended with another exit code than expected."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = READY_SECONDS) -> Any:
    """The first true value of `condition`; AssertionError naming `what` after `seconds`."""
    pause, end = threading.Event(), time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        pause.wait(POLL_SECONDS)


class Service:
    """One foreground command (`up`, `collector`, `replayer`), from its start to its end."""

    def __init__(self, config: Path, command: str, log: Path, prefix: tuple[str, ...] = ()) -> None:
        self.name, self.log = command, log
        self.lines: list[str] = []
        self._ready, self._eof = threading.Event(), threading.Event()
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [*prefix, CDP, "--config", str(config), command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=die_with_parent,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.strip() == "ready":
                self._ready.set()
        self._eof.set()
        self._ready.set()

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Until it printed `ready`; AssertionError with its log when it ended or did not get there."""
        if self._ready.wait(seconds) and not self._eof.is_set():
            return
        raise AssertionError(f"cdp {self.name} did not get ready: {self.lines}\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self, seconds: float = READY_SECONDS) -> int:
        """SIGTERM and its exit code (0 is a clean stop)."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"cdp {self.name} did not stop in {seconds} s\n{self.tail()}") from None
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """kill -9 of the parent; its child must end with it."""
        self.process.kill()
        self.process.wait()


@dataclass
class Appliance:
    """A generated configuration in a folder of its own, and the processes started from it."""

    folder: Path
    volumes: dict[str, int]  # name → size in bytes
    group: str = "shop"
    window: str = "24h"
    window_size: str = ""
    segment_size: str = "4MiB"
    max_size: str = "4GiB"
    journal: str = 'kind = "embedded"'  # the lines of [journal] that say which carrier
    ack: str = 'ack = "local"'  # the lines of [[group]] that say what a flush waits for
    disk: Path | None = None  # where the primaries are, if not in `folder`
    listen: dict[str, str] = field(default_factory=dict)  # by role: one more address of its NBD server
    more: dict[str, str] = field(default_factory=dict)  # by section: further lines of it
    prefix: tuple[str, ...] = ()  # before every command, like `ip netns exec NAME`
    services: dict[str, Service] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "cdp.toml"

    def socket(self, side: str) -> Path:
        return self.folder / f"{side}.sock"

    def primary(self, volume: str) -> Path:
        return (self.disk or self.folder) / f"{volume}.raw"

    @property
    def relayed(self) -> bool:
        return "kafka" in self.journal

    def write_config(self) -> None:
        lines = [
            f'[appliance]\nstate_dir = "{self.folder / "state"}"',
            *(self._served(role) for role in ("collector", "replayer")),
            *(f"[{section}]\n{self.more[section]}" for section in ("relay", "control") if section in self.more),
            f'[journal]\n{self.journal}\nsegment_size = "{self.segment_size}"\nmax_size = "{self.max_size}"',
            f'[[group]]\nname = "{self.group}"\nwindow = "{self.window}"\n{self.ack}',
        ]
        if self.window_size:
            lines.append(f'window_size = "{self.window_size}"')
        for name, size in self.volumes.items():
            lines.append(f'[[group.volume]]\nname = "{name}"\nprimary = "file:{self.primary(name)}"\nsize = "{size}B"')
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text("\n".join(lines) + "\n")

    def _served(self, role: str) -> str:
        addresses = [f"unix:{self.socket(role)}", *([self.listen[role]] if role in self.listen else [])]
        return f"[{role}]\nlisten = {json.dumps(addresses)}\n{self.more.get(role, '')}"

    # --- processes

    def start(self, *commands: str) -> None:
        """Starts these (default `up`) and waits for `ready` of each."""
        if not self.config.exists():
            self.write_config()
        for command in commands or ("up",):
            self.services[command] = Service(self.config, command, self.folder / f"{command}.log", self.prefix)
        for command in commands or ("up",):
            self.services[command].wait_ready()

    def stop(self) -> None:
        """A clean stop of everything; the exit codes must be 0."""
        codes = {name: service.stop() for name, service in self.services.items()}
        self.services.clear()
        assert not any(codes.values()), f"exit codes after SIGTERM: {codes}"

    def end(self) -> None:
        """Whatever still runs is ended, and nothing is asserted (tear-down)."""
        for service in self.services.values():
            with contextlib.suppress(AssertionError):
                service.stop(10)
        self.services.clear()

    def child(self, side: str) -> int:
        """The pid of the child that does the work (`collector`, `replayer`)."""
        return int(self.look()["processes"][side])

    def kill_child(self, side: str) -> None:
        """kill -9 of a working child; returns when a supervised successor answers with another pid."""
        pid = self.child(side)
        os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            new = self.look()["processes"][side]
            return bool(new) and new != pid

        wait_for(replaced, f"a new {side} after kill -9")

    # --- the command line

    def run(self, *arguments: str, timeout: float = CLI_SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.prefix, CDP, "--config", str(self.config), *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )

    def cli(self, *arguments: str, expect: tuple[int, ...] = (0,), timeout: float = CLI_SECONDS) -> str:
        done = self.run(*arguments, timeout=timeout)
        if done.returncode not in expect:
            raise CliFailed(self._told(arguments, done))
        return done.stdout

    def json(self, *arguments: str, expect: tuple[int, ...] = (0,), timeout: float = CLI_SECONDS) -> dict[str, Any]:
        done = self.run(*arguments, "--json", timeout=timeout)
        if done.returncode not in expect or not done.stdout.startswith("{"):
            raise CliFailed(self._told(arguments, done))
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    def _told(self, arguments: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> str:
        return f"cdp {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{service.tail()}" for name, service in self.services.items())

    # --- the control API, for what is asked often: a command line of its own takes half a second of CPU

    def control(self) -> Client:
        return Client(Reach(str(self.folder / "state")))

    def look(self) -> dict[str, Any]:
        """What `cdp status --json` prints; a part that cannot be reached just now is left out."""
        answers: dict[str, dict[str, Any] | None] = {}
        for role in ("replayer", *(["relay"] if self.relayed else []), "collector"):
            try:
                answers[role] = self.control().status(role)
            except UnreachableError:
                answers[role] = None
        groups = [
            {"name": g.name, "window_ns": g.window_ns, "max_lag_ns": g.max_lag,
             "volumes": [{"name": v.name, "size": v.size, "primary": v.primary} for v in g.volumes]}
            for g in load(str(self.config)).groups
        ]  # fmt: skip
        sides = answers["collector"], answers["replayer"], answers.get("relay")
        return health.status(groups, *sides, relayed=self.relayed)

    def bookmark(self, name: str) -> int:
        """The seq of a new bookmark, which can be opened."""
        seq = int(self.control().collector("bookmark", group=self.group, name=name)["seq"])
        arguments = {"group": self.group, "seq": seq, "timeout_seconds": CLI_SECONDS}
        assert self.control().command("replayer", "wait", arguments, CLI_SECONDS)["applied"], f"seq {seq} not applied"
        return seq

    def wait_protected(self, seconds: float = READY_SECONDS) -> dict[str, Any]:
        """Until the group is protected and nothing waits to be replayed; the status that says so."""

        def settled() -> dict[str, Any] | None:
            status = self.look()
            groups = status.get("groups") or []
            good = groups and all(
                g["state"] == "protected" and (g["replay"] or {}).get("lag_seq") in (0, 1) for g in groups
            )
            return status if good else None

        found = wait_for(settled, "protected, without lag", seconds)
        assert isinstance(found, dict)
        return found

    # --- where it listens

    def uri(self, volume: str) -> str:
        return f"nbd+unix:///{volume}?socket={self.socket('collector')}"

    def past(self, volume: str, point: str = "now") -> str:
        return f"nbd+unix:///{volume}@{point}?socket={self.socket('replayer')}"


@contextlib.contextmanager
def running(folder: Path, volumes: dict[str, int], *commands: str, **options: Any) -> Iterator[Appliance]:
    """A started appliance; on the way out it is stopped cleanly, or ended when the body failed."""
    appliance = Appliance(folder, volumes, **options)
    try:
        appliance.start(*commands)
        yield appliance
        appliance.stop()
    finally:
        appliance.end()
