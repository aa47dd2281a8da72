"""Kafka itself under measurement: one broker of this machine, topics on it, and the tools it measures itself with.

The broker runs with the options of Kafka's own start script. Every topic that is measured is made as a group's topic is
(one partition, one replica, synced every second), for the relay and for Kafka's producer alike; what was measured is
deleted before the next cell, so that a run needs a few GiB.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from cdp.journal.kafka import topic
from cdp.journal.kafka.cluster import FETCH_BYTES, MAX_MESSAGE_BYTES, Cluster
from tests.kafka.broker import Broker, java
from tests.support.running import die_with_parent

# As `kafka-server-start.sh` has them.
SERVER_MACHINE = (
    "-server", "-Xms1g", "-Xmx1g", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
)  # fmt: skip
# As `kafka-producer-perf-test.sh` has it.
TOOL_MACHINE = ("-server", "-Xmx512m", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20")
# What is deleted leaves the disk at once (a minute without this); a consumer's group need not wait for members.
SERVER_SETTINGS = "log.segment.delete.delay.ms=1000\ngroup.initial.rebalance.delay.ms=0"
TOOL_SECONDS = 300
RETENTION_MS = 86400 * 1000
# Different messages that the producer sends again and again, where it does not make each one anew.
PREPARED_MESSAGES = 16

_topics = itertools.count(1)
_PRODUCED = re.compile(r"^(\d+) records sent, .*?\(([\d.]+) MB/sec\)")


@contextmanager
def running(folder: Path) -> Iterator[Broker]:
    """A broker that is killed on the way out."""
    broker = Broker(folder, SERVER_MACHINE, SERVER_SETTINGS)
    try:
        broker.start()
        yield broker
    finally:
        broker.kill()


def cluster_at(broker: Broker) -> Cluster:
    """A topic that is made, and that nobody has used."""
    made = Cluster((broker.address,), f"cdp.bench.{next(_topics)}", 1, 1, RETENTION_MS)
    topic.ensure(made)
    return made


def another(cluster: Cluster) -> Cluster:
    """One more topic, made in the same way."""
    made = replace(cluster, topic=f"{cluster.topic}.{next(_topics)}")
    topic.ensure(made)
    return made


def delete(cluster: Cluster) -> None:
    """Removes the topic and all that it holds."""
    admin = cluster.admin()
    try:
        admin.delete_topics([cluster.topic])
    finally:
        admin.close()


def ends(cluster: Cluster) -> tuple[int, int]:
    """Offsets of the topic's first message and behind its last."""
    consumer = cluster.consumer()
    try:
        partition = cluster.partition
        return consumer.beginning_offsets([partition])[partition], consumer.end_offsets([partition])[partition]
    finally:
        consumer.close()


def forget(cluster: Cluster) -> None:
    """Deletes all messages but the last; whoever reads or writes the topic goes on behind it."""
    end = ends(cluster)[1]
    admin = cluster.admin()
    try:
        admin.delete_records({cluster.partition: max(0, end - 1)})
    finally:
        admin.close()


def produce(cluster: Cluster, count: int, size: int, prepared: Path | None) -> float:
    """MiB/s of values that ProducerPerformance reaches with `count` messages of `size` bytes, by its own account, which
    begins before its first message and ends when the last one is acknowledged.

    Idempotent, acknowledged by all, uncompressed, sent as they are given: as the relay's. Without `prepared` it fills
    every message with random letters first; with it, messages are picked out of that file, which must hold lines of
    this size (`prepare`). Raises RuntimeError.
    """
    payload = ["--record-size", str(size)] if prepared is None else ["--payload-file", str(prepared)]
    output = _run(
        "ProducerPerformance", "--topic", cluster.topic, "--num-records", str(count), *payload, "--throughput", "-1",
        "--producer-props", f"bootstrap.servers={cluster.bootstrap_servers[0]}", "acks=all", "enable.idempotence=true",
        "compression.type=none", "linger.ms=0", f"max.request.size={MAX_MESSAGE_BYTES}",
    )  # fmt: skip
    found = [m for line in output.splitlines() if (m := _PRODUCED.match(line))]
    if not found or int(found[-1][1]) != count:
        raise RuntimeError(f"ProducerPerformance did not send {count} messages:\n{output}")
    return float(found[-1][2])


def prepare(path: Path, size: int) -> Path:
    """A file of lines of `size` random letters each."""
    letters = bytes(65 + i % 26 for i in range(256))
    with open(path, "wb") as f:
        for _ in range(PREPARED_MESSAGES):
            f.write(os.urandom(size).translate(letters) + b"\n")
    return path


def consume(cluster: Cluster) -> float:
    """MiB/s that ConsumerPerformance reads the whole topic with, by its own account without joining its group; it
    fetches as much at once as a replayer does. Raises RuntimeError."""
    begin, end = ends(cluster)
    output = _run(
        "ConsumerPerformance", "--bootstrap-server", cluster.bootstrap_servers[0], "--topic", cluster.topic,
        "--messages", str(end - begin), "--fetch-size", str(FETCH_BYTES), "--hide-header",
    )  # fmt: skip
    fields = output.strip().splitlines()[-1].split(", ")
    if len(fields) != 10 or int(fields[4]) < end - begin:
        raise RuntimeError(f"ConsumerPerformance did not read {end - begin} messages:\n{output}")
    return float(fields[8])


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        java(TOOL_MACHINE, f"org.apache.kafka.tools.{tool}", *arguments), capture_output=True, text=True,
        timeout=TOOL_SECONDS, preexec_fn=die_with_parent,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{tool} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def description() -> list[str]:
    """What is beside the machine's own lines at the head of a report."""
    told = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()
    return [f"Apache Kafka 4.1.0, one broker on this machine, 1 GiB of heap; {told[0] if told else 'no Java'}; "
            f"kafka-python {version('kafka-python')}"]  # fmt: skip
