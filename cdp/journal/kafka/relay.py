"""Carries a group's embedded journal into Kafka: in order, without a hole, and never believed before the topic has it.

A thread of its own for each group. It lives from producer to producer: each life asks the topic what it has, claims it,
and sends on from there; whatever goes wrong ends that life and begins the next. It keeps no state.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from cdp import storage
from cdp.errors import CdpError, FencedError, ForkedError, HoleError, StorageError
from cdp.journal import consumers
from cdp.journal.acknowledged import Acknowledged, Mouth
from cdp.journal.batch import Batch
from cdp.journal.kafka import topic
from cdp.journal.kafka.carried import Carried, carried
from cdp.journal.kafka.cluster import AWAY, Cluster
from cdp.journal.kafka.kept import Kept
from cdp.journal.kafka.messages import RELAY_ID_BYTES, Claim, join
from cdp.journal.kafka.sender import BrokenOffError, Sender
from cdp.journal.position import DurablePosition, read_durable
from cdp.journal.reader import EmbeddedReader
from cdp.journal.segment import list_segments, read_header, segment_name

log = logging.getLogger(__name__)

# The relay among the consumers of the embedded journal.
CONSUMER = "relay"
READ_BYTES = 4 << 20
TICK_SECONDS = 1.0
# When the collector had no room for what the relay says: flushes wait for it, so it is tried again soon.
SAY_AGAIN_SECONDS = 0.005
# After a life that ended: at once where the topic only has to be asked again, later and later where it does not help.
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.2, 10.0

Reason = dict[str, str]


class Relay:
    """One group's. `figures` may be called from any thread."""

    def __init__(self, cluster: Cluster, folder: str, *, keep_ns: int, max_kept_bytes: int) -> None:
        """`folder` is the embedded journal's. Acknowledged parts are kept for `keep_ns`, at most `max_kept_bytes`."""
        self.cluster, self._folder = cluster, folder
        self._kept = Kept(keep_ns, max_kept_bytes)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = False
        self._mouth: Mouth | None = None
        self._epoch = 0  # of the incarnation that this life carries for
        self.carried_seq = self._began_at = 0
        self.reason: Reason | None = {"code": "starting", "text": "The relay asks the topic what it has."}
        self.state = "waiting"
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._run, name=f"relay-{cluster.topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the life under way; what is in flight is sent again by the next start. Idempotent."""
        self._stop = True
        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._wake = -1

    def figures(self) -> dict[str, Any]:
        """See Control in the contracts. `state`: `carrying`, `waiting` (goes on by itself), `stopped` or `forked`."""
        return {
            "state": self.state, "reason": self.reason, "topic": self.cluster.topic, "carried_seq": self.carried_seq,
            "kept_bytes": self._kept.bytes,
        }  # fmt: skip

    def _run(self) -> None:
        while not self._stop:
            try:
                self._live()
            except BrokenOffError as e:
                log.warning("relay of %s: %s Asking the topic what it has.", self.cluster.topic, e.message)
                if self.carried_seq == self._began_at:  # nothing was carried: whoever looks wants to know why
                    self._set("waiting", e.code, str(e))
            except (FencedError, ForkedError) as e:
                # Asked again all the same: after a power cut `durable` may be older than the journal for a while.
                self._set("forked", e.code, str(e))
                self._say(fenced=True)
            except CdpError as e:
                self._set("waiting" if e.retriable else "stopped", e.code, str(e))
            except AWAY as e:
                away = self.cluster.away(e)
                self._set("waiting", away.code, str(away))
            except BaseException as e:  # nothing may end this thread unseen
                log.exception("relay of %s", self.cluster.topic)
                self._set("stopped", "internal", f"{type(e).__name__}: {e}")
            storage.wait_readable([self._wake], 0 if self._stop else self._pause_seconds)
            self._pause_seconds = min(self._pause_seconds * 2, MAX_PAUSE_SECONDS)
        if self._mouth is not None:
            self._mouth.close()

    def _say(self, *, fenced: bool = False, again: bool = False) -> bool:
        """Tells the collector how far the topic is. False: to be tried again."""
        if self._mouth is None:
            self._mouth = Mouth(self._folder)
        return self._mouth.say(Acknowledged(self._epoch, self.carried_seq, fenced), again or fenced)

    def _set(self, state: str, code: str, text: str) -> None:
        if self.reason is None or self.reason["code"] != code:
            log.error("relay of %s is %s: %s", self.cluster.topic, state, text)
        self.state, self.reason = state, {"code": code, "text": text}

    # --- one life

    def _live(self) -> None:
        journal = read_durable(self._folder)
        if journal is None:
            raise _no_journal(self._folder)
        self._epoch = journal.epoch
        topic.ensure(self.cluster)
        consumer = self.cluster.consumer()
        try:
            found = carried(self.cluster, consumer)
        finally:
            consumer.close()
        found = self._place(found, journal)
        after_seq = found.seq
        # An id for each life: what an earlier producer still sends is not believed any more.
        relay_id = storage.random_bytes(RELAY_ID_BYTES)
        claim = Claim(journal.epoch, after_seq, found.crc, found.end_offset, journal.group_id)
        sender = Sender(self.cluster, self.cluster.producer(), relay_id, claim)
        try:
            self.carried_seq = self._began_at = after_seq
            sender.begin()
            reader = EmbeddedReader(self._folder, CONSUMER, after_seq)
            self._kept.resume(storage.monotonic_ns(), after_seq, self._parts())
            try:
                self._carry(sender, reader, journal.epoch, found)
            except HoleError as e:
                raise HoleError(e.message, f"Delete the topic {self.cluster.topic} and resync the volumes.") from e
            finally:
                reader.close()
        finally:
            sender.close()

    def _parts(self) -> Iterator[tuple[int, int]]:
        """(last seq, bytes) of the segments that may go one day, in order."""
        names = list_segments(self._folder)
        for name, following in pairwise(names):
            try:
                yield following - 1, storage.stat(f"{self._folder}/{segment_name(name)}").st_size
            except FileNotFoundError:
                continue  # freed meanwhile

    def _beginning(self, found: Carried) -> Carried:
        """In front of the first batch that the journal keeps for the relay: older segments may go at any moment."""
        names = list_segments(self._folder)
        if not names:
            return found
        needed = consumers.positions(self._folder).get(CONSUMER, 0) + 1
        first = max((name for name in names if name <= needed), default=names[0])
        path = f"{self._folder}/{segment_name(first)}"
        fd = storage.open_file(path, os.O_RDONLY)
        try:
            header = read_header(fd, path, first)
        finally:
            storage.close(fd)
        return found._replace(seq=header.last_seq, crc=header.last_crc)

    def _place(self, found: Carried, journal: DurablePosition) -> Carried:
        """Where this life goes on. Raises FencedError, ForkedError."""
        claim = found.claim
        if claim is None:
            return self._beginning(found)
        if claim.group_id != journal.group_id:
            raise ForkedError(
                f"The topic {self.cluster.topic} carries the journal {claim.group_id.hex()}, not "
                f"{journal.group_id.hex()}.",
                "Name another `topic_prefix`, or delete the topic and resync the volumes.",
            )
        if claim.epoch > journal.epoch:
            raise FencedError(
                f"Incarnation {claim.epoch} of this group has claimed the topic {self.cluster.topic}; this is "
                f"incarnation {journal.epoch}.",
                "Another collector runs for this group: stop one of them, then start this one again.",
            )
        if found.seq > journal.seq:
            raise ForkedError(
                f"The topic {self.cluster.topic} goes up to seq {found.seq}, the journal {self._folder} to "
                f"{journal.seq}: it was put back to an older copy.",
                "Put the newer copy back, or delete the topic and resync the volumes.",
            )
        return found

    def _carry(self, sender: Sender, reader: EmbeddedReader, epoch: int, found: Carried) -> None:
        """Until the collector starts again (another epoch to claim for), `stop`, or a failure."""
        waiting: deque[list[Batch]] = deque()
        sizes: deque[tuple[int, int]] = deque()
        first, newer = True, False
        tick_ns = storage.monotonic_ns()
        while not self._stop and not (newer and sender.idle and not waiting):
            batches = [] if waiting or newer else reader.read(READ_BYTES)
            if first and batches:
                first = False
                self._check_continues(batches[0], found)
            ours = [b for b in batches if b.epoch <= epoch]
            newer = newer or len(ours) < len(batches)
            waiting.extend(join(ours))
            while waiting and sender.has_room:
                message = waiting.popleft()
                sender.send(message)
                sizes.append((message[-1].last_seq, sum(b.batch_bytes for b in message)))
            sender.settle()
            self._acknowledged(sender.acked_seq, sizes)
            again = storage.monotonic_ns() - tick_ns >= TICK_SECONDS * 1e9
            heard = self._say(again=again)
            if again:
                tick_ns = storage.monotonic_ns()
                if (released := self._kept.release(tick_ns)) > 0:
                    reader.acknowledge(released)
            if waiting or not batches:
                extra = [] if waiting else [reader.fileno()]
                pause = TICK_SECONDS if heard else SAY_AGAIN_SECONDS
                storage.wait_readable([self._wake, sender.fileno(), *extra], pause)
                sender.drain()
                reader.drain()

    def _check_continues(self, batch: Batch, found: Carried) -> None:
        if found.claim is not None and found.seq and batch.prev_crc != found.crc:
            raise ForkedError(
                f"What the topic {self.cluster.topic} has up to seq {found.seq} is not what the journal {self._folder} "
                "has: another history was carried there.",
                "Delete the topic and resync the volumes.",
            )

    def _acknowledged(self, seq: int, sizes: deque[tuple[int, int]]) -> None:
        self.carried_seq = seq
        if seq > self._began_at or not sizes:
            self._pause_seconds = FIRST_PAUSE_SECONDS
            if self.reason is not None:
                log.info("relay of %s carries on behind seq %d", self.cluster.topic, seq)
                self.state, self.reason = "carrying", None
        now_ns = storage.monotonic_ns()
        while sizes and sizes[0][0] <= seq:
            self._kept.add(now_ns, *sizes.popleft())


def _no_journal(folder: str) -> StorageError:
    found = StorageError(f"There is no journal in {folder} yet.", "Start the collector.", code="no_journal")
    found.retriable = True
    return found
