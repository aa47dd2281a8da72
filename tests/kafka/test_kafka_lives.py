"""What one life of a relay, a reader or a client leaves to the next: over a real Kafka."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from cdp.journal import batch as fmt
from cdp.journal import consumers
from cdp.journal.kafka import topic
from cdp.journal.kafka.carried import Carried
from cdp.journal.kafka.cluster import Cluster, give_up
from cdp.journal.kafka.messages import Claim
from cdp.journal.kafka.place import Place, load, save
from cdp.journal.kafka.reader import KafkaReader
from cdp.journal.kafka.relay import Relay
from cdp.journal.position import read_durable
from cdp.replica.replayer import Replayer
from tests.journal import support
from tests.kafka.broker import Broker
from tests.kafka.conftest import cluster_at, expire_all_but_the_last
from tests.kafka.test_kafka_faults import SECONDS, Lay, lay
from tests.replica.helpers import Feed
from tests.support.running import wait_for

__all__ = ["lay"]
SIZE = 16 * 4096


@pytest.mark.slow
def test_a_producer_is_given_up_under_a_frozen_broker(own_broker: Broker) -> None:
    """Promises 4 and 9: no thread goes on sending, and what it had in flight does not come later."""
    cluster = cluster_at(own_broker)
    topic.ensure(cluster)
    before = threading.active_count()
    producer = cluster.producer()
    producer.send(cluster.topic, value=b"first", key=b"k", partition=0).get(10)
    own_broker.signal(signal.SIGSTOP)
    try:
        futures = [producer.send(cluster.topic, value=b"more", key=b"k", partition=0) for _ in range(20)]
        give_up(producer)
        wait_for(lambda: threading.active_count() <= before, f"no thread more: {threading.enumerate()}")
        assert all(f.is_done and f.failed() for f in futures)
    finally:
        own_broker.signal(signal.SIGCONT)


def test_a_replayers_history_begins_anew_over_kafka(cluster: Cluster, tmp_path: Path) -> None:
    """Promise 4: the way out of a hole leads through the same topic, whatever stands in it before."""
    feed = Feed(tmp_path / "journal")
    relay = Relay(cluster, feed.folder, keep_ns=0, max_kept_bytes=1 << 30)
    home = tmp_path / "replayer"
    home.mkdir()
    replayer = Replayer(
        str(home), "group", lambda after: KafkaReader(cluster, str(home / "place"), after),
        window_ns=None, window_bytes=None, segment_bytes=4 << 20, volumes=["db"],
    )  # fmt: skip
    feed.volume(1, "db", SIZE)
    feed.flush()
    relay.start()
    replayer.start()
    try:
        for _ in range(5):
            feed.write(1, 0, os.urandom(SIZE))
            last = feed.flush()
        assert replayer.wait_applied(last, SECONDS)
        feed.write(1, 0, os.urandom(SIZE))
        behind = feed.flush()
        feed.volume(1, "db", SIZE)
        feed.gap(1, opens=True)
        feed.flush()
        replayer.reset_history(behind)
        feed.record(fmt.SYNC, 1, 0, SIZE, bytes(feed.now[1]))
        feed.gap(1, opens=False)
        last = feed.flush()
        assert replayer.wait_applied(last, SECONDS), replayer.reason
        assert replayer.state == "protected"
    finally:
        replayer.stop()
        relay.stop()
        feed.close()


def test_a_relay_that_ended_behind_its_first_claim(cluster: Cluster, tmp_path: Path) -> None:
    """Promise 4: of a journal whose beginning is gone the claim has the checksum that the first batch continues."""
    topic.ensure(cluster)
    folder = tmp_path / "journal"
    writer = support.open_writer(folder, 1, segment_bytes=256 << 10)
    try:
        for _ in range(400):
            support.prepare(writer)
            last = support.append(writer, 3000)
        support.sync(writer)
        for name in sorted(folder.glob("segment-*"))[:2]:
            name.unlink()
        relay = Relay(cluster, str(folder), keep_ns=10**12, max_kept_bytes=1 << 30)
        durable = read_durable(str(folder))
        assert durable is not None
        place = relay._place(Carried(0, 0, None, 0), durable)
        assert place.seq > 0
        producer = cluster.producer()
        claim = Claim(1, place.seq, place.crc, 0, durable.group_id)
        producer.send(cluster.topic, value=claim.encode(), key=b"e" * 16, partition=0).get(10)
        producer.close()
        relay.start()
        try:
            wait_for(lambda: relay.carried_seq == last, f"carried: {relay.figures()}", SECONDS)
        finally:
            relay.stop()
    finally:
        writer.close()


def test_a_topic_made_anew_begins_at_what_is_kept_for_the_relay(cluster: Cluster, tmp_path: Path) -> None:
    """Promise 4: older segments are there by chance, and may go while they are read: that would be a hole."""
    folder = tmp_path / "journal"
    writer = support.open_writer(folder, 1, segment_bytes=256 << 10)
    try:
        for _ in range(400):
            support.prepare(writer)
            support.append(writer, 3000)
        support.sync(writer)
        firsts = sorted(int(path.name.removeprefix("segment-")) for path in folder.glob("segment-*"))
        relay = Relay(cluster, str(folder), keep_ns=0, max_kept_bytes=1 << 30)
        durable = read_durable(str(folder))
        assert durable is not None and len(firsts) > 3
        assert relay._place(Carried(0, 0, None, 0), durable).seq == firsts[0] - 1
        for acknowledged, first in ((firsts[2] - 1, firsts[2]), (firsts[2], firsts[2]), (firsts[3] - 2, firsts[2])):
            consumers.register(str(folder), "relay", acknowledged)
            assert relay._place(Carried(0, 0, None, 0), durable).seq == first - 1
            consumers.remove(str(folder), "relay")
    finally:
        writer.close()


def test_a_relay_that_was_fenced_by_an_old_file_goes_on(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: `durable` may be of the life before after a power cut, until the collector writes it again."""
    line = lay(cluster)
    line.arrives(line.write(10))
    line.relay.stop()
    old = (line.folder / "journal" / "durable").read_bytes()
    line.writer.close()
    line.writer = support.open_writer(line.folder / "journal", 2, max_bytes=256 << 20)
    line.write(10)
    line.start_relay()
    line.arrives(line.writer.last_seq)
    line.relay.stop()
    with open(line.folder / "journal" / "durable", "r+b") as f:
        f.write(old)
    line.start_relay()
    wait_for(lambda: line.relay.state == "forked", f"fenced: {line.relay.figures()}", SECONDS)
    line.arrives(line.write(10))


def test_a_relay_that_carries_nothing_says_so(cluster: Cluster, lay: Lay) -> None:
    """Promise 8: while somebody else writes to the topic, the status does not say `carrying`."""
    line = lay(cluster)
    line.arrives(line.write(10))
    stop, noise = threading.Event(), Claim(0, 0, 0, 0, support.GROUP).encode()

    def disturb() -> None:
        producer = cluster.producer()
        while not stop.is_set():
            producer.send(cluster.topic, value=noise, key=b"n" * 16, partition=0).get(10)
        producer.close()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        wait_for(lambda: line.write(1) and line.relay.state == "waiting", "the disturbance in the figures", SECONDS)
        assert (line.relay.reason or {})["code"] == "broken_off"
    finally:
        stop.set()
        thread.join()
    line.arrives(line.write(10))


def test_a_reader_overtaken_by_retention_says_so(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: also one that was there all the time, but took nothing."""
    line = lay(cluster)
    line.arrives(line.write(10))
    for _ in range(4):
        last = line.write(20, 1 << 20)  # more than it fetches ahead
    wait_for(lambda: line.relay.carried_seq == last, "carried", SECONDS)
    wait_for(lambda: line.reader._queued_bytes > 32 << 20, "a reader that waits", SECONDS)
    last = line.write(1)
    wait_for(lambda: line.relay.carried_seq == last, "carried", SECONDS)
    expire_all_but_the_last(cluster)
    error = line.fails("place_expired")
    assert "retention" in error.hint


def test_a_place_in_a_tail_that_was_lost(cluster: Cluster, lay: Lay) -> None:
    """Promise 4: a power cut took the broker's tail, and other messages stand at the reader's offset: what it needs
    is there all the same. A place that is further on than its seq stands in for the lost tail."""
    line = lay(cluster)
    line.arrives(line.write(10))
    line.reader.close()
    place = load(str(line.folder / "place"))
    assert place is not None
    for _ in range(70):  # a message each, so that a claim is renewed
        last = line.write(1)
        wait_for(lambda seq=last: line.relay.carried_seq == seq, "carried", SECONDS)
    save(str(line.folder / "place"), Place(place.topic_id, place.offset + 5, place.seq, b"lost" * 4, place.epoch))
    line.reader = KafkaReader(cluster, str(line.folder / "place"), line.chain.seq)
    line.arrives(last)


def test_a_relay_in_front_of_a_hole_says_what_helps(cluster: Cluster, lay: Lay) -> None:
    """Promise 8: a resync alone does not carry it over what the journal has no more."""
    line = lay(cluster)
    line.arrives(line.write(10))
    line.relay.stop()
    line.writer.close()
    line.writer = support.open_writer(line.folder / "journal", 2, max_bytes=256 << 20)
    line.write(5)
    line.writer.close()
    line.writer = support.open_writer(line.folder / "journal", 3, max_bytes=256 << 20)
    line.write(5)
    for name in sorted((line.folder / "journal").glob("segment-*"))[:2]:
        name.unlink()
    line.start_relay()
    wait_for(lambda: line.relay.state == "stopped", f"the hole: {line.relay.figures()}", SECONDS)
    assert (line.relay.reason or {})["code"] == "hole"
    assert f"Delete the topic {cluster.topic}" in (line.relay.reason or {})["text"]
