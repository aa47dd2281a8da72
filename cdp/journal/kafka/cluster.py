"""Where a group's journal is in Kafka, and the clients for it.

Everything that is said to kafka-python stands here: one topic of one partition, no consumer group, no committed
offsets, no resets. A client that is made connects at once: KafkaError while no broker answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kafka
from kafka.errors import KafkaError

from cdp.errors import StorageError
from cdp.journal.batch import DESCRIPTOR_BYTES, HEADER_BYTES, MAX_DATA_BYTES, MAX_RECORDS

# The largest batch, and what Kafka puts around a record: a batch is never divided, so the topic must take it whole.
MAX_MESSAGE_BYTES = HEADER_BYTES + MAX_RECORDS * DESCRIPTOR_BYTES + MAX_DATA_BYTES + (1 << 16)
# How long a client may take to find a broker, and one request to be answered, before it counts as away.
BOOTSTRAP_MS = 5_000
REQUEST_MS = 10_000
# A send that has no answer by then has failed: the relay begins anew behind what the topic has.
DELIVERY_MS = 30_000
# One fetch: enough to keep a reader busy, little beside the largest message, which comes whole anyway.
FETCH_BYTES = 8 << 20
# Between attempts to connect; a broker that is away must not cost a core.
RECONNECT_MS_MAX = 2_000

# A producer's thread that was told to give up ends within a poll of its sockets; it is not waited for any longer.
GIVE_UP_SECONDS = 2.0

# What passes: a broker that is away, a leader that moves. kafka-python raises sockets' own errors too.
AWAY = (KafkaError, OSError)


@dataclass(frozen=True, slots=True)
class Cluster:
    """One group's topic. `retention_ms` is what a reader may be away for."""

    bootstrap_servers: tuple[str, ...]
    topic: str
    replication_factor: int
    min_insync_replicas: int
    retention_ms: int

    @property
    def partition(self) -> Any:
        return kafka.TopicPartition(self.topic, 0)

    def consumer(self) -> Any:
        """A consumer that has the partition, at no place yet. Raises AWAY."""
        made = self._made(
            kafka.KafkaConsumer,
            metrics_enabled=False, group_id=None, enable_auto_commit=False, auto_offset_reset="none",
            fetch_max_wait_ms=500, max_partition_fetch_bytes=FETCH_BYTES, fetch_max_bytes=FETCH_BYTES,
            max_poll_records=64, receive_message_max_bytes=2 * MAX_MESSAGE_BYTES,
        )  # fmt: skip
        made.assign([self.partition])
        return made

    def producer(self) -> Any:
        """An idempotent producer; every message is sent as it is given. Raises AWAY."""
        return self._made(
            kafka.KafkaProducer, metrics_enabled=False, acks="all", enable_idempotence=True,
            max_request_size=MAX_MESSAGE_BYTES, batch_size=1, linger_ms=0,
            delivery_timeout_ms=DELIVERY_MS, max_block_ms=REQUEST_MS,
        )  # fmt: skip

    def admin(self) -> Any:
        """Raises AWAY."""
        return self._made(kafka.KafkaAdminClient)

    def _made(self, make: Callable[..., Any], **settings: Any) -> Any:
        """A client; one that finds no broker leaves its thread and descriptors behind, so they are ended here."""
        inner: list[Any] = []

        def connection(**given: Any) -> Any:
            inner.append(make.DEFAULT_CONFIG["kafka_client"](**given))  # type: ignore[attr-defined]
            return inner[-1]

        try:
            return make(**self._common(), **settings, kafka_client=connection)
        except BaseException:
            for made in inner:
                made.close()
            raise

    def _common(self) -> dict[str, Any]:
        return {
            "bootstrap_servers": list(self.bootstrap_servers), "client_id": "cdp",
            "bootstrap_timeout_ms": BOOTSTRAP_MS, "request_timeout_ms": REQUEST_MS,
            "reconnect_backoff_max_ms": RECONNECT_MS_MAX,
        }  # fmt: skip

    def away(self, error: BaseException) -> StorageError:
        """What is said while no broker answers; the same call may work later."""
        servers = ", ".join(self.bootstrap_servers)
        found = StorageError(
            f"Kafka at {servers} cannot be reached for the topic {self.topic}: {type(error).__name__}: {error}.",
            "Start the brokers, or correct `bootstrap_servers`; it goes on by itself.",
            code="no_broker",
        )
        found.retriable = True
        return found


def give_up(producer: Any) -> None:
    """Ends a producer and what it has in flight. Its own `close` first waits for that, and where it does not come
    raises and leaves everything running: a thread that goes on sending what nobody expects any more."""
    producer._sender.force_close()
    producer._sender.join(GIVE_UP_SECONDS)
    try:
        producer.close(timeout=0)
    except KafkaError:
        pass  # its thread had not seen it yet; it ends by itself
