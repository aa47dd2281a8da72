"""Three nodes, of which some die: what was acknowledged stays, what was not waits, and it all goes on by itself."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kafka.test_kafka_faults import Lay, Line, lay
from tests.kafka.three import Three
from tests.support.book import difference
from tests.support.nbd import NbdClient
from tests.support.running import Appliance, running, wait_for

__all__ = ["lay"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# An election, and what clients wait before they ask again, on a machine whose cores are busy.
SECONDS = 120.0
SIZE = 8 << 20


@pytest.fixture(scope="module")
def nodes(kafka_folder: Path) -> Iterator[Three]:
    made = Three(kafka_folder / "three")
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
def three(nodes: Three) -> Three:
    nodes.start()
    return nodes


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="cdp-three-"))  # short: the path of a unix socket has 107 bytes
    yield made
    shutil.rmtree(made, ignore_errors=True)


class Load:
    """Writes on a thread of its own, as fast as an outage lets the journal grow for a minute."""

    def __init__(self, line: Line) -> None:
        self._line, self._stop = line, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self._line.write(3)

    def end(self) -> int:
        """The last seq."""
        self._stop.set()
        self._thread.join()
        return self._line.writer.last_seq


def leader_of(three: Three, line: Line, but: int = 0) -> int:
    found = wait_for(lambda: {three.leader(line.cluster)} - {0, but}, f"a leader other than {but}", SECONDS)
    return int(next(iter(found)))


def test_a_leader_that_dies_under_load(three: Three, lay: Lay) -> None:
    """Promise 4: another node leads, without what was acknowledged missing, doubled or out of order."""
    line = lay(three.cluster())
    line.arrives(line.write(20), SECONDS)
    load = Load(line)
    try:
        for _ in range(2):
            old = leader_of(three, line)
            carried = line.relay.carried_seq
            three.kill(old)
            leader_of(three, line, but=old)
            wait_for(lambda past=carried: line.relay.carried_seq > past + 300, f"{line.relay.figures()}", SECONDS)
            line.read()
            three.start()
            wait_for(lambda: three.in_sync(line.cluster) == 3, "all nodes in sync", SECONDS)
    finally:
        last = load.end()
    line.arrives(last, SECONDS)


def test_a_leader_that_moves_under_load(three: Three, lay: Lay) -> None:
    """Promise 4: the preferred leader comes back and is elected again while messages are in flight."""
    line = lay(three.cluster())
    line.arrives(line.write(20), SECONDS)
    load = Load(line)
    try:
        preferred = leader_of(three, line)
        three.kill(preferred)
        other = leader_of(three, line, but=preferred)
        three.start()
        wait_for(lambda: three.in_sync(line.cluster) == 3, "all nodes in sync", SECONDS)
        admin = line.cluster.admin()
        admin.elect_leaders(0, {line.cluster.topic: [0]})
        admin.close()
        assert leader_of(three, line, but=other) == preferred
        carried = line.relay.carried_seq
        wait_for(lambda: line.relay.carried_seq > carried + 200, f"{line.relay.figures()}", SECONDS)
    finally:
        last = load.end()
    line.arrives(last, SECONDS)


class Guest:
    """Writes to an appliance, and knows what every mark must read."""

    def __init__(self, appliance: Appliance) -> None:
        self._appliance, self._rng = appliance, random.Random(7)
        self.now, self.images = bytearray(SIZE), dict[str, bytes]()

    def write(self, requests: int = 60) -> None:
        """Requests, a flush, and a mark, none of which waits for a broker."""
        with NbdClient(self._appliance.socket("collector"), "db") as client:
            for _ in range(requests):
                offset, length = self._rng.randrange(SIZE - 70_000), self._rng.randrange(1, 70_000)
                data = self._rng.randbytes(length)
                client.write(offset, data)
                self.now[offset : offset + length] = data
            client.flush()
        name = f"mark-{len(self.images)}"
        self._appliance.control().collector("bookmark", group=self._appliance.group, name=name)
        self.images[name] = bytes(self.now)

    def check(self) -> None:
        for name, expected in self.images.items():
            with NbdClient(self._appliance.socket("replayer"), f"db@{name}") as client:
                found = client.read_all()
            same = found == expected  # apart: pytest must not try to explain megabytes
            assert same, difference(name, found, expected)


def test_production_goes_on_without_brokers(three: Three, folder: Path) -> None:
    """Promises 4, 8 and 10: two of three away, then all; the status says so, and nothing is lost when they are back."""
    cluster = three.cluster()
    journal = "\n".join((
        'kind = "kafka"', f"bootstrap_servers = {list(three.servers)}", f'topic_prefix = "{cluster.topic}."',
        "replication_factor = 3", "min_insync_replicas = 2",
    ))  # fmt: skip

    def waits(a: Appliance) -> bool:
        relay = a.look()["groups"][0]["relay"]
        return relay["state"] == "waiting" and relay["reason"]["code"] in ("no_broker", "broken_off")

    with running(folder, {"db": SIZE}, journal=journal) as a:
        a.wait_protected()
        guest = Guest(a)
        guest.write()
        three.kill(1, 2)
        guest.write()
        wait_for(lambda: waits(a), "the relay's reason", SECONDS)
        guest.write()
        assert not a.look()["healthy"]
        three.kill(3)
        guest.write()
        three.start()
        a.wait_protected(SECONDS)
        guest.write()
        a.wait_protected(SECONDS)
        guest.check()
        assert a.json("verify", "db")["equal"]
