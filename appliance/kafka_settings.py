"""From the plain settings of a child to a group's topic."""

from __future__ import annotations

import logging
from typing import Any

from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.security import Security


def cluster_of(settings: dict[str, Any], group: str) -> Cluster:
    """The topic that carries this group's journal. `settings["kafka"]` must be there."""
    # Its client says the same of an absent broker many times a second; the group's reason says it once.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    kafka = settings["kafka"]
    return Cluster(
        bootstrap_servers=tuple(kafka["bootstrap_servers"]),
        topic=kafka["topic_prefix"] + group,
        replication_factor=kafka["replication_factor"],
        min_insync_replicas=kafka["min_insync_replicas"],
        retention_ms=kafka["retention_ns"] // 10**6,
        security=Security(**kafka["security"]),
    )
