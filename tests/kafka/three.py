"""Three real nodes on loopback, each broker and controller: what is acknowledged is on two of them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from cdp.journal.kafka.cluster import AWAY, Cluster
from tests.kafka.broker import Broker, nodes

_numbers = itertools.count(1)
HEAP = ("-Xms64m", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
# A node that is gone is noticed within seconds; the defaults are made for larger clusters and busier networks.
SETTINGS = """\
broker.session.timeout.ms=6000
broker.heartbeat.interval.ms=1000
replica.lag.time.max.ms=6000
num.network.threads=2
num.io.threads=2
"""


class Three:
    """Its nodes by number."""

    def __init__(self, folder: Path) -> None:
        cluster = nodes(3)
        self.nodes = {
            node.number: Broker(folder / f"node-{node.number}", HEAP, SETTINGS, cluster=cluster, number=node.number)
            for node in cluster
        }

    @property
    def servers(self) -> tuple[str, ...]:
        return tuple(node.address for node in self.nodes.values())

    def cluster(self) -> Cluster:
        """A topic of its own."""
        return Cluster(self.servers, f"cdp.three.{os.getpid()}.{next(_numbers)}", 3, 2, 7 * 86400 * 1000)

    def start(self) -> None:
        """Whoever does not run; returns when all take connections."""
        for node in self.nodes.values():
            if not node.running:
                node.launch()
        for node in self.nodes.values():
            node.wait_ready()

    def kill(self, *numbers: int) -> None:
        for number in numbers or self.nodes:
            self.nodes[number].kill()

    def leader(self, cluster: Cluster) -> int:
        """The number of the node that leads the topic; 0 while none does, or nobody can be asked."""
        return self._partition(cluster).get("leader_id", 0)

    def in_sync(self, cluster: Cluster) -> int:
        """How many nodes have the whole topic."""
        return len(self._partition(cluster).get("isr_nodes", []))

    def _partition(self, cluster: Cluster) -> dict[str, int]:
        try:
            admin = cluster.admin()
        except AWAY:
            return {}
        try:
            partitions = admin.describe_topics([cluster.topic])[0]["partitions"]
            return partitions[0] if partitions and partitions[0]["leader_id"] > 0 else {}
        except AWAY:
            return {}
        finally:
            admin.close()
