"""One producer's life: messages in order, acknowledged in order, at offsets that follow one another.

Any failure, and any offset that is not the next, ends it (BrokenOffError): what was in flight is lost or stands behind
a hole, or somebody else writes there, so the next life asks the topic itself.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any, NamedTuple

from kafka.errors import MessageSizeTooLargeError

from cdp.errors import StorageError
from cdp.journal.batch import Batch
from cdp.journal.kafka.carried import CLAIM_BYTES, CLAIM_MESSAGES
from cdp.journal.kafka.cluster import MESSAGE_OVERHEAD_BYTES, REQUEST_MS, Cluster, give_up
from cdp.journal.kafka.messages import Claim

# Sent and not acknowledged: more hides no more of the broker's latency, and is what a failure sends again.
IN_FLIGHT_BYTES = 16 << 20
# Handed to the client at once, whatever their size. It is also what a relay that lost the topic can still send behind
# the claim of the next: far less than the window in which the last claim is looked for.
IN_FLIGHT_MESSAGES = CLAIM_MESSAGES


class BrokenOffError(StorageError):
    """This producer's life is over; another one goes on behind what the topic has."""

    code = "broken_off"
    retriable = True


class _Sent(NamedTuple):
    future: Any
    last_seq: int  # 0: a claim
    crc: int
    size: int


class Sender:
    """`acked_seq` and `acked_crc` are of the last batch that the topic has for certain."""

    def __init__(self, cluster: Cluster, producer: Any, relay_id: bytes, claim: Claim) -> None:
        self._cluster, self._producer, self._relay_id, self._claim = cluster, producer, relay_id, claim
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()  # against a late callback that would ring another file's descriptor
        self._closed = False
        self._sent: deque[_Sent] = deque()
        self.in_flight_bytes = 0
        self.acked_seq, self.acked_crc = claim.after_seq, claim.crc
        self._next_offset = claim.offset
        self._since_claim = self._since_claim_bytes = 0

    def begin(self) -> None:
        """Claims the topic, and waits for it to have the claim. Raises BrokenOffError when somebody wrote since
        it was read, cluster.AWAY."""
        self._send(self._claim.encode(), 0, 0)
        self._sent[0].future.get(timeout=REQUEST_MS / 1000)
        self.settle()

    @property
    def has_room(self) -> bool:
        return self.in_flight_bytes < IN_FLIGHT_BYTES and len(self._sent) < IN_FLIGHT_MESSAGES

    @property
    def idle(self) -> bool:
        return not self._sent

    def fileno(self) -> int:
        """Becomes readable when something was answered."""
        return self._wake

    def drain(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass

    def send(self, batches: list[Batch]) -> None:
        """One message. Raises cluster.AWAY."""
        if self._since_claim >= CLAIM_MESSAGES or self._since_claim_bytes >= CLAIM_BYTES:
            self._since_claim = self._since_claim_bytes = 0
            renewed = self._claim._replace(after_seq=self.acked_seq, crc=self.acked_crc, offset=self._next_offset)
            self._send(renewed.encode(), 0, 0)
        self._since_claim += 1
        self._since_claim_bytes += sum(b.batch_bytes for b in batches)
        value = batches[0].raw if len(batches) == 1 else b"".join(b.raw for b in batches)
        self._send(bytes(value), batches[-1].last_seq, batches[-1].crc)

    def _send(self, value: bytes, last_seq: int, crc: int) -> None:
        future = self._producer.send(self._cluster.topic, value=value, key=self._relay_id, partition=0)
        self._sent.append(_Sent(future, last_seq, crc, len(value)))
        self.in_flight_bytes += len(value)
        future.add_both(self._ring)

    def _ring(self, *_: Any) -> None:
        """From the client's thread."""
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def settle(self) -> None:
        """Takes what was answered, in order. Raises BrokenOffError."""
        while self._sent and self._sent[0].future.is_done:
            sent = self._sent.popleft()
            self.in_flight_bytes -= sent.size
            if sent.future.failed():
                raise self._failed(sent)
            offset: int = sent.future.value.offset
            if offset != self._next_offset:
                raise BrokenOffError(
                    f"{self._cluster.topic} took a message at offset {offset}, not at {self._next_offset}: somebody "
                    "else writes there, or the broker lost what it had."
                )
            self._next_offset = offset + 1
            if sent.last_seq:
                self.acked_seq, self.acked_crc = sent.last_seq, sent.crc

    def _failed(self, sent: _Sent) -> StorageError:
        error = sent.future.exception
        if isinstance(error, MessageSizeTooLargeError):
            found = StorageError(
                f"The topic {self._cluster.topic} does not take a message of {sent.size} bytes, up to seq "
                f"{sent.last_seq}: {error}.",
                f"Raise its max.message.bytes to {sent.size + MESSAGE_OVERHEAD_BYTES} at least; it goes on by itself.",
                code="message_too_large",
            )
            found.retriable = True
            return found
        denied = self._cluster.denied(error)
        return denied or BrokenOffError(f"A send to {self._cluster.topic} failed: {error!r}.")

    def close(self) -> None:
        """Gives up what is in flight: the next life sends it again."""
        with self._wake_lock:
            self._closed = True
        give_up(self._producer)
        os.close(self._wake)
