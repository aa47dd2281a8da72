"""A journal, written by the real writer and carried by a real relay in this process: what comes before a cell."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cdp.journal import consumers
from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.relay import CONSUMER as RELAY
from cdp.journal.kafka.relay import Relay
from tests.bench.replay import SEGMENT_BYTES, VOLUME_BYTES, backlog
from tests.replica.helpers import CONSUMER as REPLAYER
from tests.replica.helpers import Feed
from tests.support.running import wait_for

Batches = Iterator[tuple[bytes, list[bytes]]]
# Carrying the largest backlog at a tenth of what is asked for.
CARRY_SECONDS = 300.0


class Carried:
    """A feed of one volume of VOLUME_BYTES, and its relay, which is up and has carried everything so far. What is
    acknowledged is not kept: the journal's segments are freed and recycled."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        self.feed = Feed(folder / "journal", modelled=False, segment_bytes=SEGMENT_BYTES)
        consumers.register(self.feed.folder, RELAY)
        consumers.remove(self.feed.folder, REPLAYER)  # a replayer behind Kafka is no consumer of the journal
        self.relay = Relay(cluster, self.feed.folder, keep_ns=0, max_kept_bytes=1 << 30)
        self.feed.volume(1, "db", VOLUME_BYTES)
        self.feed.flush()
        self.relay.start()
        self.wait_carried()

    def carry(self, batches: Batches) -> tuple[int, float]:
        """Writes a backlog that nobody sees yet, lets the disk come to rest, and makes it visible. The bytes written,
        and the seconds from then until the topic has acknowledged the last of them."""
        total = backlog(self.feed, batches)
        os.sync()
        began = time.perf_counter()
        self.feed.publish()
        self.wait_carried()
        return total, time.perf_counter() - began

    def wait_carried(self) -> None:
        last = self.feed.writer.last_seq
        wait_for(lambda: self.relay.carried_seq >= last, f"seq {last} carried: {self.relay.figures()}", CARRY_SECONDS)

    def close(self) -> None:
        self.relay.stop()
        self.feed.close()


def say(text: str) -> None:
    """A line about a cell, while the table is not there yet."""
    print(text, file=sys.stderr, flush=True)
