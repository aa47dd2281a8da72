"""The carriers' contract over a real Kafka: what the embedded journal publishes, a relay carries, a reader reads."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from cdp.errors import CdpError
from cdp.journal.batch import BARRIER, DESCRIPTOR, MESSAGE_DATA_BYTES, MESSAGE_RECORDS, WRITE, Batch
from cdp.journal.chain import Chain
from cdp.journal.kafka import topic
from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.messages import Follower
from cdp.journal.kafka.reader import KafkaReader
from cdp.journal.kafka.relay import Relay
from cdp.journal.reader import JournalReader
from tests.journal import support
from tests.journal.contract import Carrier, ContractSuite, read_to, wait
from tests.support.running import wait_for

CARRY_SECONDS = 30.0


class KafkaCarrier:
    """An embedded journal, the relay of it, and readers of the topic."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        topic.ensure(cluster)
        self._epoch, self._places = 1, itertools.count()
        self.writer = support.open_writer(folder / "journal", 1, segment_bytes=256 << 10)
        self.relay = self.start_relay()

    def start_relay(self) -> Relay:
        made = Relay(self.cluster, str(self.folder / "journal"), keep_ns=0, max_kept_bytes=1 << 30)
        made.start()
        return made

    def append(self, *sizes: int) -> int:
        support.prepare(self.writer)
        return support.append(self.writer, *sizes)

    def publish(self) -> None:
        support.sync(self.writer)
        last = self.writer.last_seq
        wait_for(lambda: self.relay.carried_seq >= last, f"seq {last} carried: {self.relay.figures()}", CARRY_SECONDS)

    def restart(self) -> None:
        self.writer.close()
        self._epoch += 1
        self.writer = support.open_writer(self.folder / "journal", self._epoch, segment_bytes=256 << 10)

    def forget(self, seq: int) -> int:
        """Records expire: here an administrator's deletion, which leaves the same hole behind."""
        self.append(1)
        self.publish()  # a message of its own, which stays
        consumer = self.cluster.consumer()
        end = consumer.end_offsets([self.cluster.partition])[self.cluster.partition]
        consumer.seek(self.cluster.partition, end - 1)
        message = next(m for _ in range(20) for m in consumer.poll(1000).get(self.cluster.partition, []))
        consumer.close()
        admin = self.cluster.admin()
        admin.delete_records({self.cluster.partition: end - 1})
        admin.close()
        follower = Follower(0)
        assert follower.take(message.key, message.value, "last message") == []
        return follower.jumped_to

    def reader(self, after_seq: int, consumer: str = "replayer") -> JournalReader:
        return KafkaReader(self.cluster, str(self.folder / f"place-{next(self._places)}"), after_seq)

    def close(self) -> None:
        self.relay.stop()
        self.writer.close()


@pytest.fixture
def carrier(tmp_path: Path, cluster: Cluster) -> Iterator[Carrier]:
    made = KafkaCarrier(tmp_path, cluster)
    yield made
    made.close()


class TestKafka(ContractSuite):
    def test_goes_on_behind_any_batch(self, carrier: Carrier, after: int = 3) -> None:  # type: ignore[override]
        """What is read may not have been fetched yet, so the end of the topic is told by what comes behind it."""
        last = [carrier.append(3_000) for _ in range(6)][-1]
        carrier.publish()
        for place in (1, 3, last):
            reader = carrier.reader(place)
            if place == last:
                last = carrier.append(5)
                carrier.publish()
            found = read_to(reader, last)
            assert [b.first_seq for b in found if b.first_seq > place][0] == place + 1
            reader.close()

    def test_another_history_is_forked(self, carrier: Carrier) -> None:
        """Promise 4. A reader that is ahead of a topic is not forked yet, for a broker that lost its tail gets it
        again; it is by the first batch that lies across its end, or ends there with another checksum."""
        carrier.append(1)
        last = carrier.append(1, 1, 1)
        carrier.publish()
        inside = carrier.reader(2, "inside")
        with pytest.raises(CdpError) as error:
            read_to(inside, last)
        assert error.value.code == "forked"
        inside.close()
        ahead = carrier.reader(last + 2, "ahead")
        chain = Chain(support.GROUP, last + 2, 12345, 1, [support.identity(1)[1:]])
        carrier.append(1)
        end = carrier.append(1)
        carrier.publish()
        with pytest.raises(CdpError) as error:
            [chain.check(b) for b in read_to(ahead, end)]
        assert error.value.code == "forked"
        ahead.close()


def test_a_reader_goes_on_at_its_place(tmp_path: Path, cluster: Cluster) -> None:
    """Promise 4: what was acknowledged is not read again, what was not is, over a reader's lives."""
    carrier = KafkaCarrier(tmp_path, cluster)
    try:
        for _ in range(20):
            last = carrier.append(1000)
            carrier.publish()
        path = str(tmp_path / "kept")
        reader = KafkaReader(cluster, path, 0)
        read_to(reader, last)
        reader.acknowledge(10)
        reader.close()
        again = KafkaReader(cluster, path, 10)
        assert read_to(again, last)[0].first_seq == 11
        again.close()
    finally:
        carrier.close()


def test_the_largest_batch_of_a_collector_passes(tmp_path: Path, cluster: Cluster) -> None:
    """One record of a MiB, and as many small ones as may share its batch."""
    topic.ensure(cluster)
    writer = support.open_writer(tmp_path / "journal", 1, segment_bytes=4 << 20, max_bytes=1 << 30)
    relay = Relay(cluster, str(tmp_path / "journal"), keep_ns=0, max_kept_bytes=1 << 30)
    relay.start()
    try:
        data = os.urandom(MESSAGE_DATA_BYTES)
        small = DESCRIPTOR.pack(BARRIER, 0, 1, 0, 0, 0) * (MESSAGE_RECORDS - 1)
        writer.append(DESCRIPTOR.pack(WRITE, 0, 1, len(data), 0, len(data)) + small, [data], len(data))
        support.sync(writer)
        reader = KafkaReader(cluster, str(tmp_path / "place"), 0)
        (batch,) = read_to(reader, MESSAGE_RECORDS)
        assert next(batch.records()).data == data
        reader.close()
    finally:
        relay.stop()
        writer.close()


def test_a_batch_from_before_there_was_kafka(tmp_path: Path, cluster: Cluster) -> None:
    """Promise 8: an embedded journal has larger batches; the topic's limit is raised for them, then it goes on."""
    topic.ensure(cluster)
    writer = support.open_writer(tmp_path / "journal", 1, segment_bytes=64 << 20, max_bytes=1 << 30)
    relay = Relay(cluster, str(tmp_path / "journal"), keep_ns=0, max_kept_bytes=1 << 30)
    relay.start()
    try:
        piece = 1 << 20
        data = [bytes([i]) * piece for i in range(32)]
        descriptors = b"".join(DESCRIPTOR.pack(WRITE, 0, 1, piece, i * piece, piece) for i in range(32))
        writer.append(descriptors, data, 32 * piece)
        support.sync(writer)
        wait_for(lambda: (relay.reason or {}).get("code") == "message_too_large", f"{relay.figures()}", CARRY_SECONDS)
        (limit,) = re.findall(r"max\.message\.bytes to (\d+)", (relay.reason or {})["text"])
        admin = cluster.admin()
        changed = ConfigResource(ConfigResourceType.TOPIC, cluster.topic, configs={"max.message.bytes": limit})
        admin.alter_configs([changed], incremental=True)
        admin.close()
        reader = KafkaReader(cluster, str(tmp_path / "place"), 0)
        (batch,) = read_to(reader, 32)
        assert [bytes(r.data) for r in batch.records()] == data
        reader.close()
    finally:
        relay.stop()
        writer.close()


def test_small_batches_that_wait_are_carried_together(tmp_path: Path, cluster: Cluster) -> None:
    writer = support.open_writer(tmp_path / "journal", 1)
    try:
        for _ in range(300):
            support.prepare(writer)
            last = support.append(writer, 100)
        support.sync(writer)
        relay = Relay(cluster, str(tmp_path / "journal"), keep_ns=0, max_kept_bytes=1 << 30)
        relay.start()
        wait_for(lambda: relay.carried_seq == last, f"carried: {relay.figures()}", CARRY_SECONDS)
        relay.stop()
        consumer = cluster.consumer()
        assert consumer.end_offsets([cluster.partition])[cluster.partition] < 20  # a claim and some messages
        consumer.close()
    finally:
        writer.close()


def test_a_waiting_reader_hears_of_a_late_topic(tmp_path: Path, cluster: Cluster) -> None:
    """The replayer may be there before the relay ever was: it says so, and goes on when the topic is made."""
    reader = KafkaReader(cluster, str(tmp_path / "place"), 0)
    found: list[Batch] = []

    def told() -> CdpError | None:
        try:
            found.extend(reader.read(1 << 20))
        except CdpError as e:
            return e
        return None

    error = wait_for(told, "the missing topic to be noticed")
    assert error.code == "no_topic" and error.retriable
    carrier = KafkaCarrier(tmp_path, cluster)
    try:
        carrier.append(10)
        carrier.publish()
        wait_for(lambda: told() is None and found, "the topic to be found")
        last = carrier.append(11)
        carrier.publish()
        wait(reader)
        found += read_to(reader, last)
        assert [b.first_seq for b in found] == [1, 2]
    finally:
        reader.close()
        carrier.close()
