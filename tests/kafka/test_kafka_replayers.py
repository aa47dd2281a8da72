"""Several replayers on one topic: each has its own place and window, and none keeps the collector's segments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.journal import consumers
from cdp.journal.batch import CONTINUED
from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.place import load
from cdp.journal.kafka.reader import KafkaReader
from cdp.journal.kafka.relay import CONSUMER, Relay
from cdp.replica.replayer import Replayer
from tests.kafka.test_kafka_faults import SECONDS
from tests.replica.helpers import Feed
from tests.support.running import wait_for

SIZE = 16 * 4096


class Site:
    """Where one replayer lives."""

    def __init__(self, folder: Path, cluster: Cluster, window_ns: int | None) -> None:
        folder.mkdir()
        self.place = folder / "place"
        self.replayer = Replayer(
            str(folder), "group", lambda after: KafkaReader(cluster, str(self.place), after), window_ns=window_ns,
            window_bytes=None, segment_bytes=1 << 20, volumes=["db"],
        )  # fmt: skip
        self.replayer.start()

    def reads(self, seq: int) -> bytes:
        target = bytearray(SIZE)
        view = self.replayer.open_view("db", seq)
        view.read_into(0, memoryview(target))
        view.close()
        return bytes(target)


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Feed]:
    made = Feed(tmp_path / "journal", segment_bytes=256 << 10)
    consumers.register(made.folder, CONSUMER)
    consumers.remove(made.folder, "replayer")
    made.volume(1, "db", SIZE)
    made.flush()
    yield made
    made.close()


def test_each_has_its_place_and_its_window(cluster: Cluster, tmp_path: Path, feed: Feed) -> None:
    """Promise 4, and 10: one that is away for a while goes on where it was, and the others and the collector do not
    notice."""
    relay = Relay(cluster, feed.folder, keep_ns=0, max_kept_bytes=1 << 30)
    relay.start()
    sites = [Site(tmp_path / "brief", cluster, 50_000_000), Site(tmp_path / "long", cluster, None)]
    brief, long = sites
    images: dict[int, bytes] = {}

    def write(count: int) -> int:
        for _ in range(count):
            feed.write(1, 0, os.urandom(SIZE))
            images[feed.flush()] = bytes(feed.now[1])
        return max(images)

    try:
        first = write(30)
        assert all(site.replayer.wait_applied(first, SECONDS) for site in sites)
        long.replayer.stop()
        middle = write(30)
        assert brief.replayer.wait_applied(middle, SECONDS)
        wait_for(lambda: relay.carried_seq >= middle, f"carried: {relay.figures()}", SECONDS)
        # Only the relay is a consumer there: what the absent replayer lacks is in the topic.
        assert set(consumers.names(feed.folder)) == {CONSUMER}
        wait_for(lambda: feed.publish() or feed.writer.first_seq > first, "segments freed", SECONDS)
        place = load(str(long.place))
        assert place is not None and place.seq <= first
        long.replayer.start()
        last = write(10)
        assert all(site.replayer.wait_applied(last, SECONDS) for site in sites)
        assert all(long.reads(seq) == image for seq, image in images.items())
        assert brief.reads(last) == images[last]

        def shorter() -> bool:
            feed.write(1, 0, os.urandom(SIZE))
            newest = feed.flush()
            images[newest] = bytes(feed.now[1])
            assert brief.replayer.wait_applied(newest, SECONDS)
            return brief.replayer.history.oldest_seq > middle

        wait_for(shorter, "a shorter window", SECONDS)
        assert long.replayer.history.oldest_seq < min(images)
    finally:
        for site in sites:
            site.replayer.stop()
        relay.stop()


def test_a_request_that_a_collector_left_in_the_middle(cluster: Cluster, tmp_path: Path, feed: Feed) -> None:
    """Promise 6: its pieces are in messages of their own; no point is offered inside, over a restart either, until
    something else follows."""
    relay = Relay(cluster, feed.folder, keep_ns=0, max_kept_bytes=1 << 30)
    relay.start()
    site = Site(tmp_path / "site", cluster, None)
    replayer = site.replayer

    def newest() -> int:
        found = replayer.history.timeline.newest()
        return found.seq if found is not None else 0

    try:
        feed.write(1, 0, os.urandom(SIZE))
        before = feed.flush()
        half = SIZE // 2
        for _ in range(2):
            feed.write(1, 0, os.urandom(half), CONTINUED)
            inside = feed.flush()
            assert replayer.wait_applied(inside, SECONDS)
        assert newest() == before
        replayer.stop()
        replayer.start()
        assert replayer.wait_applied(inside, SECONDS) and newest() == before
        feed.volume(1, "db", SIZE)
        after = feed.flush()
        assert replayer.wait_applied(after, SECONDS) and newest() == after
        assert site.reads(after) == feed.now[1] and site.reads(before) == feed.model[before][1]
        assert replayer.history.timeline.whole_request(inside) == before
    finally:
        replayer.stop()
        relay.stop()
