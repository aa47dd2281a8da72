"""A topic's settings: made right, and each mistake in one that exists named."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from cdp.errors import StorageError
from cdp.journal.kafka import topic
from cdp.journal.kafka.cluster import AWAY, Cluster
from cdp.journal.kafka.kept import Kept
from tests.support.running import wait_for

THREE = Cluster(("b:1",), "t", 3, 2, 1000)
MISTAKES: list[tuple[dict[str, str], list[int], str]] = [
    ({}, [3, 3], "2 partitions"),
    ({}, [2], "2 replicas of 3"),
    ({"cleanup.policy": "compact"}, [3], "cleanup.policy is compact"),
    ({"message.timestamp.type": "CreateTime"}, [3], "LogAppendTime"),
    ({"max.message.bytes": "1048588"}, [3], "max.message.bytes"),
    ({"retention.ms": "999"}, [3], "retention.ms is 999"),
    ({"retention.bytes": "1000000"}, [3], "retention.bytes"),
    ({"min.insync.replicas": "1"}, [3], "min.insync.replicas"),
    ({"unclean.leader.election.enable": "true"}, [3], "unclean.leader.election"),
]


@pytest.mark.parametrize(("change", "replicas", "says"), MISTAKES)
def test_each_mistake_is_named(change: dict[str, str], replicas: list[int], says: str) -> None:
    (found,) = topic.mistakes(THREE, replicas, topic.wanted(THREE) | change)
    assert says in found


def test_what_is_made_has_no_mistake() -> None:
    assert topic.mistakes(THREE, [3], topic.wanted(THREE)) == []
    assert topic.mistakes(THREE, [3], topic.wanted(THREE) | {"retention.ms": "-1"}) == []
    one = replace(THREE, replication_factor=1, min_insync_replicas=1)
    assert topic.mistakes(one, [1], topic.wanted(one)) == []
    assert "flush.ms" in topic.mistakes(one, [1], topic.wanted(one) | {"flush.ms": "9223372036854775807"})[0]


def test_a_topic_is_made_and_found_again(cluster: Cluster) -> None:
    assert topic.topic_id(cluster) is None
    made = topic.ensure(cluster)
    assert topic.ensure(cluster) == topic.topic_id(cluster) == made
    with pytest.raises(StorageError, match=r"retention\.ms is 604800000, less than"):
        topic.ensure(replace(cluster, retention_ms=8 * 86400 * 1000))


def test_a_topic_of_an_administrator_is_checked(cluster: Cluster) -> None:
    admin: Any = cluster.admin()
    admin.create_topics({cluster.topic: {"num_partitions": 3, "replication_factor": 1, "configs": {}}})
    admin.close()
    with pytest.raises(StorageError) as error:
        topic.ensure(cluster)
    assert error.value.code == "topic"
    assert all(word in error.value.message for word in ("3 partitions", "LogAppendTime", "max.message.bytes", "flush"))


def test_what_is_acknowledged_is_kept_a_while() -> None:
    kept = Kept(keep_ns=10 * 10**9, max_bytes=1000)
    for second in range(20):
        kept.add(second * 10**9, second + 1, 10)
    assert kept.bytes == 200 and kept.release(19 * 10**9) == 10 and kept.release(19 * 10**9) == 0
    kept.add(20 * 10**9, 30, 990)
    assert kept.release(20 * 10**9) == 19, "space for production comes first"
    assert kept.release(40 * 10**9) == 30 and kept.bytes == 0


def test_what_a_topic_lost_counts_as_acknowledged_no_more() -> None:
    """Promise 4: however long ago it was acknowledged, the journal keeps it until the topic has it again."""
    kept = Kept(keep_ns=10 * 10**9, max_bytes=1000)
    for second in range(20):
        kept.add(second * 10**9, second + 1, 10)
    kept.resume(100 * 10**9, 5, [])
    assert kept.release(100 * 10**9) == 5 and kept.bytes == 0
    kept.add(100 * 10**9, 20, 150)
    assert kept.release(101 * 10**9) == 0 and kept.release(110 * 10**9) == 20


def test_what_an_earlier_process_had_acknowledged_takes_space_too() -> None:
    """Promise 10: after a restart of the relay too, what is kept leaves production its half of the journal."""
    kept = Kept(keep_ns=10 * 10**9, max_bytes=1000)
    kept.resume(0, 100, [(50, 600), (100, 600), (150, 600)])
    assert kept.bytes == 1200 and kept.release(1) == 50
    kept.add(2, 110, 10)
    kept.resume(3, 110, [(100, 600), (150, 600)])
    assert kept.bytes == 610


def test_a_long_keeping_is_few_marks() -> None:
    """Promise 9."""
    kept = Kept(keep_ns=10**6 * 10**9, max_bytes=1 << 30)
    for second in range(10_000):
        kept.add(second * 10**9, second + 1, 100)
    assert len(kept._marks) <= 11


def test_a_client_that_finds_no_broker_leaves_nothing_behind() -> None:
    """Promise 9: attempts go on for as long as a broker is away."""
    before = threading.active_count()
    for make in (Cluster.admin, Cluster.consumer, Cluster.producer):
        with pytest.raises(AWAY):
            make(replace(THREE, bootstrap_servers=("127.0.0.1:9",)))
    wait_for(lambda: threading.active_count() <= before, f"no thread more: {threading.enumerate()}")
