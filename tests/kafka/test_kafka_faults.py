"""Brokers that die, freeze, lose and forget; relays that are killed, and those that should be dead: real ones."""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdp.errors import CdpError
from cdp.journal.chain import Chain
from cdp.journal.kafka import topic
from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.messages import Claim
from cdp.journal.kafka.reader import KafkaReader
from cdp.journal.kafka.relay import Relay
from tests.journal import support
from tests.kafka.broker import Broker
from tests.kafka.conftest import cluster_at, expire_all_but_the_last
from tests.support.running import wait_for

SECONDS = 60.0


class Line:
    """A journal, its relay, and a reader that runs the chain over all that it gets."""

    def __init__(self, folder: Path, cluster: Cluster, epoch: int = 1) -> None:
        self.folder, self.cluster = folder, cluster
        topic.ensure(cluster)
        self.writer = support.open_writer(folder / "journal", epoch, max_bytes=256 << 20)
        support.sync(self.writer)
        self.relay = self.start_relay()
        self.chain = Chain(support.GROUP)
        self.reader = KafkaReader(cluster, str(folder / "place"), 0)

    def start_relay(self, keep_ns: int = 600 * 10**9) -> Relay:
        self.relay = Relay(self.cluster, str(self.folder / "journal"), keep_ns=keep_ns, max_kept_bytes=1 << 30)
        self.relay.start()
        return self.relay

    def write(self, batches: int, size: int = 3000) -> int:
        for _ in range(batches):
            support.prepare(self.writer)
            support.append(self.writer, size)
        support.sync(self.writer)
        return self.writer.last_seq

    def read(self) -> int:
        """What is there now, checked; a broker that is away is waited for. The chain's seq."""
        try:
            for batch in self.reader.read(1 << 20):
                support.check_batch(batch)
                self.chain.check(batch)
            self.reader.acknowledge(self.chain.seq)
        except CdpError as e:
            if not e.retriable:
                raise
        return self.chain.seq

    def arrives(self, seq: int, seconds: float = SECONDS) -> None:
        wait_for(lambda: self.read() >= seq, f"seq {seq} at the reader (relay {self.relay.figures()})", seconds)

    def fails(self, code: str) -> CdpError:
        found: list[CdpError] = []

        def look() -> bool:
            try:
                self.read()
            except CdpError as e:
                found.append(e)
            return bool(found)

        wait_for(look, f"the reader's {code}", SECONDS)
        assert found[0].code == code, found[0]
        return found[0]

    def read_anew(self, seq: int = 0) -> None:
        self.reader.close()
        self.reader = KafkaReader(self.cluster, str(self.folder / "place"), seq)

    def close(self) -> None:
        self.relay.stop()
        self.reader.close()
        self.writer.close()


Lay = Callable[[Cluster], Line]


@pytest.fixture
def lay(tmp_path: Path) -> Iterator[Lay]:
    lines: list[Line] = []

    def made(cluster: Cluster) -> Line:
        lines.append(Line(tmp_path / str(len(lines)), cluster))
        return lines[-1]

    yield made
    for line in lines:
        line.close()


@pytest.mark.slow
def test_a_broker_that_is_killed_loses_nothing(own_broker: Broker, lay: Lay) -> None:
    """Promises 4 and 10: what is written meanwhile waits in the journal, and arrives once, in order."""
    line = lay(cluster_at(own_broker))
    line.arrives(line.write(50))
    for _ in range(2):
        line.write(100)
        own_broker.kill()
        line.write(100)
        own_broker.start()
        line.arrives(line.write(20))


@pytest.mark.slow
def test_a_broker_that_freezes_is_waited_for(own_broker: Broker, lay: Lay) -> None:
    """Promise 10."""
    line = lay(cluster_at(own_broker))
    line.arrives(line.write(50))
    own_broker.signal(signal.SIGSTOP)
    try:
        last = line.write(200)
        noticed = threading.Event()
        assert not noticed.wait(2) and line.read() < last
    finally:
        own_broker.signal(signal.SIGCONT)
    line.arrives(line.write(20))


def test_relays_that_end_at_any_moment(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: a relay keeps no state; the topic says where the next one goes on."""
    line = lay(cluster)
    rng = random.Random(5)
    for _ in range(6):
        last = line.write(rng.randrange(1, 120), rng.choice((10, 3000, 40_000)))
        if rng.random() < 0.7:
            line.read()
        line.relay.stop()
        line.start_relay()
    line.arrives(last)
    assert line.chain.seq == line.writer.last_seq


def test_a_relay_that_lost_the_topic_is_not_believed(cluster: Cluster, lay: Lay, tmp_path: Path) -> None:
    """Promise 4: a zombie collector's relay (an older incarnation of the same journal) is fenced, and what it sends
    reaches no reader."""
    line = lay(cluster)
    line.arrives(line.write(30))
    line.relay.stop()
    copy = support.copy(line.folder / "journal", tmp_path / "zombie")
    line.writer.close()
    line.writer = support.open_writer(line.folder / "journal", 2, max_bytes=256 << 20)
    line.write(10)
    line.start_relay()
    line.arrives(line.writer.last_seq)
    zombie = Relay(cluster, str(copy), keep_ns=0, max_kept_bytes=1 << 30)
    zombie.start()
    wait_for(lambda: zombie.state == "forked", f"the zombie fenced: {zombie.figures()}", SECONDS)
    assert zombie.figures()["reason"]["code"] == "fenced"
    zombie.stop()
    line.arrives(line.write(10))


def test_two_relays_of_one_journal_take_turns_without_harm(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: the one that claims last carries; the other notices by its offsets, and asks the topic again."""
    line = lay(cluster)
    line.arrives(line.write(20))
    other = Relay(cluster, str(line.folder / "journal"), keep_ns=600 * 10**9, max_kept_bytes=1 << 30)
    other.start()
    try:
        for _ in range(10):
            line.write(20)
            line.read()
        line.arrives(line.writer.last_seq)
    finally:
        other.stop()
    line.arrives(line.write(20))


def test_another_groups_topic_is_refused(cluster: Cluster, lay: Lay, tmp_path: Path) -> None:
    """Promise 4: nothing of another history is mixed in."""
    line = lay(cluster)
    line.arrives(line.write(5))
    line.relay.stop()
    foreign = Claim(9, 0, 0, 0, b"another group id")
    producer = cluster.producer()
    producer.send(cluster.topic, value=foreign.encode(), key=b"x" * 16, partition=0).get(10)
    producer.close()
    line.start_relay()
    wait_for(lambda: line.relay.state == "forked", "the relay stopped by the foreign claim", SECONDS)
    assert b"another group id".hex() in line.relay.figures()["reason"]["text"]


@pytest.mark.slow
def test_a_topic_that_was_deleted_is_made_again(cluster: Cluster, lay: Lay) -> None:
    """The journal keeps what was acknowledged for a while: it goes on by itself where that is enough."""
    line = lay(cluster)
    line.arrives(line.write(60))
    admin = cluster.admin()
    admin.delete_topics([cluster.topic])
    admin.close()
    line.arrives(line.write(10))
    line.arrives(line.write(10))


def test_a_topic_made_anew_without_what_is_missing_is_a_hole(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: with a reason of its own."""
    line = lay(cluster)
    line.arrives(line.write(60))
    line.relay.stop()
    admin = cluster.admin()
    admin.delete_topics([cluster.topic])
    line.reader.close()
    topic_gone = wait_for(lambda: topic.topic_id(cluster) is None, "the topic deleted")
    assert topic_gone
    admin.close()
    shutil.rmtree(line.folder / "journal")
    line.writer.close()
    line.writer = support.open_writer(line.folder / "journal", 1)
    line.write(100)
    line.start_relay()
    wait_for(lambda: line.relay.carried_seq == 100, "carried", SECONDS)
    admin = cluster.admin()
    admin.delete_records({cluster.partition: 2})
    admin.close()
    line.write(1)
    line.reader = KafkaReader(cluster, str(line.folder / "place"), 60)
    error = line.fails("topic_replaced")
    assert "60" in error.message


def test_records_that_expired_are_said_so(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: a reader that was away for longer than retention stops, and says why and what to do."""
    line = lay(cluster)
    line.arrives(line.write(10))
    line.reader.close()
    for _ in range(5):
        last = line.write(10)
        wait_for(lambda seq=last: line.relay.carried_seq == seq, "carried", SECONDS)
    expire_all_but_the_last(cluster)
    line.reader = KafkaReader(cluster, str(line.folder / "place"), line.chain.seq)
    error = line.fails("place_expired")
    assert "resync" in error.hint and "retention" in error.hint


@pytest.mark.slow
def test_a_corrupted_message_is_never_applied(own_broker: Broker, lay: Lay) -> None:
    """Promise 4: a byte that changed in the broker's log stops the reader, and names the place."""
    line = lay(cluster_at(own_broker))
    line.reader.close()
    last = line.write(20, 9000)
    wait_for(lambda: line.relay.carried_seq == last, "carried", SECONDS)
    line.relay.stop()
    own_broker.kill()
    (log,) = (own_broker.folder / "data").glob(f"{line.cluster.topic}-0/*.log")
    support.flip(log, log.stat().st_size - 5000)
    own_broker.start()
    line.reader = KafkaReader(line.cluster, str(line.folder / "place"), 0)
    line.start_relay()
    # Kafka cuts its log at what is damaged when it was killed, or serves it: the relay says it again, or it is named.
    found: list[CdpError] = []

    def settled() -> bool:
        try:
            return line.read() >= last
        except CdpError as e:
            found.append(e)
            return True

    wait_for(settled, f"an end: {line.relay.figures()}", SECONDS)
    assert not found or found[0].code == "corrupt"
