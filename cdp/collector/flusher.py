"""Sync rounds of a group: what makes journal and primaries durable, and answers who waits for it (promise 3).

One round at a time. It begins with everything that waits then, so it serves only requests received before; whoever
comes later is served by the next (group commit). In a round the journal and the primaries concerned are synced at
the same time, by threads; the loop goes on. After it the journal's durable position is published to readers, as far
as the primaries have answered. Some rounds sync every primary: the checkpoint is taken from these.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cdp import storage

if TYPE_CHECKING:
    from cdp.collector.group import Group
    from cdp.collector.volume import Volume

# The journal is synced at least this often while it grows (promise 4).
SYNC_SECONDS = 0.05
# A start writes the journal since the checkpoint again: at some 500 MiB/s this is two seconds of it …
CHECKPOINT_BYTES = 1 << 30
# … and the journal that has to be kept for it must leave room for the consumers.
CHECKPOINT_SHARE = 4
CHECKPOINT_SECONDS = 10.0
# With nothing but heartbeats a checkpoint only frees journal.
IDLE_CHECKPOINT_SECONDS = 60.0
SYNC_THREADS = 8
# Readers are told at most so often, and after SYNC_SECONDS at the latest: it costs a write and a datagram.
PUBLISH_NS = 5_000_000
# With more than this written since the round before, syncs go to threads: the kernel's would take the time for it from
# the loop's own processor.
QUICK_BYTES = 1 << 20
# With at most this much unsynced, a few requests, a primary and the journal are given to the disk before their syncs
# begin: both go there together, and while the loop works, where the kernel's thread brings one after the other …
EARLY_BYTES = 64 << 10
# … but only where the volume's last round took no longer: on a busy disk the loop would wait for a place in its queue.
EARLY_ROUND_NS = 1_000_000

Answer = Callable[[OSError | None], None]


class Flusher:
    """Owned by the loop's thread; `worker` runs the syncs of every group."""

    def __init__(self, group: Group, worker: storage.Worker, max_journal_bytes: int) -> None:
        self._group, self._worker = group, worker
        self._waiting: list[tuple[Volume | None, Answer]] = []
        self._left = 0  # syncs of the round that have not returned; 0: no round
        self._again = False
        self._dirty_limit = min(CHECKPOINT_BYTES, max_journal_bytes // CHECKPOINT_SHARE)
        self._checkpoint_wanted = False
        self._last_checkpoint_ns = storage.monotonic_ns()
        self._published_ns = 0
        self._dirty_before = 0  # the group's dirty bytes when the last round began
        self._quiet: dict[int, int] = {}  # inline volume whose last round was short → the group's dirty bytes then

    def wait(self, volume: Volume | None, answer: Answer) -> None:
        """`answer` is called after a round that begins from here on: for a volume when it and the journal are
        durable, for None when the journal is. Call `kick` after the last of them."""
        self._waiting.append((volume, answer))

    def wait_flush(self, volume: Volume, answer: Answer) -> None:
        """The same for a client's FLUSH or FUA, which a group with a remote carrier answers when that has it too."""
        replicated = self._group.replicated
        self._waiting.append((volume, answer if replicated is None else replicated.behind(answer)))

    def behind_write(self, volume: Volume, answer: Answer) -> Answer:
        """The answer of a FUA: once it is written it waits like a FLUSH that came then."""

        def written(error: OSError | None) -> None:
            if error is not None:
                return answer(error)
            self.wait_flush(volume, answer)
            self.kick()

        return written

    def kick(self) -> None:
        """Begins a round if somebody waits and none is under way."""
        if self._waiting and not self._left:
            self._begin()

    def flush_comes(self, volume: Volume) -> None:
        """Before a FLUSH is journaled: its primary may go to the disk meanwhile."""
        if not self._left and self._is_early(volume):
            storage.start_writing(volume.primary.fd)

    def _is_early(self, volume: Volume) -> bool:
        before = self._quiet.get(volume.id)
        return before is not None and self._group.dirty_bytes - before <= EARLY_BYTES

    def tick(self) -> None:
        """Every SYNC_SECONDS: a growing journal is synced, and checkpoints are taken."""
        self._group.prepare()
        self._publish()
        if self._left:
            return
        group = self._group
        age = (storage.monotonic_ns() - self._last_checkpoint_ns) / 1e9
        limit = CHECKPOINT_SECONDS if group.dirty_bytes else IDLE_CHECKPOINT_SECONDS
        if group.dirty_bytes >= self._dirty_limit or age >= limit:
            self.want_checkpoint()
        if self._waiting or self._checkpoint_wanted or group.has_unsynced:
            self._begin()

    def want_checkpoint(self) -> None:
        """The next round is one that syncs every primary."""
        self._checkpoint_wanted = True

    @property
    def idle(self) -> bool:
        return not self._left and not self._waiting

    def _begin(self) -> None:
        group = self._group
        for volume in group.volumes:
            if volume.sync_failed:
                group.heal(volume)
        waiting, self._waiting = self._waiting, []
        whole, self._checkpoint_wanted = self._checkpoint_wanted, False
        # A checkpoint is the end of a batch: a refused write may be inside of one.
        whole = whole and group.refusals.first_seq is None
        round_ = _Round(waiting, group.answered_seq if whole else 0)
        if whole:
            for volume in group.volumes:
                if volume.intent is not None:
                    volume.intent.end_turn(group.journal.last_seq)
            volumes = [v for v in group.volumes if v.dirty]
            self._last_checkpoint_ns = storage.monotonic_ns()
        else:
            volumes = list({id(v): v for v, _ in waiting if v is not None and v.dirty}.values())
        quick = not whole and group.dirty_bytes - self._dirty_before <= QUICK_BYTES
        early = [v for v in volumes if self._is_early(v)] if quick else []
        if whole:
            group.dirty_bytes = 0
            self._quiet.clear()
        self._dirty_before = group.dirty_bytes
        round_.failed = {v.id for v in group.volumes if v.sync_failed}
        token = group.begin_sync()
        # Known only now: `begin_sync` may have found it dead. While that is tracked a flush means the primary alone.
        round_.journal_ok = not group.journal_dead or group.tracking.on
        round_.volumes, round_.dirty_bytes = volumes, group.dirty_bytes
        if early and token is not None and token.only_fd is not None:
            storage.start_writing(token.only_fd)
        for volume in early:
            storage.start_writing(volume.primary.fd)
        self._left = 1 + len(volumes)  # one for this function: a round never ends inside its own loop
        if token is not None:
            self._left += 1
            done = partial(self._journal_synced, round_, token)
            if quick and token.only_fd is not None:
                self._worker.sync(done, token.only_fd)
            else:
                self._worker.submit(done, group.journal.sync, token)
        for volume in volumes:
            volume.dirty = False
            done = partial(self._primary_synced, round_, volume)
            if not volume.primary.inline:
                volume.primary.sync_later(done)
            elif quick and volume.primary.fd >= 0:
                self._worker.sync(done, volume.primary.fd)
            else:
                self._worker.submit(done, volume.primary.sync)
        self._one_less(round_)

    def _journal_synced(self, round_: _Round, token: Any, _: object, error: BaseException | None) -> None:
        if error is not None:
            round_.journal_ok = self._group.journal_sync_failed(token, error) or self._group.tracking.on
        else:
            self._group.journal.end_sync(token)
        self._one_less(round_)

    def _primary_synced(self, round_: _Round, volume: Volume, _: object, error: BaseException | None) -> None:
        if error is not None:
            round_.failed.add(volume.id)
            volume.sync_went_wrong(error)
        elif volume.id not in round_.failed:
            volume.synced_again()
        self._one_less(round_)

    def _one_less(self, round_: _Round) -> None:
        self._left -= 1
        if self._left:
            return
        self._note_length(round_)
        group = self._group
        for volume, answer in round_.waiting:
            good = round_.journal_ok and not (volume is not None and volume.id in round_.failed)
            answer(None if good else OSError(errno.EIO, "the sync failed"))
        if round_.seq and round_.journal_ok and not round_.failed:
            group.checkpoint(min(round_.seq, group.journal.durable_seq))
        wanted = group.replicated is not None and group.replicated.wants
        if wanted or storage.monotonic_ns() - self._published_ns >= PUBLISH_NS:
            self._publish()
        self.kick()

    def _note_length(self, round_: _Round) -> None:
        """Whether the next round of these volumes may begin early."""
        short = storage.monotonic_ns() - round_.began_ns <= EARLY_ROUND_NS
        for volume in round_.volumes:
            if short and volume.primary.inline and volume.primary.fd >= 0 and volume.id not in round_.failed:
                self._quiet[volume.id] = round_.dirty_bytes
            else:
                self._quiet.pop(volume.id, None)

    def _publish(self) -> None:
        self._published_ns = storage.monotonic_ns()
        self._group.publish()


class _Round:
    __slots__ = ("waiting", "seq", "journal_ok", "failed", "volumes", "dirty_bytes", "began_ns")

    def __init__(self, waiting: list[tuple[Any, Answer]], seq: int) -> None:
        self.waiting = waiting
        self.seq = seq  # what all primaries and the journal will be synced up to, 0: not a checkpoint's round
        self.journal_ok = True
        self.volumes: list[Volume] = []  # whose primaries are synced
        self.dirty_bytes = 0  # the group's when it began
        self.began_ns = storage.monotonic_ns()
        self.failed: set[int] = set()  # volumes whose sync failed in this round, or that were not healed before it
