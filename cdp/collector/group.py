"""A group's life: its one journal, its state, the heartbeat, and what happens when something fails.

States: a volume's own (see `Volume.state`), and `stopped` for the group as a whole: reads are served, writes
refused, until it goes on by itself (space, a primary that can be read again, a journal that can be written).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

from cdp import storage
from cdp.collector.bookmarks import Bookmarks
from cdp.collector.flusher import Flusher
from cdp.collector.refused import RefusedWrites
from cdp.collector.reopening import Reopening
from cdp.collector.replicated import Replicated
from cdp.collector.state import VERSION, Checkpoint, GroupState, Store, boot_id, save
from cdp.collector.tail import TailWriter
from cdp.collector.tracking import JOURNAL_FAILED, JOURNAL_FULL, Tracking
from cdp.collector.volume import Reason, Volume
from cdp.errors import JournalFullError, StorageError
from cdp.journal import batch, consumers
from cdp.journal.writer import JournalWriter
from cdp.said import Said

log = logging.getLogger(__name__)

# kind, flags, volume, offset, length, data
NewRecord = tuple[int, int, int, int, int, "bytes | memoryview"]
# The consumer that stands for the primaries: the journal since the checkpoint is written again at a start.
CHECKPOINT_CONSUMER = "primary"
_WORST_FIRST = ("stopped", "rolling_back", "resyncing", "syncing")


class Group:
    """Owned by the loop's thread. `name`, `volumes`, `journal` and `state_file` are plain facts for the other rooms."""

    def __init__(
        self,
        name: str,
        folder: str,
        state: GroupState,
        volumes: list[Volume],
        journal: JournalWriter,
        worker: storage.Worker,
        max_journal_bytes: int,
    ) -> None:
        self.name, self.folder, self.volumes, self.journal = name, folder, volumes, journal
        self.content = state
        self.epoch = state["epoch"]
        self._worker = worker
        self.refuse = 0  # errno for every write, 0: none
        self.reason: Reason | None = None
        self.journal_dead = False
        self.serving = False  # its timers run
        self.active = False  # something was written since the last second
        self.dirty_bytes = 0  # since the last round that synced everything
        self.said = Said(log)  # what may happen at every request, or many times a second
        self.pending: dict[int, int] = {}  # first seq of a batch → writes that an asynchronous primary owes
        self.hold_checkpoint = False  # a volume is in doubt: its journal is kept
        self.first_records: list[NewRecord] = []  # of this life, as long as they are not in the journal
        self._max_journal_bytes = max_journal_bytes
        self.start_resync: Callable[[Volume, Reason, int], bool] = lambda volume, reason, from_seq: False
        self.go_on_resync: Callable[[Volume, int], None] = lambda volume, from_seq: None
        self.checkpoint_seq = 0  # of the newest checkpoint that is durable
        self.flusher = Flusher(self, worker, max_journal_bytes)
        self.refusals = RefusedWrites(self)
        self.tracking = Tracking(self, f"{folder}/tracking")
        self.replicated: Replicated | None = None  # flushes wait for the journal's remote carrier too
        self.bookmarks = Bookmarks(f"{folder}/bookmarks", worker)
        self._state_store = Store(f"{folder}/group.json", worker)
        self._published = journal.durable_seq
        self._reopening = Reopening(self, worker)
        self.journal_sync_failed = self._reopening.after_failed_sync
        self._checkpointing, self._preparing, self._healed = False, False, set[int]()

    # --- the journal

    def begin(self) -> None:
        """Journals what every life begins with; where there is no space the group waits for it, stopped."""
        if self.first_records and self.try_append(self.first_records):
            self.first_records = []
            self.settle()

    def append(self, records: list[NewRecord]) -> int:
        """Appends one batch; its first seq. Raises StorageError, JournalFullError (the group is stopped by then)."""
        if self.journal_dead:
            raise StorageError(f"The journal of {self.name} failed.", "It goes on by itself when it can be written.")
        pack = batch.DESCRIPTOR.pack
        data = [r[5] for r in records if r[5]]
        descriptors = b"".join(pack(k, f, v, len(d), o, n) for k, f, v, o, n, d in records)
        data_bytes = sum(len(d) for d in data)
        try:
            seq: int = self.journal.append(descriptors, data, data_bytes)
        except JournalFullError as e:
            self.stop(JOURNAL_FULL, str(e), errno.ENOSPC)
            raise
        except OSError as e:
            self.journal_died(e)
            raise StorageError(f"The journal of {self.name} cannot be written: {e}.") from e
        self.dirty_bytes += data_bytes
        return seq

    def try_append(self, records: list[NewRecord]) -> bool:
        """The same; False when the group stopped instead."""
        try:
            self.append(records)
        except StorageError:
            return False
        return True

    @property
    def answered_seq(self) -> int:
        """The primaries have answered for every record up to here, and what they refused is dealt with."""
        limit: int = self.journal.last_seq
        if self.pending:
            limit = min(limit, next(iter(self.pending)) - 1)
        refused = self.refusals.first_seq
        return limit if refused is None else min(limit, refused - 1)

    @property
    def journal_is_filling(self) -> bool:
        """Passes over volumes wait: the rest of the space is for production."""
        return self.journal.live_bytes > self._max_journal_bytes * 3 // 4

    @property
    def has_unsynced(self) -> bool:
        return not self.journal_dead and self.journal.last_seq > self.journal.durable_seq

    def begin_sync(self) -> Any:
        """A token for `journal.sync`, None if nothing is new or the journal is dead."""
        try:
            return None if self.journal_dead else self.journal.begin_sync()
        except OSError as e:
            self.journal_died(e)
            return None

    def publish(self) -> None:
        """Lets readers see what is durable and answered."""
        seq = self.refusals.visible(min(self.answered_seq, self.journal.durable_seq))
        if seq <= self._published or self.journal_dead:
            return
        try:
            self.journal.publish(seq)
            self._published = seq
        except OSError as e:  # readers wait for the next batch; production does not (promise 10)
            self.said.add("publish", logging.ERROR, "group %s: readers cannot be told of seq %d: %s", self.name, seq, e)

    def release(self) -> None:
        """Frees the journal that nobody needs; what keeps it from that is logged, and tried again later."""
        try:
            if not self._reopening.under_way:
                self.journal.release()
        except (OSError, StorageError) as e:
            self.said.add("release", logging.ERROR, "group %s: its journal cannot be freed: %s", self.name, e)

    # --- states

    @property
    def state(self) -> str:
        """The group's own stop, else its worst volume's state."""
        if self.refuse:
            return "tracking" if self.tracking.on else "stopped"
        states = {v.state for v in self.volumes}
        return next((s for s in _WORST_FIRST if s in states), "protected")

    def stop(self, code: str, text: str, number: int = errno.EIO) -> None:
        """Refuses writes from here on. A dead journal's reason gives way to no other."""
        if self.journal_dead and code != JOURNAL_FAILED:
            return
        if self.reason is None or self.reason["code"] != code:
            log.error("group %s stopped (%s): %s", self.name, code, text)
        self.refuse, self.reason = number, {"code": code, "text": text}
        self.tracking.begin(code)

    def _resume(self) -> None:
        if self.reason is not None:
            log.warning("group %s goes on after %s", self.name, self.reason["code"])
        self.refuse, self.reason = 0, None

    def journal_died(self, error: BaseException) -> None:
        """Nothing can be journaled, so nothing is written, until a new segment takes what is not durable."""
        self.journal_dead = True
        text = f"The journal of {self.name} failed: {error}. A new segment is tried every second."
        self.stop(JOURNAL_FAILED, text)

    def heal(self, volume: Volume) -> None:
        """Before a round: what the primary took since the checkpoint is written again, so that the round's sync says
        whether it is durable (promise 3). Blocks the loop for it, at most once a second; reads in the pool would see
        older content meanwhile, so they are let finish first.
        """
        if volume.id in self._healed or volume.cold_reads and volume.primary.inline:
            return
        self._healed.add(volume.id)
        if self.tracking.noted:
            return  # the journal's tail is older than what the primary took: only a restart's comparison helps
        if volume.upstream is not None:
            return volume.upstream.heal()
        writer = TailWriter({volume.id: volume}, self.refused)
        try:
            for found in self.journal.batches_after(self.checkpoint_seq):
                writer.apply(found)
        except (OSError, StorageError) as e:
            log.error("volume %s: what it took cannot be written again: %s", volume.name, e)
            return
        volume.sync_failed = False
        self.settle()

    # --- refused writes

    def refused(self, volume: Volume, offset: int, length: int, seq: int) -> None:
        text = "volume %s: the primary refused seq %d (%d bytes at %d)"
        self.said.add(("refused", volume.id), logging.WARNING, text, volume.name, seq, length, offset)
        self.refusals.add(volume, offset, length, seq)

    def settle(self) -> None:
        self.refusals.settle()

    # --- time

    def second(self) -> None:
        """Once a second: heartbeat, and another try at whatever stopped the group."""
        self._healed.clear()
        self.said.tick()
        self.refusals.end_storms()
        if self.tracking.noted or any(volume.sync_failed for volume in self.volumes):
            self.flusher.want_checkpoint()
        if self.refuse:
            self._try_again()
        elif self.journal_is_filling:  # passes wait for it, and its consumers may have gone on
            self.release()
        elif not self.active:
            self.try_append([(batch.HEARTBEAT, 0, batch.NO_VOLUME, 0, 0, b"")])
        self.active = False

    def _try_again(self) -> None:
        self.release()
        if self.replicated is not None and self.replicated.fenced:
            return
        if self.journal_dead:
            return self._reopening.attempt()
        self.flusher.want_checkpoint()
        if self.reason and self.reason["code"] == JOURNAL_FULL and not self.journal.has_room:
            return  # a heartbeat would fit, and the next write stop the group again
        self.append_again()

    def append_again(self) -> None:
        """Goes on if the journal takes something, and what was refused could be read back."""
        heartbeat = (batch.HEARTBEAT, 0, batch.NO_VOLUME, 0, 0, b"")
        if not self.try_append([*self.first_records, *self.tracking.gaps()] or [heartbeat]):
            return
        self.first_records = []
        self.tracking.end()
        self.settle()
        if self.refusals.first_seq is None:
            self._resume()

    def prepare(self) -> None:
        """Lets the journal make its next segment before it is needed."""
        work = None if self._preparing or self.journal_dead else self.journal.prepare()
        if work is None:
            return
        self._preparing = True

        def prepared(_: object, error: BaseException | None) -> None:
            self._preparing = False
            if error is not None:
                text = "group %s: the next journal segment could not be prepared: %s"
                self.said.add("prepare", logging.WARNING, text, self.name, error)

        self._worker.submit(prepared, work)

    # --- what is kept

    def save_state(self, done: Callable[[BaseException | None], None] | None = None) -> None:
        """Makes the volumes' durable facts so."""
        self._note_volumes()
        if not self.serving:
            return  # a start saves it itself before it ends

        def saved(error: BaseException | None) -> None:
            if error is not None:
                self.said.add("state", logging.ERROR, "group %s: its state cannot be saved: %s", self.name, error)
            if done is not None:
                done(error)

        self._state_store.save(self.content, saved)

    def save_state_now(self) -> None:
        """The same while no clients are served; blocks."""
        self._note_volumes()
        save(f"{self.folder}/group.json", self.content)

    def _note_volumes(self) -> None:
        for v in self.volumes:
            self.content["volumes"][v.name] = {
                "id": v.id, "size": v.size, "sync": v.due, "lock": v.lock, "rollback": v.rollback,
                "doubt": v.doubt,
            }  # fmt: skip

    def checkpoint(self, seq: int) -> None:
        """Primaries and journal are synced up to `seq`: a start need not go further back."""
        if self._checkpointing or self.hold_checkpoint or self._state_store.busy:
            return  # the next one will be later
        if self._state_store.failed:  # the records behind the checkpoint are all that tells of it
            return self.save_state(lambda error: None if error else self.flusher.want_checkpoint())
        self._checkpointing = True
        content = self.checkpoint_content(seq, clean=False)

        def saved(error: BaseException | None) -> None:
            if error is not None:
                self._checkpointing = False
                log.error("group %s: the checkpoint cannot be saved: %s", self.name, error)
                return
            self._worker.submit(released, consumers.acknowledge, f"{self.folder}/journal", CHECKPOINT_CONSUMER, seq)

        def released(_: object, error: BaseException | None) -> None:
            self._checkpointing = False
            if error is not None:
                log.error("group %s: the journal cannot be told of the checkpoint: %s", self.name, error)
                return
            self.checkpoint_seq = seq
            self.tracking.checkpointed(seq)
            for volume in self.volumes:
                held = self.tracking.noted or volume.due is not None or volume.doubt is not None
                if volume.intent is not None and not held:
                    volume.intent.checkpointed(seq)
            self.release()

        def named(error: BaseException | None) -> None:
            if error is not None:
                return saved(error)
            Store(f"{self.folder}/checkpoint", self._worker).save(content, saved)

        self.bookmarks.save(named)  # first: behind the checkpoint nobody meets their records again

    def checkpoint_content(self, seq: int, clean: bool) -> Checkpoint:
        """What a start compares the primaries with. Raises OSError."""
        return {
            "version": VERSION, "seq": seq, "clean": clean, "boot_id": boot_id(), "wall_ns": storage.wall_ns(),
            "primaries": {v.name: v.primary.identity() for v in self.volumes},
        }  # fmt: skip
