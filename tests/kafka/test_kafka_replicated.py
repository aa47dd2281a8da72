"""`ack = "replicated"` over a real broker: what a flush promises, and what becomes of it when the broker does not."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.kafka.broker import Broker
from tests.kafka.test_kafka_processes import MIB, SIZE, folder, journal_at
from tests.support.nbd import FLUSH, WRITE, NbdClient
from tests.support.running import Appliance, running, wait_for

__all__ = ["folder"]
ACK = 'ack = "replicated"\nreplicated_timeout = "{}"'


def acknowledged(a: Appliance) -> dict[str, object]:
    found: dict[str, object] = a.look()["groups"][0]["replicated"]
    return found


def test_a_flush_is_in_the_topic_when_it_is_answered(broker: Broker, folder: Path) -> None:
    """Promise 3: acknowledged by the remote carrier; the relay's figures say so as soon as the client knows."""
    with running(folder, {"db": SIZE}, journal=journal_at(broker), ack=ACK.format("30s")) as a:
        a.wait_protected()
        with NbdClient(a.socket("collector"), "db") as client:
            for i in range(20):
                client.write(i * 4096, os.urandom(4096))
                client.flush()
                group = a.control().status("collector")["figures"]["groups"]["shop"]
                flushed = 2 * (i + 1)  # a WRITE and a BARRIER each, and what a life begins with before them
                assert group["replicated"]["acknowledged_seq"] > flushed
                assert a.control().status("relay")["figures"]["groups"]["shop"]["carried_seq"] > flushed
        status = a.json("status")
        assert status["healthy"] and status["groups"][0]["replicated"]["state"] == "replicated"


@pytest.mark.slow
def test_a_broker_that_is_away_fails_flushes_and_then_heals(own_broker: Broker, folder: Path) -> None:
    """Promises 3 and 8: never answered as durable, said in the status, and over when the broker is back."""
    with running(folder, {"db": SIZE}, journal=journal_at(own_broker), ack=ACK.format("2s")) as a:
        a.wait_protected()
        with NbdClient(a.socket("collector"), "db") as client:
            client.write(0, b"a" * MIB)
            client.flush()
            own_broker.kill()
            client.write(0, b"b" * MIB)
            with pytest.raises(OSError) as failed:
                client.flush()
            assert failed.value.errno == errno.EIO
            page = a.run("status")
            assert page.returncode == 1 and "not_replicated" in page.stdout
            assert client.read(0, MIB) == b"b" * MIB
            own_broker.start()
            a.wait_protected(90)
            wait_for(lambda: acknowledged(a)["state"] == "replicated", f"caught up: {a.look()}", 60)
            client.flush()
        a.bookmark("after")
        with NbdClient(a.socket("replayer"), "db@after") as past:
            assert past.read(0, MIB) == b"b" * MIB


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["relay", "collector and relay"])
def test_zombies_with_a_flush_in_flight_acknowledge_nothing(own_broker: Broker, folder: Path, frozen: str) -> None:
    """Promises 3 and 4: a collector and its relay froze with a flush in flight, and a successor took over from a copy
    of its state; when they come back the flush fails, and no more writes are taken. What the successor has stands."""
    journal = journal_at(own_broker)
    old = Appliance(folder / "old", {"db": SIZE}, journal=journal, ack=ACK.format("60s"))
    new = Appliance(folder / "new", {"db": SIZE}, journal=journal, ack=ACK.format("60s"))
    try:
        old.start("collector", "relay")
        with NbdClient(old.socket("collector"), "db") as client:
            client.write(0, b"a" * 4096)
            client.flush()
            pids = [old.child(side) for side in frozen.split(" and ")]
            os.kill(old.child("relay"), signal.SIGSTOP)
            if "collector" in frozen:
                cookie = client.send(FLUSH)
                os.kill(old.child("collector"), signal.SIGSTOP)
                _succeed(old, new)
            else:
                os.kill(collector := old.child("collector"), signal.SIGSTOP)
                _succeed(old, new)
                os.kill(collector, signal.SIGCONT)
                client.write(4096, b"z" * 4096)
                cookie = client.send(FLUSH)
            with NbdClient(new.socket("collector"), "db") as successor:
                successor.write(4096, b"n" * 4096)
                successor.flush()
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                found, error, _ = client.receive()
                assert (found, error) == (cookie, errno.EIO)
                wait_for(lambda: old.look()["groups"][0]["reason"]["code"] == "fenced", "the old one fenced", 60)
                with pytest.raises(OSError):
                    client.call(WRITE, 0, 0, b"n" * 4096)
                successor.write(8192, b"m" * 4096)
                successor.flush()
        new.start("replayer")
        new.wait_protected(60)
        with NbdClient(new.socket("replayer"), "db") as past:
            assert past.read(0, 12288) == b"a" * 4096 + b"n" * 4096 + b"m" * 4096
    finally:
        new.end()
        old.end()


def _succeed(old: Appliance, new: Appliance) -> None:
    """Another machine gets a copy of the state and of the primary, and starts."""
    new.folder.mkdir(parents=True)
    shutil.copy2(old.primary("db"), new.primary("db"))
    source, target = old.folder / "state" / "collector", new.folder / "state" / "collector"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.sock", "lock", "*.lock"))
    new.start("collector", "relay")
    wait_for(lambda: new.look()["groups"][0]["volumes"][0]["state"], "the successor")
    if new.look()["groups"][0]["volumes"][0]["state"] == "stopped":  # its primary is another file than was left
        new.cli("trust", "db", "primary")
    wait_for(lambda: new.look()["groups"][0]["relay"]["state"] == "carrying", f"its relay: {new.look()}", 60)
    wait_for(lambda: new.look()["groups"][0]["volumes"][0]["state"] == "protected", "compared", 60)
