"""Two sites of one appliance: collector and relay at A, the replayer at B; each has its own folder and its own network.

What one knows of the other is `control_at` and `nbd_at`; the journal comes through Kafka.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kafka.broker import START_SECONDS, Broker, java
from tests.support.network import free_port
from tests.support.running import Appliance, die_with_parent, wait_for

# Of sites in networks of their own; on one machine free ones are taken instead.
PORTS = itertools.count(10809)
ROLES = {"a": ("collector", "relay"), "b": ("replayer",)}


class SiteBroker(Broker):
    """A broker inside one site's network, at an address that the other site reaches too."""

    def __init__(self, folder: Path, host: str, prefix: tuple[str, ...]) -> None:
        self._prefix = prefix
        super().__init__(folder)
        properties = folder / "server.properties"
        properties.write_text(properties.read_text().replace("127.0.0.1", host))
        self.address = f"{host}:{self.port}"

    def launch(self) -> None:
        command = java(self._machine, "kafka.Kafka", str(self.folder / "server.properties"))
        with open(self.folder / "log", "ab") as output:
            self._process = subprocess.Popen(
                [*self._prefix, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                preexec_fn=die_with_parent,
            )  # fmt: skip

    def wait_ready(self) -> None:
        wait_for(self._answers, f"a broker at {self.address}", START_SECONDS)

    def _answers(self) -> bool:
        """Asked from inside: nobody outside of its network can connect to it."""
        host, port = self.address.split(":")
        code = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
        return subprocess.run([*self._prefix, sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


class Sites:
    """Site A and site B. `hosts`, `prefixes` by site: its address, and what stands before a command there."""

    def __init__(
        self, folder: Path, volumes: dict[str, int], journal: str, control: dict[str, str],
        hosts: dict[str, str] | None = None, prefixes: dict[str, tuple[str, ...]] | None = None,
    ) -> None:  # fmt: skip
        self._hosts = hosts or dict.fromkeys(ROLES, "127.0.0.1")
        port = free_port if hosts is None else PORTS.__next__
        scheme = "https" if "certificate" in control["a"] else "http"
        listen, more = {}, {}
        for site, roles in ROLES.items():
            for role in roles:
                host, control_port = self._hosts[site], port()
                more[role] = (
                    f'control = "tcp:{host}:{control_port}"\ncontrol_at = "{scheme}://{host}:{control_port}"\n'
                    f'monitor = "tcp:{host}:{port()}"'
                )
                if role != "relay":
                    listen[role] = f"tcp:{host}:{port()}"
                    more[role] += f'\nnbd_at = "{listen[role]}"'
        self.a, self.b = (
            Appliance(
                folder / site, volumes, journal=journal, listen=listen, more=more | {"control": control[site]},
                prefix=(prefixes or {}).get(site, ()),
            )
            for site in ROLES
        )  # fmt: skip
        # The primaries are at A: B has a file of configuration that names them, and nothing behind it.
        self.b.disk = self.a.folder

    def start(self) -> None:
        self.a.start(*ROLES["a"])
        self.b.start(*ROLES["b"])

    def status(self) -> dict[str, Any]:
        """As it is seen from B, healthy or not."""
        return self.b.json("status", expect=(0, 1, 5))

    def is_settled(self) -> bool:
        """Whether B sees everything, healthy, and nothing waits to be replayed."""
        status = self.status()
        return bool(status.get("healthy")) and status["groups"][0]["replay"]["lag_seq"] in (0, 1)

    def monitor(self, role: str) -> str:
        """The base URL of a role's figures."""
        return "http://" + (self.a.more[role].partition('monitor = "tcp:')[2].partition('"')[0])

    def stop(self) -> None:
        for site in (self.b, self.a):
            site.stop()

    def end(self) -> None:
        for site in (self.b, self.a):
            site.end()


@contextlib.contextmanager
def running_sites(*arguments: Any, **options: Any) -> Iterator[Sites]:
    """Started, and stopped cleanly, or ended when the body failed."""
    sites = Sites(*arguments, **options)
    try:
        sites.start()
        yield sites
        sites.stop()
    finally:
        sites.end()
