"""The deployment as a user starts it, in a project of its own: other ports, another name for the image.

Everything goes through `docker compose`, as a user's commands do; a container is killed by its process id, because
Docker counts its own `kill` as wanted and starts nothing again.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from tests.compose.files import COMPOSE, GRAFANA, ROOT, plain, services
from tests.support.nbd import NbdClient
from tests.support.running import wait_for

# Two stages and some 40 wheels, on a slow network.
BUILD_SECONDS = 600
# Kafka's first start takes most of it: 20 s of processor time where others want it too. Compose says who is not ready
# by then; it gets a little longer itself.
UP_SECONDS, MARGIN_SECONDS = 300, 30
# A container that was killed: Docker waits up to a few seconds, then it starts as ever.
HEAL_SECONDS = 120
COMMAND_SECONDS = 120
# An image that cannot be pulled in this time is not to be had here.
PULL_SECONDS = 120
TAIL_LINES = 60


def docker(*arguments: str, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds
    )


def why_not() -> str | None:
    """Why there can be no containers here, None if there can."""
    try:
        if docker("info", "--format", "{{.ServerVersion}}").returncode:
            return "no Docker engine answers (`docker info`)"
        if docker("compose", "version").returncode:
            return "there is no `docker compose`"
    except FileNotFoundError:
        return "there is no `docker` here"
    return None


def can_be_had(image: str) -> bool:
    if docker("image", "inspect", image).returncode == 0:
        return True
    try:
        return docker("pull", "--quiet", image, seconds=PULL_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """The project; `up` and `down` frame its life."""

    def __init__(self) -> None:
        self.project = os.environ.get("CDP_TEST_PROJECT") or f"cdp-test-{os.getpid()}"
        self.ports = {name: free_port() for name in ("collector", "replayer", "prometheus", GRAFANA)}
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith("COMPOSE_")}
        self._environ["CDP_IMAGE"] = "cdp:test"
        self._environ.update({f"CDP_{name.upper()}_PORT": str(port) for name, port in self.ports.items()})
        image = plain(services()[GRAFANA]["image"], os.environ)
        self.services = [name for name in services() if name != GRAFANA or can_be_had(image)]

    def compose(self, *arguments: str, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", "--project-name", self.project, "--file", str(COMPOSE), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds, env=self._environ,
            cwd=ROOT,
        )  # fmt: skip

    def done(self, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
        """The output of a `docker compose` command that must work."""
        ran = self.compose(*arguments, seconds=seconds)
        assert ran.returncode == 0, f"docker compose {' '.join(arguments)}: {ran.stdout}\n{ran.stderr}\n{self.logs()}"
        return ran.stdout

    def up(self) -> None:
        """Builds the image, then as `start`."""
        self.done("build", "--quiet", seconds=BUILD_SECONDS)
        self.start()

    def start(self) -> None:
        """Everything, until all are healthy."""
        wait = ("--wait", "--wait-timeout", str(UP_SECONDS))
        self.done("up", "--detach", *wait, *self.services, seconds=UP_SECONDS + MARGIN_SECONDS)

    def down(self) -> None:
        """Nothing of the project is left: no container, volume or network."""
        self.compose("down", "--volumes", "--timeout", "2", "--remove-orphans")
        for kind in ("container", "volume", "network"):
            every = ["--all"] if kind == "container" else []
            left = docker(kind, "ls", "--quiet", *every, "--filter", f"label=com.docker.compose.project={self.project}")
            assert left.returncode == 0 and not left.stdout.strip(), f"left behind: {kind} {left.stdout}"

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", str(TAIL_LINES)).stdout

    # --- what a user types: docker compose exec SERVICE cdp …

    def cdp(self, *arguments: str, service: str = "replayer", expect: tuple[int, ...] = (0,)) -> str:
        ran = self.compose("exec", "--no-TTY", service, "cdp", *arguments)
        told = f"cdp {' '.join(arguments)} in {service}: exit {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        assert ran.returncode in expect, f"{told}\n{self.logs()}"
        return ran.stdout

    def json(self, *arguments: str, service: str = "replayer", expect: tuple[int, ...] = (0,)) -> dict[str, Any]:
        found = json.loads(self.cdp(*arguments, "--json", service=service, expect=expect))
        assert isinstance(found, dict)
        return found

    def wait_protected(self, seconds: float = HEAL_SECONDS) -> dict[str, Any]:
        """Until everything is healthy and nothing waits to be replayed; the status that says so."""
        status: dict[str, Any] = {}

        def settled() -> bool:
            ran = self.compose("exec", "--no-TTY", "replayer", "cdp", "status", "--json")
            status.clear()
            status.update(json.loads(ran.stdout) if ran.stdout.startswith("{") else {"said": ran.stdout + ran.stderr})
            lags = [group["replay"]["lag_seq"] for group in status.get("groups", ())]
            return bool(status.get("healthy") and all(lag is not None and lag <= 1 for lag in lags))

        try:
            wait_for(settled, "healthy, without lag", seconds)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{json.dumps(status, indent=1)}\n{self.logs()}") from None
        return status

    # --- containers

    def container(self, service: str) -> dict[str, Any]:
        """What Docker knows of a service's container."""
        number = self.done("ps", "--all", "--quiet", service).strip()
        described = json.loads(docker("inspect", number).stdout)[0]
        assert isinstance(described, dict)
        return described

    def kill(self, service: str) -> dict[str, Any]:
        """kill -9 of its first process, and so of all in it; the container as it was before."""
        before = self.container(service)
        kill = ["kill", "-KILL", str(before["State"]["Pid"])]
        subprocess.run(kill if os.geteuid() == 0 else ["sudo", "--non-interactive", *kill], check=True)
        return before

    def has_healed(self, service: str, before: dict[str, Any]) -> bool:
        """Whether a container that was killed was started again by itself and is ready."""
        state = self.container(service)["State"]
        again = state["StartedAt"] != before["State"]["StartedAt"]
        return again and state["Running"] and state["Health"]["Status"] == "healthy"

    # --- what the host reaches

    def uri(self, volume: str) -> str:
        """Production."""
        return f"nbd://127.0.0.1:{self.ports['collector']}/{volume}"

    def past(self, volume: str, point: str) -> str:
        return f"nbd://127.0.0.1:{self.ports['replayer']}/{volume}@{point}"

    def open(self, side: str, export: str) -> NbdClient:
        """Raises OSError."""
        return NbdClient(f"tcp:127.0.0.1:{self.ports[side]}", export)

    def prometheus(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now. An expression that Prometheus refuses is an AssertionError."""
        query = urllib.parse.urlencode({"query": expression})
        url = f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/query?{query}"
        try:
            with urllib.request.urlopen(url, timeout=COMMAND_SECONDS) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as e:
            raise AssertionError(f"Prometheus refuses {expression}: {e.read().decode(errors='replace')}") from None
        assert found["status"] == "success", found
        return list(found["data"]["result"])


def uid_in(stack: Stack, service: str) -> int:
    """The user that a service's processes run as."""
    found = re.fullmatch(r"(\d+)\s*", stack.done("exec", "--no-TTY", service, "id", "-u"))
    assert found
    return int(found[1])
