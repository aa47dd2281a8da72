"""The JournalReader of a topic: a thread that fetches ahead, and what it found for who applies it.

It assigns the partition itself, keeps its place in its own folder, and never resets: what is missing is an error with
a reason of its own (promise 4). A broker that is away is waited for.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from typing import Any, NamedTuple

from kafka.errors import CorruptRecordError, LogTruncationError, OffsetOutOfRangeError

from cdp import storage
from cdp.errors import CdpError, CorruptionError, HoleError, StorageError
from cdp.journal.batch import Batch
from cdp.journal.kafka import place as places
from cdp.journal.kafka import topic
from cdp.journal.kafka.carried import claim_before
from cdp.journal.kafka.cluster import AWAY, Cluster
from cdp.journal.kafka.messages import Follower
from cdp.journal.kafka.place import Place

log = logging.getLogger(__name__)

# Fetched and not yet read: some fetches ahead, so that neither side waits for the other.
QUEUE_BYTES = 32 << 20
# Messages behind a jump are read on over this much for what is missing: twice what a relay has in flight, which is
# all that it can have to say again, with room for its claims.
JUMP_BYTES = 64 << 20
# With nothing to read: the collector beats once a second, so after this long the broker is asked whether it is there.
IDLE_SECONDS = 5.0
RETRY_SECONDS = 1.0
_POLL_MS = 200


# By its code: what is said of a hole, and what to do.
_HOLES = {
    "hole": ("it does not have what follows", "Resync the group's volumes."),
    "place_expired": (
        "it has no more what follows",
        "The replayer was away for longer than `retention`: resync the group's volumes.",
    ),
    "topic_replaced": (
        "it was made anew without what follows",
        "The journal had freed it already: resync the group's volumes.",
    ),
}


class _Fetched(NamedTuple):
    batch: Batch
    place: Place | None  # behind the message whose last batch this is


class KafkaReader:
    """See JournalReader. `consumer` has no meaning here: each reader has a place of its own, in `place_path`."""

    def __init__(self, cluster: Cluster, place_path: str, after_seq: int) -> None:
        """Nothing is asked of the broker yet. Raises CorruptionError for a damaged place, OSError."""
        self._cluster, self._place_path, self._after_seq = cluster, place_path, after_seq
        self._place = places.load(place_path)
        if self._place is not None and self._place.seq > after_seq:
            self._place = None  # the replica was put back: what it has now lies before that place
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._changed = threading.Condition()
        self._queue: deque[_Fetched] = deque()
        self._queued_bytes = 0
        self._passed: deque[Place] = deque()  # of what was read and not yet acknowledged
        self._error: CdpError | None = None
        self._away: CdpError | None = None
        self._end = (0, 0)
        self._stop = False
        self._follower = Follower(after_seq)
        self._lost = ""  # why what lies before the topic's beginning will not come: the code of that hole
        self._looked_back_at = -1  # the seq behind which something was missing, and the topic read again for it
        self._lost_until = 0  # the topic's end when that was found: what is not before it does not come
        # Up to where what comes is older than the reader's beginning, and so passed over.
        self._seeking = self._place is None or self._place.seq != after_seq
        self._thread = threading.Thread(target=self._run, name=f"fetch-{cluster.topic}", daemon=True)
        self._thread.start()

    # --- the contract

    def read(self, max_bytes: int) -> list[Batch]:
        """See JournalReader. While no broker answers: StorageError (`no_broker`), retriable."""
        batches: list[Batch] = []
        with self._changed:
            if not self._queue:
                if (wrong := self._error or self._away) is not None:
                    raise wrong
                return batches
            while self._queue and max_bytes > 0:
                batch, place = self._queue.popleft()
                batches.append(batch)
                max_bytes -= batch.batch_bytes
                self._queued_bytes -= batch.batch_bytes
                if place is not None:
                    self._passed.append(place)
            self._changed.notify_all()
        return batches

    def fileno(self) -> int:
        return self._event

    def drain(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass

    def acknowledge(self, seq: int) -> None:
        """See JournalReader; the place is durable when it returns."""
        reached: Place | None = None
        while self._passed and self._passed[0].seq <= seq:
            reached = self._passed.popleft()
        if reached is not None:
            places.save(self._place_path, reached)

    def end(self) -> tuple[int, int]:
        """See JournalReader: the newest record that was fetched."""
        return self._end

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1

    # --- the thread

    def _run(self) -> None:
        while not self._stop:
            try:
                self._fetch()
            except CdpError as e:
                if not e.retriable:
                    return self._fail(e)
                self._set_away(e)
            except AWAY as e:
                self._set_away(self._cluster.away(e))
            except BaseException as e:  # nothing may end this thread unseen
                log.exception("reader of %s", self._cluster.topic)
                return self._fail(StorageError(f"Reading {self._cluster.topic} ended: {e!r}.", "Restart the replayer."))
            with self._changed:
                self._changed.wait_for(lambda: self._stop, RETRY_SECONDS)

    def _fail(self, error: CdpError) -> None:
        with self._changed:
            self._error = error
        os.eventfd_write(self._event, 1)

    def _set_away(self, error: CdpError | None) -> None:
        with self._changed:
            self._away = error
        if error is not None:
            os.eventfd_write(self._event, 1)

    def _fetch(self) -> None:
        """One connection's life."""
        topic_id = topic.topic_id(self._cluster)
        if topic_id is None:
            found = StorageError(
                f"The topic {self._cluster.topic} does not exist.", "Start the relay, which makes it.", code="no_topic"
            )
            found.retriable = True
            raise found
        consumer = self._cluster.consumer()
        try:
            self._seek(consumer, topic_id)
            self._set_away(None)
            self._follow(consumer, topic_id)
        finally:
            consumer.close()

    def _seek(self, consumer: Any, topic_id: str) -> None:
        """To the place, or the topic's beginning where there is none in it."""
        partition, place = self._cluster.partition, self._place
        begin, end = self._cluster.ends(consumer)
        if place is not None and place.topic_id != topic_id:
            log.warning("the topic %s was made anew; it is read from its beginning", self._cluster.topic)
            place, self._seeking, self._lost = None, True, "topic_replaced"
        elif place is not None and place.offset < begin:
            self._lost = "place_expired"
        elif place is None and begin > 0:
            self._lost = "hole"
        if self._lost:
            self._lost_until = end
        self._follower.holder, self._follower.epoch = (place.holder, place.epoch) if place else (b"", 0)
        consumer.seek(partition, max(begin, place.offset if place else 0))

    def _follow(self, consumer: Any, topic_id: str) -> None:
        partition = self._cluster.partition
        idle_ns = storage.monotonic_ns()
        while not self._stop:
            try:
                got = consumer.poll(_POLL_MS).get(partition, [])
            except OffsetOutOfRangeError:
                return self._out_of_range(consumer, topic_id)
            except LogTruncationError:
                return self._look_back(consumer, topic_id)
            except CorruptRecordError as e:
                raise CorruptionError(
                    f"{self._cluster.topic} at offset {consumer.position(partition)}, behind seq {self._follower.seq}: "
                    f"the broker has not what was sent: {e}.",
                    "Check the broker's disk; then resync the group's volumes.",
                ) from e
            try:
                for message in got:
                    self._take(message, topic_id)
                    if self._follower.stranger:
                        return self._look_back(consumer, topic_id)
            except HoleError:
                if self._lost or self._looked_back_at == self._follower.seq:
                    raise
                return self._look_back(consumer, topic_id)
            if got:
                self._wait_for_room()
            if got and not self._follower.jumped_to:
                idle_ns = storage.monotonic_ns()
            elif storage.monotonic_ns() - idle_ns > IDLE_SECONDS * 1e9:
                idle_ns = storage.monotonic_ns()
                _, end = self._cluster.ends(consumer)  # raises while the broker is away
                if end < consumer.position(partition):
                    return self._out_of_range(consumer, topic_id)
                self._set_away(self._waiting())

    def _waiting(self) -> CdpError | None:
        """What is said while the topic has more, but not what follows; None where it has nothing more."""
        if not self._follower.jumped_to:
            return None
        found = StorageError(
            f"The topic {self._cluster.topic} goes on at seq {self._follower.jumped_to}; what follows seq "
            f"{self._follower.seq} is not in it yet.",
            "The relay sends it again by itself: see that it runs.",
            code="not_carried",
        )
        found.retriable = True
        return found

    def _out_of_range(self, consumer: Any, topic_id: str) -> None:
        """The broker lost what was read already, or the topic was made anew: the next connection goes on before its
        end, for the relay may have said again by now some of what was lost, or all of it."""
        partition = self._cluster.partition
        _, end = self._cluster.ends(consumer)
        if consumer.position(partition) <= end:
            return  # it lies before the beginning: records expired, which `_seek` says
        log.warning("the topic %s ends at offset %d, before the reader's place", self._cluster.topic, end)
        self._look_back(consumer, topic_id)

    def _look_back(self, consumer: Any, topic_id: str) -> None:
        """To a claim from before what is missing. A broker that lost its tail may have other messages at this reader's
        offset by now, of a relay whose claim stands before it, and no hole when it is read from there."""
        f = self._follower
        self._looked_back_at = f.seq
        offset, holder, epoch = claim_before(self._cluster, consumer, f.seq)
        log.warning("the topic %s is read again from offset %d for seq %d", self._cluster.topic, offset, f.seq + 1)
        self._place = Place(topic_id, offset, f.seq, holder, epoch)
        f.claim, f.jumped_to, f.jumped_bytes = None, 0, 0
        f.meet(f.stranger or holder)

    def _take(self, message: Any, topic_id: str) -> None:
        where = f"{self._cluster.topic} at offset {message.offset}"
        follower = self._follower
        batches = follower.take(message.key, message.value, where)
        if follower.jumped_to:
            self._check_jump(where, message.offset)
        if self._seeking:
            # A batch that ends where the reader begins is for the chain to compare.
            batches = [b for b in batches if b.last_seq >= self._after_seq]
            self._seeking = not batches
        self._place = place = Place(topic_id, message.offset + 1, follower.seq, follower.holder, follower.epoch)
        if not batches:
            return
        self._lost = ""
        fetched = [_Fetched(b, None) for b in batches[:-1]] + [_Fetched(batches[-1], place)]
        last = batches[-1]
        with self._changed:
            self._away = None
            self._queue.extend(fetched)
            self._queued_bytes += sum(b.batch_bytes for b in batches)
            self._end = max(self._end, (last.last_seq, last.order_ns + last.record_count - 1))
        os.eventfd_write(self._event, 1)

    def _check_jump(self, where: str, offset: int) -> None:
        """Raises HoleError once it is sure that what is missing will not come."""
        f = self._follower
        promised = f.claim is not None and f.claim.after_seq > f.seq
        gone = bool(self._lost) and offset + 1 >= self._lost_until
        if promised or gone or f.jumped_bytes > JUMP_BYTES:
            why, hint = _HOLES[self._lost or "hole"]
            raise HoleError(
                f"{where}: the topic goes on at seq {f.jumped_to}, and {why} seq {f.seq}.", hint,
                code=self._lost or "hole",
            )  # fmt: skip

    def _wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._queued_bytes < QUEUE_BYTES)
