"""A broker that lost the end of its log, and what a relay and a reader do until it has it again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.together import together
from cdp.errors import CdpError
from cdp.journal.batch import Batch
from cdp.journal.kafka import topic
from cdp.journal.kafka.carried import CLAIM_BYTES, carried
from cdp.journal.kafka.cluster import Cluster, give_up
from cdp.journal.kafka.messages import Claim, decode_claim
from cdp.journal.kafka.reader import KafkaReader
from cdp.journal.kafka.relay import Relay
from cdp.journal.kafka.sender import IN_FLIGHT_MESSAGES, Sender
from cdp.journal.reader import EmbeddedReader
from tests.journal import support
from tests.kafka.broker import Broker
from tests.kafka.conftest import cluster_at
from tests.kafka.test_kafka_faults import SECONDS, Lay, Line, lay
from tests.support.running import wait_for

__all__ = ["lay"]


@pytest.mark.slow
def test_a_broker_that_lost_its_tail_gets_it_again(
    own_broker: Broker, lay: Lay, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 4: a reader that is beyond the end of the log goes back, and misses and doubles nothing. The log is cut
    as a power cut would leave it."""
    line = lay(cluster_at(own_broker))
    for _ in range(10):
        line.arrives(line.write(3, 2000))
    own_broker.kill()
    lose_tail(own_broker, line)
    with caplog.at_level(logging.WARNING):
        own_broker.start()
        line.arrives(line.write(5))
        line.arrives(line.write(5))
    assert "is read again from offset" in caplog.text or "before the reader's place" in caplog.text
    assert line.chain.seq == line.writer.last_seq


def lose_tail(broker: Broker, line: Line) -> None:
    (segment,) = (broker.folder / "data").glob(f"{line.cluster.topic}-0/*.log")
    for index in segment.parent.glob("*.*index"):
        index.unlink()
    os.truncate(segment, segment.stat().st_size * 2 // 3)


@pytest.mark.slow
def test_a_reader_that_comes_back_behind_other_messages(own_broker: Broker, lay: Lay) -> None:
    """Promise 4: where its place was, stand messages of a relay whose claim it has not met, and no later claim."""
    line = lay(cluster_at(own_broker))
    for _ in range(10):
        line.arrives(line.write(3, 2000))
    line.reader.close()
    own_broker.kill()
    lose_tail(own_broker, line)
    own_broker.start()
    for _ in range(8):  # a message each: beyond the old place, and before a claim is renewed
        last = line.write(1)
        wait_for(lambda seq=last: line.relay.carried_seq == seq, f"carried: {line.relay.figures()}", SECONDS)
    line.reader = KafkaReader(line.cluster, str(line.folder / "place"), line.chain.seq)
    line.arrives(last)


def batches_of(folder: Path) -> list[Batch]:
    reader = EmbeddedReader(str(folder), "test_probe", 0)
    found: list[Batch] = []
    while more := reader.read(1 << 20):
        found += more
    reader.close()
    return found


@pytest.mark.slow
def test_what_is_in_flight_is_bounded_by_messages_too(own_broker: Broker, tmp_path: Path) -> None:
    """Promise 9: what a relay that lost the topic can still send stays within the window of the last claim."""
    cluster = cluster_at(own_broker)
    topic.ensure(cluster)
    writer = support.open_writer(tmp_path / "journal", 1)
    for _ in range(2 * IN_FLIGHT_MESSAGES):
        support.prepare(writer)
        support.append(writer, 10)
    support.sync(writer)
    found = batches_of(tmp_path / "journal")
    sender = Sender(cluster, cluster.producer(), b"r" * 16, Claim(1, 0, 0, 0, support.GROUP))
    try:
        sender.begin()
        own_broker.signal(signal.SIGSTOP)
        sent = 0
        while sender.has_room:
            sender.send([found[sent]])
            sent += 1
        assert sent == IN_FLIGHT_MESSAGES and sender.in_flight_bytes < 1 << 20
    finally:
        own_broker.signal(signal.SIGCONT)
        sender.close()
        writer.close()


def seconds_of(call: Callable[[], None]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


@pytest.mark.slow
def test_a_stop_under_a_frozen_broker_takes_as_long_as_one_group(own_broker: Broker, lay: Lay) -> None:
    """Promise 10: a stop has one limit, however many groups wait for the same broker."""
    lines = [lay(cluster_at(own_broker)) for _ in range(4)]
    for line in lines:
        line.arrives(line.write(5))
        line.relay.stop()
    own_broker.signal(signal.SIGSTOP)
    try:
        for line in lines:
            line.start_relay()  # it asks the topic what it has, and hears nothing
        alone = seconds_of(lines[0].relay.stop)
        lines[0].start_relay()
        assert seconds_of(lambda: together([line.relay.stop for line in lines])) < 2 * alone + 2
    finally:
        own_broker.signal(signal.SIGCONT)


def eventfds() -> int:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return links.count("anon_inode:[eventfd]")


def test_ends_twice(cluster: Cluster, lay: Lay) -> None:
    line = lay(cluster)
    line.arrives(line.write(5))
    before = eventfds()
    for _ in range(2):
        line.reader.close()
        line.relay.stop()
    assert eventfds() <= before - 3, "reader, relay and its sender gave them back"


def test_what_is_not_carried_yet_has_a_state(cluster: Cluster, tmp_path: Path) -> None:
    """Promise 8: behind a jump a reader waits for the relay, and says so until what is missing comes."""
    topic.ensure(cluster)
    writer = support.open_writer(tmp_path / "journal", 1)
    for _ in range(3):
        support.append(writer, 10)
    support.sync(writer)
    found = batches_of(tmp_path / "journal")
    producer = cluster.producer()

    def send(value: bytes) -> None:
        producer.send(cluster.topic, value=value, key=b"k" * 16, partition=0).get(10)

    reader = KafkaReader(cluster, str(tmp_path / "place"), 0)
    seqs: list[int] = []

    def state() -> str:
        try:
            seqs.extend(b.first_seq for b in reader.read(1 << 20))
        except CdpError as e:
            assert e.retriable
            return e.code
        return ""

    try:
        send(Claim(1, 0, 0, 0, support.GROUP).encode())
        send(bytes(found[0].raw))
        send(bytes(found[2].raw))
        wait_for(lambda: state() == "not_carried", "the state behind a jump", SECONDS)
        send(bytes(found[1].raw))
        send(bytes(found[2].raw))
        wait_for(lambda: state() == "" and seqs == [1, 2, 3], f"all of it: {seqs}", SECONDS)
    finally:
        reader.close()
        give_up(producer)
        writer.close()


def test_the_last_claim_is_near_the_end(cluster: Cluster, tmp_path: Path) -> None:
    """Promise 9: whatever the size of messages, a start reads little of a topic."""
    writer = support.open_writer(tmp_path / "journal", 1, segment_bytes=8 << 20, max_bytes=256 << 20)
    for _ in range(60):
        support.prepare(writer)
        last = support.append(writer, 800_000)
    support.sync(writer)
    relay = Relay(cluster, str(tmp_path / "journal"), keep_ns=0, max_kept_bytes=1 << 30)
    relay.start()
    wait_for(lambda: relay.carried_seq == last, f"carried: {relay.figures()}", SECONDS)
    relay.stop()
    writer.close()
    consumer = cluster.consumer()
    found = carried(cluster, consumer)
    assert found.seq == last and found.claim is not None
    consumer.seek(cluster.partition, found.claim.offset)
    behind = 0
    while consumer.position(cluster.partition) < found.end_offset:
        for message in consumer.poll(500).get(cluster.partition, []):
            behind += len(message.value) if decode_claim(message.value, "here") is None else 0
    consumer.close()
    assert behind <= 2 * CLAIM_BYTES + (1 << 20)
