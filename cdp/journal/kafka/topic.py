"""A group's topic: made with the settings that the promises need, or checked when it is there already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import NoError, TopicAlreadyExistsError, UnknownTopicOrPartitionError, for_code

from cdp.errors import StorageError
from cdp.journal.kafka.cluster import MAX_MESSAGE_BYTES, Cluster

# With one replica nothing but its own sync protects what a broker acknowledged from a power cut.
SINGLE_REPLICA_FLUSH_MS = 1_000


def wanted(cluster: Cluster) -> dict[str, str]:
    """The settings of a topic that is made here."""
    settings = {
        "cleanup.policy": "delete",
        "retention.ms": str(cluster.retention_ms),
        "retention.bytes": "-1",
        "max.message.bytes": str(MAX_MESSAGE_BYTES),
        "message.timestamp.type": "LogAppendTime",
        "min.insync.replicas": str(cluster.min_insync_replicas),
        "unclean.leader.election.enable": "false",
    }
    if cluster.replication_factor == 1:
        settings["flush.ms"] = str(SINGLE_REPLICA_FLUSH_MS)
    return settings


def ensure(cluster: Cluster) -> str:
    """The id of the topic, which is made if it is missing.

    Raises StorageError (`topic`) naming every setting that is wrong, cluster.AWAY.
    """
    admin = cluster.admin()
    try:
        found = _describe(admin, cluster.topic)
        if found is None:
            _create(admin, cluster)
            found = _describe(admin, cluster.topic)
        if found is None:
            raise StorageError(f"The topic {cluster.topic} was made, and is not there.", "See the brokers' logs.")
        resource = ConfigResource(ConfigResourceType.TOPIC, cluster.topic)
        answer = admin.describe_configs([resource], config_filter="all")["topic"][cluster.topic]
        settings = {name: described["value"] for name, described in answer.items()}
    finally:
        admin.close()
    wrong = mistakes(cluster, [len(p["replica_nodes"]) for p in found["partitions"]], settings)
    if wrong:
        raise StorageError(
            f"The topic {cluster.topic} cannot carry a journal: {'; '.join(wrong)}.",
            "Correct it with kafka-configs.sh or kafka-reassign-partitions.sh, or name another `topic_prefix`.",
            code="topic",
        )
    return str(found["topic_id"])


def topic_id(cluster: Cluster) -> str | None:
    """The id of the topic, None if there is none. Raises cluster.AWAY."""
    admin = cluster.admin()
    try:
        found = _describe(admin, cluster.topic)
    finally:
        admin.close()
    return str(found["topic_id"]) if found is not None else None


def _describe(admin: Any, name: str) -> dict[str, Any] | None:
    found: dict[str, Any] = admin.describe_topics([name])[0]
    error = for_code(found["error_code"])
    if error is UnknownTopicOrPartitionError:
        return None
    if error is not NoError:
        raise error(f"{name} cannot be described")
    return found


def _create(admin: Any, cluster: Cluster) -> None:
    topic = {"num_partitions": 1, "replication_factor": cluster.replication_factor, "configs": wanted(cluster)}
    try:
        admin.create_topics({cluster.topic: topic}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        pass  # another one was faster


def mistakes(cluster: Cluster, replicas: list[int], settings: Mapping[str, str]) -> list[str]:
    """A clause for everything that is wrong with a topic: pure. `replicas` has one count for each partition."""
    wrong = []
    if len(replicas) != 1:
        wrong.append(f"it has {len(replicas)} partitions, and order needs exactly one")
    if min(replicas, default=0) < cluster.replication_factor:
        wrong.append(f"it has {min(replicas, default=0)} replicas of {cluster.replication_factor} configured")
    if settings.get("cleanup.policy") != "delete":
        wrong.append(f"cleanup.policy is {settings.get('cleanup.policy')}, which removes records, and must be delete")
    if settings.get("message.timestamp.type") != "LogAppendTime":
        wrong.append("message.timestamp.type must be LogAppendTime, or retention goes by the writer's clock")
    if _number(settings, "max.message.bytes") < MAX_MESSAGE_BYTES:
        wrong.append(f"max.message.bytes must be at least {MAX_MESSAGE_BYTES} for the largest batch")
    if 0 <= _number(settings, "retention.ms") < cluster.retention_ms:
        wrong.append(f"retention.ms is {settings['retention.ms']}, less than the configured {cluster.retention_ms}")
    if _number(settings, "retention.bytes") >= 0:
        wrong.append("retention.bytes must be -1, or records go before their time")
    if _number(settings, "min.insync.replicas") < cluster.min_insync_replicas:
        wrong.append(f"min.insync.replicas must be at least {cluster.min_insync_replicas}")
    if settings.get("unclean.leader.election.enable") == "true":
        wrong.append("unclean.leader.election.enable must be false, or acknowledged records can be lost")
    if max(replicas, default=0) == 1 and _number(settings, "flush.ms") > SINGLE_REPLICA_FLUSH_MS:
        wrong.append(f"with one replica flush.ms must be at most {SINGLE_REPLICA_FLUSH_MS}")
    return wrong


def _number(settings: Mapping[str, str], name: str) -> int:
    """-1 for what is missing or no number: never less strict than what is asked."""
    try:
        return int(settings.get(name, "-1"))
    except ValueError:
        return -1
