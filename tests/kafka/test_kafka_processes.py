"""The whole appliance with Kafka between: collector, relay and replayer as processes, through the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kafka.broker import Broker
from tests.kafka.conftest import cluster_at
from tests.support.running import Appliance, running, wait_for

MIB = 1 << 20
SIZE = 16 * MIB


def journal_at(found: Broker) -> str:
    prefix = cluster_at(found).topic + "."
    return "\n".join((
        'kind = "kafka"', f'bootstrap_servers = ["{found.address}"]', f'topic_prefix = "{prefix}"',
        "replication_factor = 1", "min_insync_replicas = 1",
    ))  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="cdp-kafka-"))  # short: the path of a unix socket has 107 bytes
    yield made
    shutil.rmtree(made, ignore_errors=True)


Write = Callable[[int, int], None]


@pytest.fixture
def qemu_io(peer: Callable[[str], str]) -> Callable[..., None]:
    program = peer("qemu-io")

    def run(uri: str, *commands: str) -> None:
        arguments = [part for command in commands for part in ("-c", command)]
        done = subprocess.run([program, "-f", "raw", *arguments, uri], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr

    return run


def test_a_tour_with_kafka_between(broker: Broker, folder: Path, qemu_io: Callable[..., None]) -> None:
    """Promises 4, 6 and 7 over a broker: write, name a moment, destroy, look back, roll back, go forward again."""
    with running(folder, {"db": SIZE}, journal=journal_at(broker)) as a:
        status = a.wait_protected()
        assert status["healthy"] and set(status["processes"]) == {"collector", "replayer", "relay"}
        assert status["groups"][0]["relay"]["state"] == "carrying"
        assert set(status["groups"][0]["consumers"]) == {"primary", "relay"}
        qemu_io(a.uri("db"), "write -P 0x11 0 4M", "flush")
        a.cli("bookmark", "shop", "good", "--wait")
        qemu_io(a.uri("db"), "write -P 0xee 1M 1M", "discard 2M 1M", "flush")
        a.cli("bookmark", "shop", "bad", "--wait")
        qemu_io(a.past("db", "good"), "read -P 0x11 0 4M")
        qemu_io(a.past("db", "bad"), "read -P 0xee 1M 1M", "read -P 0 2M 1M")
        done = a.json("rollback", "db", "--to", "good", "--yes")
        qemu_io(a.uri("db"), "read -P 0x11 0 4M")
        assert a.json("verify", "db")["equal"]
        a.cli("rollback", "db", "--to", done["bookmark"], "--yes")
        qemu_io(a.uri("db"), "read -P 0xee 1M 1M", "read -P 0 2M 1M", "read -P 0x11 3M 1M")


@pytest.mark.slow
def test_processes_and_broker_killed_under_a_journal(
    own_broker: Broker, folder: Path, qemu_io: Callable[..., None]
) -> None:
    """Promises 4 and 10: with the broker away production goes on; whoever is killed, nothing is lost or doubled."""
    with running(folder, {"db": SIZE}, journal=journal_at(own_broker)) as a:
        a.wait_protected()
        for round_, victim in enumerate(("relay", "replayer", "collector", "broker", "relay"), 1):
            qemu_io(a.uri("db"), f"write -P {round_} 0 2M", "flush")
            if victim == "broker":
                own_broker.kill()
                qemu_io(a.uri("db"), f"write -P {round_} 2M 2M", "flush")
                wait_for(lambda: not a.look()["healthy"], "the absent broker in the status", 60)
                own_broker.start()
            else:
                a.kill_child(victim)
            a.wait_protected(90)
            a.bookmark(f"round-{round_}")
            qemu_io(a.past("db", f"round-{round_}"), f"read -P {round_} 0 2M")
        for round_ in range(1, 6):
            qemu_io(a.past("db", f"round-{round_}"), f"read -P {round_} 0 2M")
        assert a.json("verify", "db")["equal"]


def test_a_relay_without_a_broker_says_so(folder: Path, kafka_folder: Path, qemu_io: Callable[..., None]) -> None:
    """Promise 10: production runs, and the status says what is away and what to do."""
    journal = 'kind = "kafka"\nbootstrap_servers = ["127.0.0.1:9"]'
    with running(folder, {"db": SIZE}, journal=journal) as a:
        qemu_io(a.uri("db"), "write -P 7 0 1M", "flush", "read -P 7 0 1M")

        def told() -> dict[str, object] | None:
            relay: dict[str, object] = a.look()["groups"][0]["relay"]
            reason = relay.get("reason")
            return relay if isinstance(reason, dict) and reason["code"] == "no_broker" else None

        relay = wait_for(told, "the relay's reason")
        assert relay["state"] == "waiting" and "127.0.0.1:9" in str(relay["reason"])
        page = a.run("status")
        assert page.returncode == 1 and "bootstrap_servers" in page.stdout


def test_a_relay_needs_kafka(tmp_path: Path) -> None:
    a = Appliance(tmp_path, {"db": SIZE})
    a.write_config()
    done = a.run("relay")
    assert done.returncode == 2 and "kind" in done.stderr
    assert os.listdir(tmp_path) == ["cdp.toml"]
