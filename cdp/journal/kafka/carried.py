"""What a topic has already: found by its last claim, and read on from there. So a relay keeps no state to lose.

A claim says up to which seq the topic has everything without a hole; a relay renews it every CLAIM_MESSAGES or
CLAIM_BYTES, so there is little to read behind it, whatever stands before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kafka.errors import KafkaTimeoutError

from cdp import storage
from cdp.errors import StorageError
from cdp.journal.kafka.cluster import Cluster
from cdp.journal.kafka.messages import Claim, Follower, decode_claim

# A claim is renewed after so many messages, or so much in them: what is read again at a start, and little of a topic.
CLAIM_MESSAGES, CLAIM_BYTES = 64, 16 << 20
# The last claim is looked for in windows of this many messages, then of four times as many, and so on. The first holds
# CLAIM_BYTES of joined messages twice (some 40 MiB); the second all that can stand behind a claim, and what a relay
# that lost the topic had in flight.
_FIRST_WINDOW, _WIDER = 48, 4
# A read that gets nothing for so long although there is more: the broker is away.
_STUCK_SECONDS = 30.0
_POLL_MS = 500


class Carried(NamedTuple):
    """Up to where the topic has the journal without a hole. `claim` None: it has never been a journal's."""

    seq: int
    crc: int  # of the batch that ends there
    claim: Claim | None
    end_offset: int


def carried(cluster: Cluster, consumer: Any) -> Carried:
    """Reads the topic's end. Raises StorageError (`topic`: it holds something else), CorruptionError, cluster.AWAY."""
    partition = cluster.partition
    begin, end = cluster.ends(consumer)
    found = _last_claim(cluster, consumer, begin, end)
    if found is None:
        return Carried(0, 0, None, end)
    holder, claim = found
    follower = Follower(claim.after_seq, holder, claim.epoch)
    crc = claim.crc
    for message in messages(consumer, partition, max(begin, claim.offset), end):
        for batch in follower.take(message.key, message.value, f"{cluster.topic} at offset {message.offset}"):
            if batch.last_seq == follower.seq:
                crc = batch.crc
    return Carried(follower.seq, crc, claim, end)


def _last_claim(cluster: Cluster, consumer: Any, begin: int, end: int) -> tuple[bytes, Claim] | None:
    """(relay, claim) of the newest claim that counts; None in an empty topic."""
    window = _FIRST_WINDOW
    while True:
        start = max(begin, end - window)
        counts: tuple[bytes, Claim] | None = None
        for message in messages(consumer, cluster.partition, start, end):
            claim = decode_claim(message.value, f"{cluster.topic} at offset {message.offset}")
            if claim is not None and (counts is None or claim.epoch >= counts[1].epoch):
                counts = (bytes(message.key or b""), claim)
        if counts is not None:
            return counts
        if start == begin:
            break
        window *= _WIDER
    if end > begin:
        raise StorageError(
            f"The topic {cluster.topic} holds {end - begin} messages and no relay's claim: it is not a journal's, or "
            "all its claims have expired.",
            "Name another `topic_prefix`, or delete the topic: it is made again and carries on.",
            code="topic",
        )
    return None


def claim_before(cluster: Cluster, consumer: Any, seq: int) -> tuple[int, bytes, int]:
    """(offset, relay, epoch): from where everything behind `seq` is found, by the newest claim that is not beyond it;
    the topic's beginning where there is none. Raises CorruptionError, cluster.AWAY."""
    partition, window = cluster.partition, _FIRST_WINDOW
    begin, end = cluster.ends(consumer)
    while True:
        start, found = max(begin, end - window), (begin, b"", 0)
        for message in messages(consumer, partition, start, end):
            claim = decode_claim(message.value, f"{cluster.topic} at offset {message.offset}")
            if claim is not None and claim.after_seq <= seq and claim.epoch >= found[2]:
                found = (max(begin, claim.offset), bytes(message.key or b""), claim.epoch)
        if found[1] or start == begin:
            return found
        window *= _WIDER


def messages(consumer: Any, partition: Any, start: int, end: int) -> Iterator[Any]:
    """The messages from offset `start` up to `end`. Raises KafkaTimeoutError when they do not come."""
    if start >= end:
        return
    consumer.seek(partition, start)
    since_ns = storage.monotonic_ns()
    while (position := consumer.position(partition)) < end:
        got = consumer.poll(_POLL_MS).get(partition, [])
        for message in got:
            if message.offset < end:
                yield message
        if got:
            since_ns = storage.monotonic_ns()
        elif storage.monotonic_ns() - since_ns > _STUCK_SECONDS * 1e9:
            raise KafkaTimeoutError(f"offsets {position} to {end} do not come")
