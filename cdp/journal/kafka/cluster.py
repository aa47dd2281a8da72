"""Where a group's journal is in Kafka, and the clients for it.

Everything that is said to kafka-python stands here: one topic of one partition, no consumer group, no committed
offsets, no resets. A client that is made connects at once: KafkaError while no broker answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import kafka
from kafka.errors import KafkaError, KafkaTimeoutError

from cdp.errors import StorageError
from cdp.journal.batch import DESCRIPTOR_BYTES, HEADER_BYTES, MAX_DATA_BYTES, MESSAGE_DATA_BYTES, MESSAGE_RECORDS
from cdp.journal.kafka import connecting
from cdp.journal.kafka.security import Security

# What Kafka puts around a record, and the record's key; there is room to spare.
MESSAGE_OVERHEAD_BYTES = 1 << 16
# What a topic must take: a batch is never divided, and the collector makes none that is larger.
MAX_MESSAGE_BYTES = HEADER_BYTES + MESSAGE_RECORDS * DESCRIPTOR_BYTES + MESSAGE_DATA_BYTES + MESSAGE_OVERHEAD_BYTES
# What a client of ours takes: batches from when the journal was embedded alone may be as large as the format allows.
_MAX_CLIENT_BYTES = MAX_DATA_BYTES + (8 << 20)
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
    security: Security = Security()
    failures: connecting.Failures = field(default_factory=connecting.Failures, compare=False, repr=False)

    @property
    def partition(self) -> Any:
        return kafka.TopicPartition(self.topic, 0)

    def consumer(self) -> Any:
        """A consumer that has the partition, at no place yet. Raises AWAY."""
        made = self._made(
            kafka.KafkaConsumer,
            metrics_enabled=False, group_id=None, enable_auto_commit=False, auto_offset_reset="none",
            fetch_max_wait_ms=500, max_partition_fetch_bytes=FETCH_BYTES, fetch_max_bytes=FETCH_BYTES,
            max_poll_records=64, receive_message_max_bytes=2 * _MAX_CLIENT_BYTES,
        )  # fmt: skip
        made.assign([self.partition])
        return made

    def producer(self) -> Any:
        """An idempotent producer; every message is sent as it is given. Raises AWAY."""
        return self._made(
            kafka.KafkaProducer, metrics_enabled=False, acks="all", enable_idempotence=True,
            max_request_size=_MAX_CLIENT_BYTES, batch_size=1, linger_ms=0,
            delivery_timeout_ms=DELIVERY_MS, max_block_ms=REQUEST_MS,
        )  # fmt: skip

    def admin(self) -> Any:
        """Raises AWAY."""
        return self._made(kafka.KafkaAdminClient)

    def _made(self, make: Callable[..., Any], **settings: Any) -> Any:
        """A client; one that finds no broker leaves its thread and descriptors behind, so they are ended here.
        Raises StorageError (`kafka_auth`, `kafka_tls`) for files that cannot be used, AWAY."""
        inner: list[Any] = []

        def connection(**given: Any) -> Any:
            inner.append(connecting.client(self.failures, **given))
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
            "reconnect_backoff_max_ms": RECONNECT_MS_MAX, **self.security.settings(),
        }  # fmt: skip

    def ends(self, consumer: Any) -> tuple[int, int]:
        """The offsets of the first message and behind the last one. Raises AWAY."""
        partition = self.partition
        try:
            return consumer.beginning_offsets([partition])[partition], consumer.end_offsets([partition])[partition]
        except KeyError:  # the broker knew the partition, and then did not
            raise KafkaTimeoutError(f"no offsets of {self.topic}") from None

    def denied(self, error: BaseException) -> StorageError | None:
        """The error of security behind an error of a client, None if there is none."""
        return connecting.explain(error, ", ".join(self.bootstrap_servers), self.security)

    def away(self, error: BaseException) -> StorageError:
        """What is said while no broker answers, or none lets us in; the same call may work later."""
        if denied := self.denied(error) or self.failures.explain(self.security):
            return denied
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
